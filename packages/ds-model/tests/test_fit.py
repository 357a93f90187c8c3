import keras
import numpy as np
import pytest
import tensorflow as tf

from ds_model import CausalLM, ModelConfig

TINY = ModelConfig.preset("tiny")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def made(**kwargs) -> CausalLM:
    keras.utils.set_random_seed(1)
    return CausalLM(TINY, **kwargs)


def data(rows: int = 8, length: int = 16) -> tuple[np.ndarray, np.ndarray]:
    text = (np.arange(length + 1) * 3 + np.arange(rows)[:, None]) % 17
    return text[:, :-1], text[:, 1:]


def by_hand(model: CausalLM, steps: int) -> list[float]:
    """Plain gradient descent without Keras' loop."""
    x, y = data()
    losses = []
    weights = [w for w in model.trainable_weights if "mtp" not in w.path]
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x))
        for w, g in zip(weights, tape.gradient(loss, weights), strict=True):
            w.assign_sub(0.5 * tf.convert_to_tensor(g))
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("jit", [False, True, "auto"])
def test_fit_is_gradient_descent_on_the_loss(jit):
    model = made(bias_update_speed=0.0)
    model.compile(keras.optimizers.SGD(0.5), LOSS, jit_compile=jit)
    history = model.fit(*data(), epochs=3, batch_size=8, shuffle=False, verbose=0)

    expected = by_hand(made(bias_update_speed=0.0), 3)
    np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-4)
    assert model.jit_compile is (jit is True)


def test_fit_moves_the_biases_once_a_step_against_the_load():
    model = made(bias_update_speed=0.125)
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(0.0), LOSS)
    load = model.forward(data()[0]).routings[0].load.numpy()
    model.fit(*data(), epochs=1, batch_size=8, verbose=0)

    bias = model.moe_layers[0].gate.e_score_correction_bias.numpy()
    np.testing.assert_array_equal(bias, 0.125 * np.sign(load.mean() - load))
    # The rest stood still: the learning rate is zero.
    others = [i for i, w in enumerate(model.weights) if w.trainable]
    for i in others:
        np.testing.assert_array_equal(before[i], model.get_weights()[i])


def test_accumulated_micro_batches_balance_once_on_their_sum():
    model = made(bias_update_speed=0.125)
    model.compile(keras.optimizers.SGD(0.0, gradient_accumulation_steps=4), LOSS)
    load = model.forward(data()[0]).routings[0].load.numpy()
    model.fit(*data(), epochs=1, batch_size=2, shuffle=False, verbose=0)  # four micro-batches

    bias = model.moe_layers[0].gate.e_score_correction_bias.numpy()
    np.testing.assert_array_equal(bias, 0.125 * np.sign(load.mean() - load))
    model.fit(*data(), epochs=1, batch_size=2, shuffle=False, verbose=0)
    again = model.moe_layers[0].gate.e_score_correction_bias.numpy()
    assert set(np.abs(again - bias)) <= {np.float32(0), np.float32(0.125)}


def test_fit_takes_padded_batches_metrics_and_callbacks(tmp_path):
    model = made()
    x, y = data()
    mask = np.ones_like(x)
    mask[:, 12:] = 0
    model.compile(
        keras.optimizers.AdamW(3e-3), LOSS, weighted_metrics=["sparse_categorical_accuracy"]
    )
    history = model.fit(
        {"input_ids": x, "attention_mask": mask},
        y,
        sample_weight=mask.astype(np.float32),
        epochs=30,
        verbose=0,
        callbacks=[keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="loss")],
    )

    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]
    assert history.history["sparse_categorical_accuracy"][-1] > 0.9
    again = keras.models.load_model(tmp_path / "best.keras")
    assert again.optimizer.iterations == model.optimizer.iterations
    again.fit({"input_ids": x, "attention_mask": mask}, y, epochs=1, verbose=0)


def test_fit_in_bfloat16_learns():
    model = made(dtype="mixed_bfloat16")
    model.compile(keras.optimizers.AdamW(3e-3), LOSS)
    losses = model.fit(*data(), epochs=20, verbose=0).history["loss"]

    assert losses[-1] < 0.6 * losses[0]


def test_mtp_modules_are_left_alone():
    model = made()
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), LOSS)
    before = [w.numpy() for w in model.mtp[0].weights]
    model.fit(*data(), epochs=2, verbose=0)

    for a, b in zip(before, model.mtp[0].weights, strict=True):
        np.testing.assert_array_equal(a, b)
