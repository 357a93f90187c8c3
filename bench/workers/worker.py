"""What every worker does the same way: warm up, choose the fastest mode, run when told."""

from __future__ import annotations

import argparse
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.protocol import Handlers, one_line, private_stdout, serve
from bench.tasks import Precision, Task

TRIALS = 2  # runs of each mode after the first, which compiles


class Timed(NamedTuple):
    """What one run took.

    Attributes:
        seconds: wall-clock.
        tokens: worked through in that time.
    """

    seconds: float
    tokens: int


Run = Callable[[], Timed]


class Worker(ABC):
    """One system at one precision.

    Args:
        model: a Hugging Face directory, or what the system reads in its place.
        precision: of its weights and products.
        threads: for its pools.
        thorough: try every mode, not only those that are likely to be the fastest.
    """

    def __init__(self, model: Path, precision: Precision, threads: int, *, thorough: bool) -> None:
        self.model = model
        self.precision = precision
        self.threads = threads
        self.thorough = thorough
        self._run: Run | None = None

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Return the versions of what does the work."""

    @abstractmethod
    def vocab_size(self) -> int:
        """Return how many tokens the model knows."""

    @abstractmethod
    def modes(self, task: Task) -> dict[str, Callable[[], Run]]:
        """Return the ways to do a task: names, and functions that set one up; none if it can't."""

    @abstractmethod
    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the last positions' logits `[B, V]`, or log-probabilities, of ids `[B, S]`."""

    @abstractmethod
    def greedy(self, ids: np.ndarray, new: int) -> np.ndarray:
        """Return the `new` best next tokens `[B, new]` after each row of ids `[B, S]`."""

    def every_logits(self, ids: np.ndarray) -> np.ndarray:
        """Return all positions' logits `[S, V]`, or log-probabilities, of ids `[S]`."""
        raise NotImplementedError(f"{type(self).__name__} scores no text, asked for {len(ids)}")

    def score(self, ids: np.ndarray, path: str) -> None:
        """Write log-probabilities `[B, S, V]` float32 of ids `[B, S]` to a file."""
        rows = []
        for row in ids:
            logits = self.every_logits(row).astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            rows.append((logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype("f4"))
        np.save(path, np.stack(rows))

    def limits(self) -> dict[str, float]:
        """Return the best rates that this system's own kernels reach; see `bench.limits`."""
        return {}

    def first_step(self, task: Task) -> dict[str, float]:
        """Return the loss (nats) and gradient norm of a first training step, where it trains."""
        raise NotImplementedError(f"no training in {type(self).__name__}, asked for {task.key}")

    def prepare(self, task: Task) -> dict[str, Any]:
        """Warm up every mode of a task and keep the fastest.

        Returns:
            `mode`: its name, or `None` if the system can't do the task; `first_seconds`: its
            first run, compilation included; `tried`: each mode's tokens a second, or why it
            failed.
        """
        tried: dict[str, float | str] = {}
        best: tuple[float, str, float] | None = None
        self._run, setups, last = None, self.modes(task), ""
        for name, setup in setups.items():
            self._run, last = None, name  # what it holds goes before the next is made
            try:
                start = time.perf_counter()
                self._run = setup()
                self._run()
                first = time.perf_counter() - start
                speed = max(timed.tokens / timed.seconds for timed in self._trials())
            except Exception as error:  # noqa: BLE001 - a peer may raise anything; it is recorded
                tried[name] = one_line(error)
                continue
            tried[name] = speed
            if best is None or speed > best[0]:
                best = (speed, name, first)
        if best is None:
            return {"mode": None, "first_seconds": None, "tried": tried}
        if best[1] != last:
            self._run = None
            self._run = setups[best[1]]()
            self._run()
        return {"mode": best[1], "first_seconds": best[2], "tried": tried}

    def _trials(self) -> list[Timed]:
        return [self._run() for _ in range(TRIALS) if self._run]

    def run(self) -> list[float]:
        """Do the prepared task once; returns seconds and tokens."""
        if self._run is None:
            raise RuntimeError("nothing is prepared: call `prepare` first")
        return list(self._run())

    def serve(self) -> None:
        """Answer the driver until it closes the line."""
        answers = private_stdout()
        handlers: Handlers = {
            "versions": self.versions,
            "vocab_size": self.vocab_size,
            "prepare": lambda task: self.prepare(Task(**task)),
            "run": self.run,
            "logits": lambda ids: self.logits(np.array(ids, np.int32)).tolist(),
            "greedy": lambda ids, new: self.greedy(np.array(ids, np.int32), new).tolist(),
            "score": lambda ids, path: self.score(np.array(ids, np.int32), path),
            "first_step": lambda task: self.first_step(Task(**task)),
            "limits": self.limits,
        }
        serve(handlers, sys.stdin, answers)


def main(make: Callable[..., Worker], words: Sequence[str] | None = None) -> None:
    """Start a worker as the command line says and serve; one that can't load ends with a reason."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--thorough", action="store_true")
    given = parser.parse_args(words)
    make(given.model, given.precision, given.threads, thorough=given.thorough).serve()
