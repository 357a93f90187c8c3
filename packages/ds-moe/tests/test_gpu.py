"""What only a GPU can show; skipped where there is none."""

import numpy as np
import pytest
import tensorflow as tf

from ds_moe import MixtureOfExperts, MoEConfig

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
