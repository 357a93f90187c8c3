"""Experts whose weights' gradients wait: the same outputs and gradients as `run_experts`."""

import numpy as np
import pytest
import tensorflow as tf

from ds_moe import MixtureOfExperts, MoEConfig
from ds_precision import WeightGradients, defer_weight_gradients


@pytest.mark.parametrize("n_shared_experts", [0, 1])
def test_the_same_gradients_in_two_halves(n_shared_experts):
    layer = MixtureOfExperts(
        MoEConfig(
            hidden_size=12,
            moe_intermediate_size=8,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_shared_experts=n_shared_experts,
            initializer_range=0.4,
        )
    )
    layer.build((None, None, 12))
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 5, 12)), tf.float32)

    def loss_of(x):
        y, routing = layer(x)
        return tf.reduce_sum(y**2) + tf.reduce_sum(routing.scores**2)

    weights = layer.trainable_variables
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = loss_of(x)
    want_x, *want = tape.gradient(loss, [x, *weights])

    later = WeightGradients()
    with tf.GradientTape() as tape:
        tape.watch(x)
        with defer_weight_gradients(later):
            again = loss_of(x)
    assert float(again) == pytest.approx(float(loss), rel=1e-5)
    found_x, *none = tape.gradient(again, [x, *weights])
    assert none == [None] * len(weights)  # all of them wait
    np.testing.assert_allclose(found_x, want_x, rtol=1e-4, atol=1e-4)
    found = {id(weight): gradient for weight, gradient in later.compute()}
    for weight, gradient in zip(weights, want, strict=True):
        np.testing.assert_allclose(found[id(weight)], gradient, rtol=1e-4, atol=1e-4)
