"""What only a GPU can show; skipped where there is none."""

import numpy as np
import pytest
import tensorflow as tf

from ds_moe import MixtureOfExperts, MoEConfig
from ds_moe.fp8_experts import fp8_experts
from ds_precision import Fp8Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="TensorFlow sees no GPU"),
]


@pytest.mark.parametrize("jit", [False, True])
def test_experts_give_the_cpus_numbers(jit):
    layer = MixtureOfExperts(MoEConfig(128, 64, 16, 4, n_group=4, topk_group=2))
    x = tf.random.stateless_normal([2, 64, 128], seed=[1, 2])
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with tf.device("/cpu:0"):
        expected, routing = layer(x)
    with tf.device("/gpu:0"):
        ours, other = tf.function(layer, jit_compile=jit)(x)

    np.testing.assert_array_equal(np.sort(other.indices, -1), np.sort(routing.indices, -1))
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def fp8_step(x, indices, gates, gate_up, down):
    """The experts' sum and all four gradients."""
    given = [x, gates, gate_up, down]
    with tf.GradientTape() as tape:
        tape.watch(given)
        y = fp8_experts(x, indices, gates, gate_up, down, Fp8Recipe())
        loss = tf.reduce_sum(y * y)
    return [y, *tape.gradient(loss, given)]


def fp8_operands():
    """1,024 assignments for 4 experts of 256 to 2 x 128."""
    shapes = (512, 256), (512, 2), (4, 256, 256), (4, 128, 256)
    x, gates, gate_up, down = (
        tf.random.stateless_normal(shape, seed=[1, number], stddev=stddev)
        for number, (shape, stddev) in enumerate(zip(shapes, (1, 1, 0.06, 0.09), strict=True))
    )
    indices = tf.random.stateless_uniform([512, 1], [1, 4], maxval=3, dtype=tf.int32)
    return x, tf.concat([indices, (indices + 1) % 3], axis=1), gates, gate_up, down


def test_fp8_experts_give_the_cpus_numbers():
    operands = fp8_operands()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with tf.device("/cpu:0"):
        expected = fp8_step(*operands)
    with tf.device("/gpu:0"):
        found = tf.function(fp8_step, jit_compile=True)(*operands)
    for ours, theirs in zip(found, map(tf.convert_to_tensor, expected), strict=True):
        difference, most = np.abs(ours - theirs), np.abs(theirs).max()
        # Another order of a sum sends few numbers to the next code of E4M3.
        assert np.quantile(difference, 0.95) < 1e-3 * most
        assert difference.max() < 0.07 * most


def test_xla_makes_fp8_products_of_experts():
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    if details.get("compute_capability", (0, 0)) < (8, 9):
        pytest.skip(f"{details.get('device_name')} has no FP8 products")
    operands = fp8_operands()
    with tf.device("/gpu:0"):
        program = tf.function(fp8_step, jit_compile=True).experimental_get_compiler_ir(*operands)
        assert "__cublas$lt$matmul$f8" in program(stage="optimized_hlo")
