"""What only a GPU can show; skipped where there is none."""

import numpy as np
import pytest
import tensorflow as tf

from ds_attention import AttentionConfig, MultiHeadLatentAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="TensorFlow sees no GPU"),
]


@pytest.mark.parametrize("jit", [False, True])
def test_attention_gives_the_cpus_numbers(jit):
    config = AttentionConfig(256, 4, 64, 32, 16, 32, q_lora_rank=96, initializer_range=0.1)
    x = tf.random.stateless_normal([2, 64, 256], seed=[1, 2])
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with tf.device("/cpu:0"):
        layer = MultiHeadLatentAttention(config)
        expected = layer(x).numpy()
    with tf.device("/gpu:0"):
        ours = tf.function(layer, jit_compile=jit)(x).numpy()

    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
