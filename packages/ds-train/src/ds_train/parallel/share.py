"""One rank's share of a training run: its part of the model, of a batch, of a checkpoint."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from ds_model import CausalLM, ModelConfig
from ds_train.checkpoint import Contents, Piece
from ds_train.config import TrainConfig
from ds_train.errors import TrainConfigError
from ds_train.optimizer import AdamW
from ds_train.parallel.layout import Layout
from ds_train.parallel.mesh import Mesh
from ds_train.parallel.schedules import make_schedule
from ds_train.parallel.step import ParallelStep
from ds_train.parallel.update import ShardedUpdate, WholeUpdate
from ds_train.parallel.world import World, lost
from ds_train.step import StepOutput

PACKAGES = ("ds_precision", "ds_attention", "ds_moe", "ds_model", "ds_train")


class RankShare:
    """What `Trainer` trains on one rank of many.

    Args:
        config: of the run.
        model_config: of the whole model.
        optimizer: not built yet.
        world: this rank's.

    Attributes:
        model: this rank's part.
        everyone: the ranks that write a checkpoint together.

    Raises:
        TrainConfigError: the configuration has something that one process alone can do, or numbers
            that do not fit the mesh.
    """

    def __init__(
        self, config: TrainConfig, model_config: ModelConfig, optimizer: AdamW, world: World
    ) -> None:
        table = config.parallel
        _check_supported(config)
        layout = layout_of(config, model_config)
        self.everyone = world
        self._layout = layout
        experts = world.ranks(world.mesh.experts(world.rank)) if table.ep > 1 else None
        part = layout.part(world.place.pp, experts)
        self.model = CausalLM(model_config, dtype=config.policy(), part=part)
        update = ShardedUpdate if table.zero else WholeUpdate
        self._update = update(self.model.trainable_variables, optimizer, layout, world)
        self._optimizer = optimizer
        self._stop = threading.Event()
        self._step = ParallelStep(self.model, self._update, config, layout, world)

    def run(self, batch: np.ndarray, accumulation: int) -> StepOutput:
        """Do one optimizer step.

        Args:
            batch: `[G, S + 1]` int32: the whole step's sequences.
            accumulation: micro-batches of each pipeline.

        Raises:
            LostRankError: another rank is gone, or does not answer.
        """
        world = self.everyone
        sizes = micro_batches(len(batch), world.mesh.data_ranks, accumulation)
        mine = world.mesh.data_rank(world.rank)
        first = sum(map(sum, sizes[:mine]))
        tokens = tf.constant(batch[first : first + sum(sizes[mine])])
        try:
            return self._step.compiled(tokens, sizes[mine])
        except tf.errors.OpError as error:
            raise lost(error, "within a step") from error

    def contents(self, to_save: bool, average: Sequence[keras.Variable] = ()) -> Contents:
        """Return what this rank needs of a checkpoint, or what it is to write."""
        weights = self._update.weights(self.model.variables)
        moments = [*self._update.moments(), *self._update.averages(average)]
        if to_save:
            weights, moments = (
                [piece for piece in pieces if self._update.writes(piece)]
                for pieces in (weights, moments)
            )
        if not to_save or self.everyone.rank == 0:
            moments = [Piece("iterations", self._optimizer.iterations), *moments]
        return {"model": weights, "optimizer": moments}

    def loss_scaling(self) -> dict[str, float]:
        """Return how the loss is scaled."""
        return self._step.scaling.state()

    def loaded(self, loss_scaling: dict[str, float]) -> None:
        """Take note that a checkpoint was read."""
        self._update.refresh()
        self._step.scaling.restore(loss_scaling)

    @contextmanager
    def hears_of_stops(self) -> Iterator[None]:
        """Within it SIGTERM is noted, and ends the run at the end of a step, on all ranks.

        Only a process's first thread can hear of signals; Ray runs ranks in another.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def asked_to_stop(self) -> bool:
        """Say whether any rank was sent SIGTERM; the same answer on all ranks."""
        return self.everyone.total(self._stop.is_set()) > 0

    def describe(self) -> str:
        """Return one line that says where this rank stands and what it holds."""
        world, layout = self.everyone, self._layout
        parts = [
            f"stage {stage} (blocks {_range(layout.blocks[stage])})"
            for stage in layout.schedule.held_by(world.place.pp)
        ]
        numbers = sum(int(np.prod(v.shape)) for v in self.model.trainable_variables)
        return world.describe([*parts, f"{numbers:,} parameters"])

    def check_same(self, config: TrainConfig, data_sha256: str) -> None:
        """See that all ranks mean the same run.

        Raises:
            TrainError: one has another configuration, code or text; names it.
        """
        self.everyone.check_same(
            {"configuration": config.model_dump_json(), "code": code_sha256(), "text": data_sha256}
        )


def micro_batches(sequences: int, ranks: int, accumulation: int) -> list[tuple[int, ...]]:
    """Deal sequences out, as evenly as can be: return the sizes of each rank's micro-batches."""
    share, more = divmod(sequences, ranks * accumulation)
    sizes = [share + (i < more) for i in range(ranks * accumulation)]
    return [tuple(sizes[at : at + accumulation]) for at in range(0, len(sizes), accumulation)]


def layout_of(config: TrainConfig, model_config: ModelConfig) -> Layout:
    """Return who holds what.

    Raises:
        TrainConfigError: the model or the batch does not fit the mesh.
    """
    table = config.parallel
    try:
        schedule = make_schedule(table.schedule, table.pp, config.train.accumulation)
        return Layout(model_config, Mesh(table.pp, table.ep, table.dp), schedule)
    except TrainConfigError:
        raise
    except ValueError as error:
        raise TrainConfigError(f"[parallel] {error} ([train] accumulation)") from error


def code_sha256() -> str:
    """Return a checksum of the code that trains: all Python files of the packages."""
    digest = hashlib.sha256(f"{keras.__version__} {tf.__version__}".encode())
    for package in PACKAGES:
        spec = find_spec(package)
        folder = Path(spec.origin).parent if spec and spec.origin else Path()
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _check_supported(config: TrainConfig) -> None:
    every, table = config.train.watch_every, config.parallel
    if every and (table.pp > 1 or table.ep > 1):
        raise TrainConfigError(
            f"[train] watch_every = {every} looks at a whole model, which no rank has with pp = "
            f"{table.pp} and ep = {table.ep}; take it out"
        )


def _range(numbers: tuple[int, ...]) -> str:
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}-{last}"
