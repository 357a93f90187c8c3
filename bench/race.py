"""Runs of one task in turn: us and a peer, one right after the other, pair by pair."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from bench.load import OtherLoad, session_seconds
from bench.process import Process, WorkerError
from bench.ratios import pair_order

# Seconds between runs. Some pools spin for a while after their work: with 0.3 the waiting workers
# took 16% of a processor while short prompts were read, with this 1%.
SETTLE = 1.5


class Race:
    """The runs of one task, with what others did meanwhile.

    Args:
        workers: by name, all prepared for the task.
        first: whom the others are paired with.
        able: those that take part; without `first`, the others run alone.

    Attributes:
        runs: each system's tokens a second, run by run.
        pairs: for each peer, the speeds of `first` and of the peer, pair by pair.
        failed: why those failed that did; they take part no longer.
        others: what strangers took of the processors.
    """

    def __init__(self, workers: Mapping[str, Process], first: str, able: Sequence[str]) -> None:
        self._workers, self._first = workers, first
        self._alone = [] if first in able and len(able) > 1 else list(able)
        self._peers = [] if self._alone else [name for name in able if name != first]
        self.runs: dict[str, list[float]] = {name: [] for name in able}
        self.pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in self._peers}
        self.failed: dict[str, str] = {}
        self.others = OtherLoad(process.session for process in workers.values())
        self._start, self._idle = time.monotonic(), 0.0

    def round(self, index: int) -> None:
        """Do one pair with each peer, or one run each where there is nobody to pair with."""
        for name in self._alone:
            self._run(name)
        for peer, we_first in pair_order(index, self._peers):
            if self.failed.keys() & {self._first, peer}:
                continue
            order = (self._first, peer) if we_first else (peer, self._first)
            speeds = {name: self._run(name) for name in order}
            ours, theirs = speeds[self._first], speeds[peer]
            if ours is not None and theirs is not None:
                self.pairs[peer].append((ours, theirs))

    def idle_share(self) -> float:
        """Return what the waiting workers took, as a share of one processor."""
        return round(self._idle / (time.monotonic() - self._start), 3)

    def _run(self, name: str) -> float | None:
        if name in self.failed:
            return None
        resting = [process.session for other, process in self._workers.items() if other != name]
        before = session_seconds(resting)
        try:
            seconds, tokens = self._workers[name].ask("run")
        except WorkerError as error:
            self.failed[name] = str(error)
            return None
        self._idle += session_seconds(resting) - before
        speed = float(tokens / seconds)
        self.runs[name].append(speed)
        time.sleep(SETTLE)
        return speed
