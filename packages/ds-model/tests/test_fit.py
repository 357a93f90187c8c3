import keras
import numpy as np
import pytest
import tensorflow as tf

from ds_model import CausalLM, ModelConfig

# Four experts and no more than it takes: the graph of a training step is slow to trace.
TINY = ModelConfig.preset("tiny").replace(
    n_routed_experts=4, n_group=2, topk_group=1, vocab_size=32, num_nextn_predict_layers=0
)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def made(config: ModelConfig = TINY, **kwargs) -> CausalLM:
    keras.utils.set_random_seed(1)
    return CausalLM(config, **kwargs)


def data(rows: int = 8, length: int = 16) -> tuple[np.ndarray, np.ndarray]:
    text = (np.arange(length + 1) * 3 + np.arange(rows)[:, None]) % 17
    return text[:, :-1], text[:, 1:]


def by_hand(model: CausalLM, steps: int) -> list[float]:
    """Plain gradient descent without Keras' loop."""
    x, y = data()
    losses = []
    weights = model.trainable_weights
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x))
        for w, g in zip(weights, tape.gradient(loss, weights), strict=True):
            w.assign_sub(0.5 * tf.convert_to_tensor(g))
        losses.append(float(loss))
    return losses


def test_keras_is_not_left_to_choose_xla():
    model = made()
    model.compile("sgd", LOSS)

    assert model.jit_compile is False


@pytest.mark.parametrize("jit", [False, True])
def test_fit_is_gradient_descent_on_the_loss(jit):
    model = made(bias_update_speed=0.0)
    model.compile(keras.optimizers.SGD(0.5), LOSS, jit_compile=jit)
    history = model.fit(*data(), epochs=3, batch_size=8, shuffle=False, verbose=0)

    expected = by_hand(made(bias_update_speed=0.0), 3)
    np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-4)
    assert model.jit_compile is jit


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
    inputs = {"input_ids": x, "attention_mask": mask}
    weight = mask.astype(np.float32)
    history = model.fit(inputs, y, sample_weight=weight, epochs=30, verbose=0)
    keep = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="loss")
    model.fit(inputs, y, sample_weight=weight, epochs=1, verbose=0, callbacks=[keep])

    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]
    assert history.history["sparse_categorical_accuracy"][-1] > 0.9
    again = keras.models.load_model(tmp_path / "best.keras")
    assert again.optimizer.iterations == model.optimizer.iterations
    for a, b in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_fit_in_bfloat16_learns():
    model = made(dtype="mixed_bfloat16")
    model.compile(keras.optimizers.AdamW(3e-3), LOSS)
    losses = model.fit(*data(), epochs=20, verbose=0).history["loss"]

    assert losses[-1] < 0.6 * losses[0]


def test_mtp_modules_are_left_alone():
    model = made(TINY.replace(num_nextn_predict_layers=1))
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), LOSS)
    before = [w.numpy() for w in model.mtp[0].weights]
    model.fit(*data(), epochs=2, verbose=0)

    for a, b in zip(before, model.mtp[0].weights, strict=True):
        np.testing.assert_array_equal(a, b)
