"""Experts whose weights' gradients wait: the same outputs and gradients as `run_experts`."""

import numpy as np
import pytest
import tensorflow as tf

from ds_moe import MixtureOfExperts, MoEConfig
from ds_precision import WeightGradients, defer_weight_gradients


@pytest.mark.parametrize("compiled", ["on", "off"])
@pytest.mark.parametrize(
    ("n_shared_experts", "chosen", "dtype"),
    [(0, 2, "float32"), (1, 2, "float32"), (1, 1, "float32"), (1, 2, "mixed_bfloat16")],
)
def test_the_same_gradients_in_two_halves(monkeypatch, n_shared_experts, chosen, dtype, compiled):
    monkeypatch.setenv("DS_PRECISION_KERNELS", compiled)
    layer = MixtureOfExperts(
        MoEConfig(
            hidden_size=12,
            moe_intermediate_size=8,
            n_routed_experts=6,
            num_experts_per_tok=chosen,
            n_shared_experts=n_shared_experts,
            initializer_range=0.4,
        ),
        dtype=dtype,
    )
    layer.build((None, None, 12))
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 5, 12)), layer.compute_dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.02, "atol": 0.1}

    def loss_of(x):
        y, routing = layer(x)
        return tf.reduce_sum(tf.cast(y, tf.float32) ** 2) + tf.reduce_sum(routing.scores**2)

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
    assert float(again) == pytest.approx(float(loss), rel=close["rtol"] / 10)
    found_x, *none = tape.gradient(again, [x, *weights])
    assert none == [None] * len(weights)  # all of them wait
    np.testing.assert_allclose(tf.cast(found_x, tf.float32), tf.cast(want_x, tf.float32), **close)
    found = {id(weight): gradient for weight, gradient in later.compute()}
    for weight, gradient in zip(weights, want, strict=True):
        np.testing.assert_allclose(found[id(weight)], gradient, **close)
