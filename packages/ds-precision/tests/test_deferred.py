"""Weights' gradients that wait are those that do not."""

import numpy as np
import pytest
import tensorflow as tf

from ds_precision import (
    Linear,
    WeightGradients,
    defer_weight_gradients,
    deferred_weight_gradients,
)


def two_layers(dtype):
    layers = [Linear(12, use_bias=True, dtype=dtype), Linear(5, dtype=dtype)]
    layers[0].build((None, 8))
    layers[1].build((None, 12))
    return layers


def loss_of(layers, x):
    return tf.reduce_sum(tf.cast(layers[1](tf.nn.silu(layers[0](x))), tf.float32) ** 2)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_they_are_the_gradients(dtype, compiled):
    layers = two_layers(dtype)
    x = tf.constant(np.random.default_rng(0).normal(size=(3, 4, 8)), layers[0].compute_dtype)
    kernels, bias = [layer.kernel for layer in layers], layers[0].bias
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = loss_of(layers, x)
    want = tape.gradient(loss, [x, bias, *kernels])

    def halves(x):
        later = WeightGradients()
        with tf.GradientTape() as tape:
            tape.watch(x)
            with defer_weight_gradients(later):
                loss = loss_of(layers, x)
        dx, dbias, *none = tape.gradient(loss, [x, bias, *kernels])
        assert none == [None, None]
        found = later.compute()
        assert later.compute() == []  # each once
        assert [id(weight) for weight, _ in found] == [id(kernels[1]), id(kernels[0])]
        return dx, dbias, found[1][1], found[0][1]

    found = (tf.function(halves, autograph=False) if compiled else halves)(x)
    for ours, theirs in zip(found, want, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(
            tf.cast(ours, tf.float32), tf.cast(theirs, tf.float32), rtol=1e-5, atol=1e-5
        )


def test_outside_nothing_waits():
    assert deferred_weight_gradients() is None
    later = WeightGradients()
    with defer_weight_gradients(later):
        assert deferred_weight_gradients() is later
    assert deferred_weight_gradients() is None


def test_a_weight_used_twice_is_there_twice():
    layer = Linear(4, dtype="float32")
    layer.build((None, 4))
    x = tf.constant(np.random.default_rng(1).normal(size=(3, 4)), tf.float32)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(layer(x)) ** 2)
    want = tape.gradient(loss, layer.kernel)
    later = WeightGradients()
    with tf.GradientTape() as tape, defer_weight_gradients(later):
        tape.watch(x)
        loss = tf.reduce_sum(layer(layer(x)) ** 2)
    tape.gradient(loss, x)
    found = [gradient for _, gradient in later.compute()]
    assert len(found) == 2
    np.testing.assert_allclose(tf.add_n(found), want, rtol=1e-5)
