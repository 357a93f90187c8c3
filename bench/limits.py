"""What the machine can do at best, measured in the same run: products and reads.

Names: `gemm_float32`, `gemm_bfloat16` in GFLOP/s; `read_1024mb`, `read_100mb` in GB/s. Each is the
best of what the systems' own kernels reach, TensorFlow's and torch's, with all threads: a limit
that is too low would flatter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

PRODUCT = 2048  # rows and columns of the square product
READS = (1 << 30, 100 << 20)  # bytes; the larger is past every cache, and is what decoding meets
WARM_UP, TRIES = 2, 12


def best_rate(rate: Callable[[], float]) -> float:
    """Return the highest rate of several tries."""
    for _ in range(WARM_UP):
        rate()
    return max(rate() for _ in range(TRIES))


def combine(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return each limit's highest value over the systems and times that measured it."""
    best: dict[str, float] = {}
    for limits in found:
        for name, value in limits.items():
            best[name] = max(value, best.get(name, 0.0))
    return best
