import keras
import numpy as np
import pytest
import tensorflow as tf

from ds_attention import MultiHeadAttention


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_equals_keras_grouped_query_attention(key_heads):
    x = tf.random.stateless_normal([2, 7, 24], seed=[0, 1])
    ours = MultiHeadAttention(4, 6, key_heads, rope_theta=None, initializer_range=0.3)
    theirs = keras.layers.GroupQueryAttention(6, 4, key_heads, use_bias=False)
    ours.build(x.shape)
    theirs.build(x.shape, x.shape)
    q, k, v, o = (w.numpy() for w in ours.weights)
    theirs.set_weights(
        [
            q.reshape(24, 4, 6),
            k.reshape(24, key_heads, 6),
            v.reshape(24, key_heads, 6),
            o.reshape(4, 6, 24),
        ]
    )

    np.testing.assert_allclose(ours(x), theirs(x, x, use_causal_mask=True), atol=2e-6)
    assert ours.cache_width == 2 * key_heads * 6


def test_rope_makes_order_matter_and_absolute_place_not():
    layer = MultiHeadAttention(2, 8, initializer_range=0.5)
    x = tf.random.stateless_normal([1, 5, 12], seed=[2, 3])
    swapped = tf.gather(x, [1, 0, 2, 3, 4], axis=1)

    last = layer(x)[:, -1]
    assert np.abs(last - layer(swapped)[:, -1]).max() > 1e-3
    moved = layer(x, positions=tf.range(40, 45)[None])
    np.testing.assert_allclose(moved[:, -1], last, atol=1e-5)


def test_the_mask_hides_what_it_says():
    layer = MultiHeadAttention(2, 8, initializer_range=0.5)
    x = tf.random.stateless_normal([1, 4, 12], seed=[4, 5])
    allowed = tf.constant([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]]) > 0
    other = tf.concat([x[:, :1], -x[:, 1:2], x[:, 2:]], axis=1)

    a, b = layer(x, attention_mask=allowed), layer(other, attention_mask=allowed)
    np.testing.assert_array_equal(a[:, 2:], b[:, 2:])


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"num_key_value_heads is 3.*\(4\)"):
        MultiHeadAttention(4, 8, 3)


def test_comes_back_from_its_config():
    layer = MultiHeadAttention(4, 6, 2, rope_theta=500.0)
    again = MultiHeadAttention.from_config(layer.get_config())
    x = tf.random.stateless_normal([1, 3, 8], seed=[6, 7])
    layer(x)
    again(x)
    again.set_weights(layer.get_weights())

    np.testing.assert_array_equal(layer(x), again(x))
