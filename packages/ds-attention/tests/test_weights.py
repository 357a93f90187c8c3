"""Attention's weights are those that the layer's own output is made with."""

import numpy as np
import pytest
import tensorflow as tf

from ds_attention import AttentionConfig, MultiHeadLatentAttention, YarnConfig, attention_weights

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 3,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "initializer_range": 0.4,
}
YARN = YarnConfig(8.0, 16, mscale=1.0, mscale_all_dim=0.7)


@pytest.mark.parametrize("q_lora_rank", [None, 10])
@pytest.mark.parametrize("yarn", [None, YARN])
@pytest.mark.parametrize("interleave", [True, False])
def test_weights_times_values_are_the_output(q_lora_rank, yarn, interleave):
    config = AttentionConfig(
        **SIZES, q_lora_rank=q_lora_rank, rope_scaling=yarn, rope_interleave=interleave
    )
    layer = MultiHeadLatentAttention(config)
    x = tf.random.stateless_normal([2, 9, 32], seed=(0, 1))
    positions = tf.range(5, 14)[None]
    expected = layer(x, positions)
    weights = attention_weights(layer, x, positions)
    latent = layer.kv_a_layernorm(layer.kv_a_proj_with_mqa(x)[..., :12])
    values = tf.reshape(layer.kv_b_proj(latent), [2, 9, 3, 14])[..., 8:]
    out = tf.reshape(tf.einsum("bhsl,blhv->bshv", weights, values), [2, 9, 18])
    np.testing.assert_allclose(layer.o_proj(out), expected, rtol=1e-4, atol=1e-5)


def test_rows_sum_to_one_and_see_no_future():
    layer = MultiHeadLatentAttention(AttentionConfig(**SIZES))
    x = tf.random.stateless_normal([1, 7, 32], seed=(0, 2))
    layer(x)
    weights = attention_weights(layer, x).numpy()
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-6)
    assert (weights[..., np.triu_indices(7, 1)[0], np.triu_indices(7, 1)[1]] == 0).all()
    assert weights.dtype == np.float32
