"""This process among the others: who it is, whom it can reach, and how it starts and stops.

TensorFlow's multi-worker runtime is brought up by its own strategy, of which nothing else is used:
variables are this rank's own, made outside the strategy's scope.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import tensorflow as tf
from tensorflow.python.eager import context

from ds_train.errors import TrainError
from ds_train.parallel.collectives import Engine, Ranks
from ds_train.parallel.mesh import Group, Mesh, Place

JOIN_SECONDS = int(os.environ.get("DS_TRAIN_JOIN_SECONDS", "120"))
HEARTBEAT_SECONDS = 10
_LAST_SECONDS = 1.0  # that the others have to end in
LOST = 3  # exit code of a process whose peers are gone
_LEADER = "/job:worker/replica:0/task:0"


class LostRankError(TrainError):
    """Another rank is gone, or does not answer; names it where TensorFlow does."""


class World:
    """A rank's view of all ranks. `World.join` makes it; alone, `World(Mesh(), 0)` does.

    Args:
        mesh: how ranks share the work.
        rank: this one.

    Attributes:
        mesh: as given.
        rank: as given.
        size: ranks in all.
        place: where in the mesh this rank stands.
        engine: orders its collectives.
    """

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self.mesh = mesh
        self.rank = rank
        self.size = mesh.size
        self.place: Place = mesh.place(rank)
        self.engine = Engine()
        self._known: dict[int, Ranks] = {}
        self._strategy: tf.distribute.Strategy | None = None
        self._sum: tf.types.experimental.PolymorphicFunction | None = None
        self._gather: tf.types.experimental.PolymorphicFunction | None = None

    @classmethod
    def join(cls, mesh: Mesh, join_seconds: int = JOIN_SECONDS) -> World:
        """Start TensorFlow's runtime and wait for all ranks.

        The ranks' addresses come from the environment: `TF_CONFIG`, as schedulers on Kubernetes
        set it and `ds-train launch` does; or Slurm's variables. Without either there is one rank.
        Must come before anything else of TensorFlow runs.

        A process whose peers do not come in time ends, with code 1: TensorFlow's runtime waits for
        an hour, whatever it is told, and can't be interrupted.

        Args:
            mesh: how ranks share the work.
            join_seconds: how long to wait for ranks that are not there yet.

        Raises:
            LostRankError: TensorFlow's runtime did not start.
            TrainError: the environment names more or fewer ranks than the mesh has.
        """
        resolver = _resolver()
        count = 1 if resolver is None else resolver.cluster_spec().num_tasks("worker")
        if count != mesh.size:
            raise TrainError(
                f"the mesh {mesh} has {mesh.size} ranks and the environment names {count}; start "
                "as many processes as the mesh has ranks"
            )
        if resolver is None or count == 1:
            return cls(mesh, 0)
        rank = resolver.task_id
        # Before the strategy, which would take longer times and leaves these as they are.
        job = context.coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=count)
        context.context().configure_coordination_service(
            service_type="standalone",
            service_leader=_LEADER,
            heartbeat_timeout_in_ms=1000 * HEARTBEAT_SECONDS,
            shutdown_barrier_timeout_in_ms=1000 * HEARTBEAT_SECONDS,
            coordinated_jobs=[job],
        )
        addresses = ", ".join(resolver.cluster_spec().job_tasks("worker"))
        print(  # noqa: T201 - what a process that is ended said last
            f"rank {rank}: joins {addresses}; ends if not all come within {join_seconds} s",
            flush=True,
        )
        try:
            with _at_most(join_seconds):
                strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
        except tf.errors.OpError as error:
            raise lost(error, "while ranks joined") from error
        world = cls(mesh, rank)
        world._strategy = strategy  # lives as long as its runtime is to
        return world

    def ranks(self, group: Group) -> Ranks:
        """Return what a group's members use to reach each other."""
        if group.key not in self._known:
            self._known[group.key] = Ranks(group, self.rank, self.engine)
        return self._known[group.key]

    @property
    def all(self) -> Ranks:
        """All ranks."""
        return self.ranks(self.mesh.world)

    def wait_for_all(self) -> None:
        """Come back once every rank has called this.

        Raises:
            LostRankError: one will not.
        """
        self.total(0.0)

    def leave_together(self) -> None:
        """Come back once every rank is done with all there was to do and to save.

        Who comes back first ends its process, perhaps while others still hear of it: to find one
        gone here is no loss. Rank 0 has the service that all report to, and so leaves last.
        """
        with suppress(LostRankError):
            self.wait_for_all()
        if self.rank == 0 and self.size > 1:
            time.sleep(_LAST_SECONDS)

    def total(self, number: float) -> float:
        """Return the sum of what every rank gave.

        Raises:
            LostRankError: a rank is gone.
        """
        if self.size == 1:
            return number
        if self._sum is None:
            self._sum = tf.function(self.all.all_reduce, autograph=False)
        try:
            return float(self._sum(tf.constant(number, tf.float64)))
        except tf.errors.OpError as error:
            raise lost(error, "while ranks waited for each other") from error

    def check_same(self, things: Mapping[str, str]) -> None:
        """See that all ranks mean the same run.

        Args:
            things: text by name, of configuration, code, data.

        Raises:
            TrainError: a rank has another text than rank 0; names the thing and the rank.
        """
        if self.size == 1:
            return
        if self._gather is None:
            self._gather = tf.function(self.all.all_gather, autograph=False)
        mine = [_fingerprint(text) for text in things.values()]
        try:
            found = self._gather(tf.constant([mine], tf.int64)).numpy()
        except tf.errors.OpError as error:
            raise lost(error, "before the first step") from error
        for column, name in enumerate(things):
            other = [rank for rank, row in enumerate(found) if row[column] != found[0][column]]
            if other:
                which = ", ".join(map(str, other))
                raise TrainError(
                    f"rank {which} has another {name} than rank 0; start all ranks with the same"
                )

    def describe(self, parts: Iterable[str]) -> str:
        """Return one line that says where this rank stands.

        Args:
            parts: what it holds, in words.
        """
        held = ", ".join(parts)
        place, mesh = self.place, self.mesh
        return (
            f"rank {self.rank} of {mesh.size} ({socket.gethostname()}, process {os.getpid()}): "
            f"pipeline {place.pp} of {mesh.pp}, experts "
            f"{place.ep} of {mesh.ep}, replica {place.dp} of {mesh.dp}; {held}"
        )


def lost(error: tf.errors.OpError, when: str) -> LostRankError:
    """Return what to say of a collective that failed: which rank is gone, as far as is known.

    TensorFlow's errors are sticky: after one, a process can't exchange anything any more.
    """
    said = " ".join(str(error.message).split())
    named = sorted({int(task) for task in re.findall(r"/?task:(\d+)", said)} - {-1})
    which = f"rank {', '.join(map(str, named))} " if named else "a rank "
    return LostRankError(f"lost {which}({type(error).__name__}, {when}): {said[:300]}")


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """End the process if the body takes longer.

    It holds Python's lock all the while, so that no thread of Python's could: this one is of C.
    """
    with Path(os.devnull).open("w") as nowhere:
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _fingerprint(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _resolver() -> tf.distribute.cluster_resolver.ClusterResolver | None:
    resolvers = tf.distribute.cluster_resolver
    if os.environ.get("TF_CONFIG"):
        return resolvers.TFConfigClusterResolver()
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return resolvers.SlurmClusterResolver()
    return None
