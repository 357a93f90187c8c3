"""What only a GPU can show; skipped where there is none."""

import numpy as np
import pytest
import tensorflow as tf

from ds_precision import Fp8Recipe, fp8_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="TensorFlow sees no GPU"),
]


def step(x, w):
    """The product and both gradients."""
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        y = fp8_matmul(x, w, Fp8Recipe())
        loss = tf.reduce_sum(y * y)
    return [y, *tape.gradient(loss, [x, w])]


def test_fp8_products_give_the_cpus_numbers():
    x = tf.random.stateless_normal([256, 512], seed=[1, 2])
    w = tf.random.stateless_normal([512, 256], seed=[3, 4])
    with tf.device("/cpu:0"):
        expected = step(x, w)
    with tf.device("/gpu:0"):
        found = tf.function(step, jit_compile=True)(x, w)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()


def test_xla_makes_fp8_products_of_them():
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    if details.get("compute_capability", (0, 0)) < (8, 9):
        pytest.skip(f"{details.get('device_name')} has no FP8 products")
    x, w = tf.ones([256, 512]), tf.ones([512, 256])
    with tf.device("/gpu:0"):
        program = tf.function(step, jit_compile=True).experimental_get_compiler_ir(x, w)
        assert "__cublas$lt$matmul$f8" in program(stage="optimized_hlo")
