"""AdamW against the published formula of torch.optim.AdamW, computed in numpy float64."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from ds_train import AdamW


def torch_adamw(p, grads, lr, betas, eps, decay):
    """The algorithm box of torch.optim.AdamW's documentation, line by line."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        p = p - lr * decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat = m / (1 - betas[0] ** t)
        v_hat = v / (1 - betas[1] ** t)
        p = p - lr * m_hat / (np.sqrt(v_hat) + eps)
    return p


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_equals_torchs_formula_in_float64(betas, eps):
    rng = np.random.default_rng(0)
    start = {"matrix": rng.normal(size=(4, 3)), "norm": rng.normal(size=(5,))}
    grads = {k: [rng.normal(size=v.shape) * 1e-2 for _ in range(12)] for k, v in start.items()}
    variables = {k: keras.Variable(v, dtype="float64", name=k) for k, v in start.items()}
    optimizer = AdamW(1e-2, *betas, epsilon=eps, weight_decay=0.1)
    for step in range(12):
        optimizer.apply([tf.constant(grads[k][step]) for k in start], list(variables.values()))
    for name, decay in [("matrix", 0.1), ("norm", 0.0)]:
        want = torch_adamw(start[name], grads[name], 1e-2, betas, eps, decay)
        # The learning rate itself is a float32 variable in Keras: 1e-2 is off by 2e-8.
        np.testing.assert_allclose(variables[name].numpy(), want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_float32_update_equals_torchs_formula(compiled, scale, monkeypatch):
    if not compiled:
        monkeypatch.setattr("ds_train.optimizer.use_kernels", lambda *_: False)
    rng = np.random.default_rng(2)
    start = {"matrix": rng.normal(size=(9, 5)), "norm": rng.normal(size=(21,))}
    grads = {k: [rng.normal(size=v.shape) for _ in range(6)] for k, v in start.items()}
    variables = {k: keras.Variable(v, dtype="float32", name=k) for k, v in start.items()}
    optimizer = AdamW(1e-2, 0.9, 0.95, weight_decay=0.1)
    optimizer.build(list(variables.values()))
    apply = tf.function(lambda found: optimizer.apply(found, scale=scale), autograph=False)
    for step in range(6):
        apply([tf.constant(grads[k][step], tf.float32) for k in start])
    for name, decay in [("matrix", 0.1), ("norm", 0.0)]:
        scaled = [scale * g for g in grads[name]]
        want = torch_adamw(start[name], scaled, 1e-2, (0.9, 0.95), 1e-8, decay)
        np.testing.assert_allclose(variables[name].numpy(), want, rtol=0, atol=2e-6)


def test_epsilon_stands_after_the_bias_correction():
    # With one step and |g| << eps the two places of epsilon differ by sqrt(1 - b2): 4.5 times.
    variable = keras.Variable(np.zeros(1), dtype="float64")
    AdamW(1.0, 0.9, 0.95, epsilon=1.0).apply([tf.constant([1e-6], tf.float64)], [variable])
    np.testing.assert_allclose(variable.numpy(), [-1e-6 / (1e-6 + 1.0)], rtol=1e-9)


def test_repeated_rows_of_a_sparse_gradient_add_up():
    dense = keras.Variable(np.ones((6, 2)), dtype="float32")
    sparse = keras.Variable(np.ones((6, 2)), dtype="float32")
    slices = tf.IndexedSlices(
        values=tf.constant([[1.0, 2.0], [3.0, -4.0], [5.0, 6.0]]),
        indices=tf.constant([4, 1, 4]),
        dense_shape=tf.constant([6, 2]),
    )
    AdamW(0.1).apply([tf.convert_to_tensor(slices)], [dense])
    AdamW(0.1).apply([slices], [sparse])
    np.testing.assert_array_equal(dense.numpy(), sparse.numpy())


def test_fits_a_keras_model_and_serialises():
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    x = np.random.default_rng(1).normal(size=(64, 2)).astype("float32")
    y = x @ np.array([[2.0], [-1.0]], "float32") + 0.5
    model.compile(AdamW(0.05, weight_decay=0.0, global_clipnorm=1.0), loss="mse")
    model.fit(x, y, epochs=30, batch_size=16, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 1e-2
    again = keras.optimizers.deserialize(keras.optimizers.serialize(model.optimizer))
    assert again.get_config() == model.optimizer.get_config()


@pytest.mark.parametrize("compiled", [True, False])
def test_bfloat16_moments_are_rounded_between_steps_and_nothing_else(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("ds_train.optimizer.use_kernels", lambda *_: False)

    def small(x):
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)

    rng = np.random.default_rng(4)
    p, grads = rng.normal(size=(7, 5)), rng.normal(size=(5, 7, 5))
    variable = keras.Variable(p, dtype="float32")
    optimizer = AdamW(1e-2, 0.9, 0.95, weight_decay=0.1, moments="bfloat16")
    optimizer.build([variable])
    assert {m.dtype for m in [*optimizer.momentums, *optimizer.velocities]} == {"bfloat16"}
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        optimizer.apply([tf.constant(g, tf.float32)])
        p = p - 1e-2 * 0.1 * p
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p - 1e-2 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        m, v = small(m), small(v)
    np.testing.assert_allclose(variable.numpy(), p, rtol=0, atol=1e-4)
    np.testing.assert_allclose(small(optimizer.momentums[0].numpy()), m, rtol=2**-7, atol=1e-6)
    np.testing.assert_allclose(small(optimizer.velocities[0].numpy()), v, rtol=2**-7, atol=1e-6)
    assert AdamW.from_config(optimizer.get_config()).moments == "bfloat16"


def test_unknown_moments_are_refused():
    with pytest.raises(ValueError, match=r"moments is 'float16'.*'float32' or 'bfloat16'"):
        AdamW(moments="float16")
