import keras
import numpy as np
import tensorflow as tf

from ds_attention import RMSNorm


def test_equals_keras_layer_in_value_and_gradient():
    x = tf.random.stateless_normal([3, 4, 16], seed=[0, 1]) * 5
    ours, theirs = RMSNorm(1e-6), keras.layers.RMSNormalization(epsilon=1e-6)
    weight = np.linspace(-1, 2, 16, dtype=np.float32)
    for layer in (ours, theirs):
        layer.build(x.shape)
        layer.set_weights([weight])

    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        a, b = ours(x), theirs(x)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tape.gradient(a, x), tape.gradient(b, x), rtol=1e-4, atol=1e-5)


def test_epsilon_decides_what_tiny_inputs_become():
    x = tf.fill([1, 4], 1e-3)

    np.testing.assert_allclose(RMSNorm(1e-6)(x), np.full((1, 4), 2**-0.5), rtol=1e-5)


def test_bfloat16_is_normalised_in_float32():
    x = tf.random.stateless_normal([2, 256], seed=[2, 3])
    low = tf.cast(x, tf.bfloat16)
    y = RMSNorm(dtype="mixed_bfloat16")(low)

    assert y.dtype == tf.bfloat16
    exact = RMSNorm()(tf.cast(low, tf.float32))
    np.testing.assert_array_equal(
        tf.cast(y, tf.float32), tf.cast(tf.cast(exact, tf.bfloat16), tf.float32)
    )


def test_comes_back_from_its_config():
    layer = RMSNorm(0.25, name="norm")
    again = RMSNorm.from_config(layer.get_config())

    x = tf.constant([[3.0, 4.0]])
    np.testing.assert_array_equal(again(x), layer(x))
    assert layer.compute_output_shape((None, 2)) == (None, 2)
