"""All ranks of a run as processes of this machine: started, watched, and ended together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Self

import tensorflow as tf

from ds_train.errors import TrainError
from ds_train.parallel.mesh import Mesh
from ds_train.parallel.worker import BAD_INPUT, DONE, PROGRESS, STOPPED, RankRun
from ds_train.parallel.world import LOST

GRACE_SECONDS = 30.0  # for the others, once one rank is gone
_LOOK_SECONDS = 0.1

Report = Callable[[int, int, str], None]


def launch(run: RankRun, report: Report, say: Callable[[str], None]) -> None:
    """Train on as many processes as the mesh has ranks, and come back when all are done.

    Args:
        run: what to train.
        report: told steps done, steps in all, and a note.
        say: told every line that a rank prints.

    Raises:
        TrainError: a rank ended before the others; says which and why. What was saved stands.
        KeyboardInterrupt: interrupted; the ranks saved a checkpoint first, if they could.
    """
    table = run.config.parallel
    size = Mesh(table.pp, table.ep, table.dp).size
    path = run.out / "ranks" / "run.json"
    run.write(path)
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(_Rank(rank, path, environment, report, say))
            for rank, environment in enumerate(_environments(size))
        ]
        _watch(ranks)


class _Rank:
    """One process, and a thread that reads what it prints."""

    def __init__(
        self,
        rank: int,
        path: Path,
        environment: dict[str, str],
        report: Report,
        say: Callable[[str], None],
    ) -> None:
        self.rank = rank
        self.last = ""
        self._report = report
        self._say = say
        self.process = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-m", "ds_train.parallel", str(path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._log = (path.parent / f"rank-{rank:05d}.log").open("w", encoding="utf-8")
        self._threads = [
            threading.Thread(target=read, args=(stream,), daemon=True)
            for read, stream in (
                (self._read, self.process.stdout),
                (self._keep, self.process.stderr),
            )
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()
        self._log.close()

    @property
    def stopped(self) -> bool:
        """Whether the process is held by a signal (Linux)."""
        try:
            status = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] == "T"

    def why(self) -> str:
        """Say how the process ended."""
        code = self.process.poll()
        if code is None:
            held = "is held by a signal and was killed" if self.stopped else "did not end"
            return f"rank {self.rank} {held}"
        if code < 0:
            return f"rank {self.rank} was ended by {signal.Signals(-code).name}"
        said = self.last or f"see {self._log.name}"
        return said if said.startswith("rank") else f"rank {self.rank}: {said}"

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            if line.startswith(PROGRESS):
                self._report(*json.loads(line.removeprefix(PROGRESS)))
            else:
                self.last = line.strip()
                self._say(self.last)

    def _keep(self, stderr: IO[str]) -> None:
        for line in stderr:
            self._log.write(line)
            self._log.flush()


def _watch(ranks: list[_Rank]) -> None:
    """Wait for all; when one ends otherwise than by being done, give the others some time."""
    asked = False
    deadline = None
    first: _Rank | None = None
    while running := [rank for rank in ranks if rank.process.poll() is None]:
        try:
            time.sleep(_LOOK_SECONDS)
        except KeyboardInterrupt:
            if asked:
                raise
            asked = True
            deadline = time.monotonic() + GRACE_SECONDS
            for rank in running:
                rank.process.send_signal(signal.SIGTERM)
        ended = [rank for rank in ranks if rank.process.poll() not in (None, DONE)]
        if ended and first is None and not asked:
            first = ended[0]
            deadline = time.monotonic() + GRACE_SECONDS
        held = first is not None and all(rank.stopped for rank in running)
        if held or (deadline is not None and time.monotonic() > deadline):
            break
    if asked:
        raise KeyboardInterrupt
    if first is not None:
        raise TrainError(_cause(ranks, first))


def _cause(ranks: list[_Rank], first: _Rank) -> str:
    """Say which rank's end was not the consequence of another's."""
    codes = {rank: rank.process.poll() for rank in ranks}
    for rank, code in codes.items():
        if code == STOPPED:
            return rank.why()
    lost = [rank for rank, code in codes.items() if code is None or code < 0]
    # TensorFlow aborts a process whose peers are gone: that is a consequence.
    lost.sort(
        key=lambda rank: (
            codes[rank] == -signal.SIGABRT,
            codes[rank] is None,
            rank is not first,
        )
    )
    if lost:
        return f"{lost[0].why()}; the same command goes on from the last checkpoint"
    wrong = [rank for rank, code in codes.items() if code == BAD_INPUT]
    others = [rank for rank, code in codes.items() if code not in (DONE, LOST)]
    return (wrong or others or [first])[0].why()


def _environments(size: int) -> list[dict[str, str]]:
    """Return each rank's environment: all addresses and its own place; its share of the machine."""
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(size)]
    threads = str(max(1, (os.cpu_count() or 1) // size))
    gpus = len(tf.config.list_physical_devices("GPU"))
    found = []
    for rank in range(size):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        environment = os.environ | {
            "TF_CONFIG": json.dumps(task),
            "OMP_NUM_THREADS": threads,
            "TF_NUM_INTRAOP_THREADS": threads,
            "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1"),
        }
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(rank % gpus)
        found.append(environment)
    return found


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
