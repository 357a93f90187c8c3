"""One optimizer step: accumulation, clipping, bias update."""

import numpy as np
import pytest
import tensorflow as tf

from conftest import tables
from ds_model import CausalLM
from ds_train import AdamW, TrainConfig
from ds_train.step import TrainStep, clip_scale

STOCK = [
    "ds_attention.mla",
    "ds_attention.rms_norm",
    "ds_moe.experts",
    "ds_moe.swiglu",
    "ds_precision.linear",
    "ds_train.losses",
    "ds_train.optimizer",
    "ds_train.step",
]


def step_of(**changes):
    config = TrainConfig.from_dict(tables(**changes))
    tf.keras.utils.set_random_seed(0)
    model = CausalLM(config.model.build())
    optimizer = AdamW(config.learning_rate())
    return model, TrainStep(model, optimizer, config)


@pytest.fixture(scope="module")
def batch():
    return np.random.default_rng(3).integers(0, 300, (4, 17)).astype(np.int32)


@pytest.fixture(scope="module")
def whole(batch):
    model, step = step_of()
    return model, step.compiled(tf.constant(batch[None]))


def test_micro_batches_give_the_step_of_the_whole_batch(batch, whole):
    model, output = whole
    split_model, step = step_of()
    split = step.replica_step(tf.constant(batch.reshape(4, 1, 17)))
    np.testing.assert_array_equal(split.loads, output.loads)
    for name in ("loss", "cross_entropy", "mtp_cross_entropy", "gradient_norm"):
        assert float(split.scalars[name]) == pytest.approx(float(output.scalars[name]), rel=1e-5)
    # The biases move once, by gamma and the sign of the summed loads: exactly the same.
    for ours, theirs in zip(split_model.moe_layers, model.moe_layers, strict=True):
        bias = ours.gate.e_score_correction_bias.numpy()
        np.testing.assert_array_equal(bias, theirs.gate.e_score_correction_bias.numpy())


def test_biases_move_by_gamma_towards_an_even_load(whole):
    model, output = whole
    for layer, load in zip(model.moe_layers, output.loads.numpy(), strict=True):
        want = np.float32(1e-3) * np.sign(load.mean() - load)
        np.testing.assert_array_equal(layer.gate.e_score_correction_bias.numpy(), want)
    assert output.loads.numpy().sum() == 4 * 16 * 2 + 4 * 15 * 2  # main layer, MTP at depth 1


def test_biases_stand_still_late_in_the_run(batch):
    model, step = step_of(loss={"bias_update_until": 0.0})
    step.replica_step(tf.constant(batch[None]))
    for layer in model.moe_layers:
        assert not layer.gate.e_score_correction_bias.numpy().any()


def test_two_replicas_take_the_step_of_one(batch, whole):
    model, output = whole
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        mirrored, step = step_of()
    halves = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(np.split(batch, 2)[context.replica_id_in_sync_group][None])
    )
    run = tf.function(lambda tokens: strategy.run(step.replica_step, (tokens,)), autograph=False)
    found = run(halves)
    for loads in strategy.experimental_local_results(found.loads):
        np.testing.assert_array_equal(loads, output.loads)
    for norm in strategy.experimental_local_results(found.scalars["gradient_norm"]):
        assert float(norm) == pytest.approx(float(output.scalars["gradient_norm"]), rel=1e-5)
    for ours, theirs in zip(mirrored.moe_layers, model.moe_layers, strict=True):
        bias = ours.gate.e_score_correction_bias.numpy()
        np.testing.assert_array_equal(bias, theirs.gate.e_score_correction_bias.numpy())
    # Adam divides a gradient by its own size: rounding in a tiny one may turn it by up to 2 lr.
    apart = [
        np.abs(ours.numpy() - theirs.numpy()).mean()
        for ours, theirs in zip(mirrored.variables, model.variables, strict=True)
    ]
    assert max(apart) < 1e-6


def test_clipping_is_torchs():
    # torch.nn.utils.clip_grad_norm_: scale = max_norm / (norm + 1e-6), never above 1.
    gradients = [tf.constant([3.0, 0.0]), tf.constant([[4.0]])]
    scale, norm = clip_scale(gradients, 1.0)
    assert float(norm) == 5.0
    assert float(scale) == pytest.approx(1.0 / (5.0 + 1e-6), rel=1e-6)
    assert float(clip_scale(gradients, 10.0)[0]) == 1.0
    # A sum over four micro-batches: their mean's norm is 1.25.
    scale, norm = clip_scale(gradients, 1.0, share=0.25)
    assert float(norm) == 1.25
    assert float(scale) == pytest.approx(0.25 / (1.25 + 1e-6), rel=1e-6)


def test_compiled_and_stock_operations_take_the_same_step(batch, whole, monkeypatch):
    # The setting is read once a process: what the modules ask is answered instead.
    for module in STOCK:
        monkeypatch.setattr(f"{module}.use_kernels", lambda *_: False)
    model, output = whole
    stock_model, step = step_of()
    stock = step.compiled(tf.constant(batch[None]))
    np.testing.assert_array_equal(stock.loads, output.loads)
    for name, value in stock.scalars.items():
        assert float(value) == pytest.approx(float(output.scalars[name]), rel=1e-5)
    apart = [
        np.abs(ours.numpy() - theirs.numpy()).mean()
        for ours, theirs in zip(stock_model.variables, model.variables, strict=True)
    ]
    assert max(apart) < 1e-6  # see above
