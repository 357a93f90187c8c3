"""What TensorFlow's own kernels reach: large products and large reads."""

from __future__ import annotations

import time
from collections.abc import Callable

import tensorflow as tf

from bench.limits import PRODUCT, READS, best_rate


def measure() -> dict[str, float]:
    """Return GFLOP/s a dtype and GB/s a size; see `bench.limits` for the names."""
    found = {}
    for name in ("float32", "bfloat16"):
        found[f"gemm_{name}"] = best_rate(_product(tf.as_dtype(name))) / 1e9
    for size in READS:
        values = tf.ones([size // 4])
        ways = (tf.reduce_sum, tf.reduce_max)
        found[f"read_{size >> 20}mb"] = max(best_rate(_read(values, way)) for way in ways) / 1e9
    return found


def _product(dtype: tf.DType) -> Callable[[], float]:
    a = tf.cast(tf.random.normal([PRODUCT, PRODUCT]), dtype)
    b = tf.cast(tf.random.normal([PRODUCT, PRODUCT]), dtype)

    @tf.function(autograph=False)
    def run(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        return tf.matmul(a, b)

    def rate() -> float:
        start = time.perf_counter()
        run(a, b)
        return 2 * PRODUCT**3 / (time.perf_counter() - start)

    return rate


def _read(values: tf.Tensor, way: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[], float]:
    size = values.shape.num_elements() * values.dtype.size

    def rate() -> float:
        start = time.perf_counter()
        way(values)
        return size / (time.perf_counter() - start)

    return rate
