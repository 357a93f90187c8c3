"""Time and memory of a piece of a model, measured so that the figures can be compared."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import tensorflow as tf


@dataclass(frozen=True)
class Timing:
    """How long calls took.

    Attributes:
        first: Seconds of the first call, which traces and compiles.
        seconds: Of each measured call.
    """

    first: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the middle call."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """Seconds that a quarter of the calls stay below."""
        return _quartiles(self.seconds)[0]

    @property
    def high(self) -> float:
        """Seconds that three quarters of the calls stay below."""
        return _quartiles(self.seconds)[1]

    def __str__(self) -> str:
        """Return a line for people."""
        low, middle, high, first = (
            f"{1e3 * t:.3g}" for t in (self.low, self.median, self.high, self.first)
        )
        return f"{middle} ms ({low} to {high}), the first call {first} ms"


def benchmark(
    function: Callable[..., Any], *args: Any, warmup: int = 2, repeats: int = 20
) -> Timing:
    """Time a function; what it returns is waited for, on a GPU too.

    Args:
        function: What to time, most often a `tf.function`.
        *args: What it is called with.
        warmup: Calls that are not counted, the first of them timed apart.
        repeats: Calls that are.

    Raises:
        ValueError: `warmup` or `repeats` is less than 1.
    """
    if warmup < 1 or repeats < 1:
        raise ValueError(f"warmup is {warmup} and repeats {repeats}; both must be 1 or more")

    def timed() -> float:
        begin = time.perf_counter()
        _wait_for(function(*args))
        return time.perf_counter() - begin

    first, *_ = [timed() for _ in range(warmup)]
    return Timing(first, tuple(timed() for _ in range(repeats)))


@dataclass(frozen=True)
class MemoryProfile:
    """What the process held while a function ran.

    Attributes:
        before: Bytes at first: of a GPU what TensorFlow has given out, else resident memory.
        peak: The most.
        seconds: When it was looked, from 0.
        bytes: What was held then.
    """

    before: int
    peak: int
    seconds: tuple[float, ...]
    bytes: tuple[int, ...]

    @property
    def grown(self) -> int:
        """Bytes of the peak beyond the start."""
        return self.peak - self.before


def memory_profile(function: Callable[..., Any], *args: Any, every: float = 0.002) -> MemoryProfile:
    """Watch memory while a function runs once.

    Call it once beforehand where compiling is not the question. On a CPU, what an allocator keeps
    of earlier work is reused unseen: measure the largest first, or in a fresh process.

    Args:
        function: What to watch.
        *args: What it is called with.
        every: Seconds between looks.
    """
    gpu = bool(tf.config.list_physical_devices("GPU"))
    process = psutil.Process()

    def held() -> int:
        if gpu:
            return int(tf.config.experimental.get_memory_info("GPU:0")["current"])
        return int(process.memory_info().rss)

    if gpu:
        tf.config.experimental.reset_memory_stats("GPU:0")
    done = threading.Event()
    begin, looks = time.perf_counter(), [(0.0, held())]

    def watch() -> None:
        while not done.wait(every):
            looks.append((time.perf_counter() - begin, held()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        _wait_for(function(*args))
    finally:
        done.set()
        watcher.join()
    looks.append((time.perf_counter() - begin, held()))
    seconds, sizes = zip(*looks, strict=True)
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"] if gpu else max(sizes)
    return MemoryProfile(sizes[0], int(peak), seconds, sizes)


@dataclass(frozen=True)
class Sweep:
    """Timings over values of one thing.

    Attributes:
        name: What was changed.
        values: What it was set to.
        timings: In the same order.
    """

    name: str
    values: tuple[Any, ...]
    timings: tuple[Timing, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A mapping for each value: the value by its name, `median`, `low`, `high`, `first`."""
        return [
            {
                self.name: value,
                "median": found.median,
                "low": found.low,
                "high": found.high,
                "first": found.first,
            }
            for value, found in zip(self.values, self.timings, strict=True)
        ]


def sweep(
    make: Callable[[Any], Callable[[], Any]],
    values: Mapping[str, Sequence[Any]],
    warmup: int = 2,
    repeats: int = 20,
) -> Sweep:
    """Time a function over values of one thing, in rounds, so that a slow minute hits all alike.

    Args:
        make: Returns what to call, for one value.
        values: The one thing's name and what it is set to.
        warmup: As of `benchmark`.
        repeats: As of `benchmark`.

    Raises:
        ValueError: More than one thing is to change.
    """
    if len(values) != 1:
        raise ValueError(f"values names {len(values)} things ({', '.join(values)}); give one")
    name, chosen = next(iter(values.items()))
    functions = [make(value) for value in chosen]
    firsts = [benchmark(function, warmup=warmup, repeats=1).first for function in functions]
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, found in zip(functions, seconds, strict=True):
            begin = time.perf_counter()
            _wait_for(function())
            found.append(time.perf_counter() - begin)
    timings = tuple(Timing(f, tuple(s)) for f, s in zip(firsts, seconds, strict=True))
    return Sweep(name, tuple(chosen), timings)


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) == 1:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


def _wait_for(result: Any) -> None:
    """Bring the last tensor to the host: then all before it are there."""
    tensors = [part for part in tf.nest.flatten(result) if tf.is_tensor(part)]
    if tensors:
        tensors[-1].numpy()
