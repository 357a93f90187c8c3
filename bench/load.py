"""Who used the processors: the workers, or somebody else. Reads Linux's /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


class OtherLoad:
    """The processors' time that strangers took since this was made.

    Args:
        sessions: of the workers, whose time is not a stranger's; nor is this process's.
    """

    def __init__(self, sessions: Iterable[int]) -> None:
        self._sessions = set(sessions)
        self._start = time.monotonic()
        self._all, self._ours = busy_seconds(), self._used()

    def share(self) -> float:
        """Return their share of all processors' time, from 0 to 1."""
        wall = (time.monotonic() - self._start) * (os.cpu_count() or 1)
        others = busy_seconds() - self._all - (self._used() - self._ours)
        return round(max(0.0, others) / wall, 3)

    def _used(self) -> float:
        return session_seconds(self._sessions) + time.process_time()


def busy_seconds() -> float:
    """Return how long all processors have worked since the machine started."""
    return parse_busy(Path("/proc/stat").read_text(encoding="ascii"))


def parse_busy(stat: str) -> float:
    """Return the seconds that /proc/stat counts as work, stolen time included."""
    user, nice, system, _idle, _wait, irq, soft_irq, steal = map(int, stat.split()[1:9])
    return (user + nice + system + irq + soft_irq + steal) / TICKS


def session_seconds(sessions: Iterable[int]) -> float:
    """Return the processors' time of all processes of some sessions, ended children included."""
    wanted = set(sessions)
    total = 0.0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            session, seconds = parse_process((entry / "stat").read_text(encoding="utf-8"))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if session in wanted:
            total += seconds
    return total


def parse_process(stat: str) -> tuple[int, float]:
    """Return the session of a process and its seconds of work, from its /proc/PID/stat."""
    fields = stat.rpartition(")")[2].split()  # the name in brackets may hold anything
    session = int(fields[3])
    user, system, children_user, children_system = map(int, fields[11:15])
    return session, (user + system + children_user + children_system) / TICKS
