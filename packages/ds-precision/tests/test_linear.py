import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_precision import Linear, matmul


@settings(deadline=None, max_examples=30)
@given(
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    inner=st.integers(1, 9),
    outer=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_matmul_is_numpys_product_over_the_last_axis(leading, inner, outer, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(*leading, inner)), rng.normal(size=(inner, outer))

    y = matmul(tf.constant(x), tf.constant(w))
    np.testing.assert_allclose(y, x @ w, rtol=1e-12, atol=1e-14)


def test_matmul_keeps_unknown_sizes_unknown_and_known_ones_known():
    w = tf.ones([3, 5])
    traced = tf.function(lambda x: matmul(x, w)).get_concrete_function(
        tf.TensorSpec([None, 7, 3], tf.float32)
    )

    assert traced.output_shapes.as_list() == [None, 7, 5]


@pytest.mark.parametrize("use_bias", [False, True])
def test_linear_equals_keras_dense_in_value_and_gradient(use_bias):
    x = tf.random.stateless_normal([2, 3, 6], seed=[1, 2])
    ours, theirs = Linear(4, use_bias=use_bias), keras.layers.Dense(4, use_bias=use_bias)
    ours.build((None, 6))
    theirs.build((None, 6))
    theirs.set_weights([w + 0.1 for w in ours.get_weights()])
    ours.set_weights(theirs.get_weights())

    with tf.GradientTape(persistent=True) as tape:
        a, b = tf.reduce_sum(ours(x) ** 2), tf.reduce_sum(theirs(x) ** 2)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for mine, other in zip(ours.trainable_weights, theirs.trainable_weights, strict=True):
        np.testing.assert_allclose(
            tape.gradient(a, mine.value), tape.gradient(b, other.value), rtol=1e-5
        )


def test_linear_computes_in_the_policys_type_and_keeps_float32_weights():
    layer = Linear(3, use_bias=True, dtype="mixed_bfloat16")
    x = tf.random.stateless_normal([5, 8], seed=[3, 4])
    y = layer(x)

    assert y.dtype == tf.bfloat16
    assert layer.kernel.dtype == "float32"
    small_x, small_w = (tf.cast(part, tf.bfloat16) for part in (x, layer.kernel.value))
    exact = tf.cast(small_x, tf.float64) @ tf.cast(small_w, tf.float64)
    # Where the processor has no bfloat16, TensorFlow's own product rounds sums on the way.
    np.testing.assert_allclose(tf.cast(y, tf.float32), exact, rtol=2**-6, atol=1e-4)


def test_linear_comes_back_from_its_config():
    layer = Linear(3, use_bias=True, initializer_range=0.5, name="gate")
    again = Linear.from_config(layer.get_config())
    layer.build((None, 2))
    again.build((None, 2))
    again.set_weights(layer.get_weights())

    x = tf.ones([1, 2])
    np.testing.assert_array_equal(layer(x), again(x))
    assert again.name == "gate"
    assert layer.compute_output_shape((None, 4, 2)) == (None, 4, 3)
