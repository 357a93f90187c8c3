"""Rounding is watched, steps without a finite gradient are skipped, float16's loss is scaled."""

import json

import numpy as np
import pytest
import tensorflow as tf

from conftest import tables, tokens
from ds_model import CausalLM
from ds_precision import E4M3, Fp8Recipe
from ds_train import AdamW, Callback, TrainConfig, Trainer
from ds_train.metrics_log import read_metrics
from ds_train.stability import _stats
from ds_train.step import TrainStep

FP8 = {"dtype_policy": "fp8", "watch_every": 2}


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Return the folder of a run in FP8 that was looked at in steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("watched")
    config = TrainConfig.from_dict(tables(train=FP8, optimizer={"moments": "bfloat16"}))
    trainer = Trainer(config, tokens(), out)
    trainer.train()
    return out, trainer


def test_fp8_learns_as_float32_does(watched, finished):
    ours, theirs = (
        [row["cross_entropy"] for row in read_metrics(out / "metrics.jsonl")]
        for out in (watched[0], finished.out)
    )
    assert ours == pytest.approx(theirs, rel=0.02)


def test_every_rounded_operand_is_measured(watched):
    rows = read_metrics(watched[0] / "stability.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    names = rows[0]["operands"]
    expected = {
        f"{layer}/{part}"
        for layer in ("block_0/self_attn/o_proj", "block_1/mlp/up", "block_1/mlp/down")
        for part in ("input", "weight", "gradient")
    }
    assert expected <= names.keys()
    assert not [name for name in names if "gate/" in name or "lm_head" in name or "embed" in name]
    for stats in names.values():
        assert stats["overflow"] == 0
        assert 0 <= stats["underflow"] < 0.2
        assert 0 < stats["smallest_scale"] <= stats["largest_scale"]
    variables = watched[1].model.trainable_variables
    assert rows[0]["gradient_norms"].keys() == {v.path.split("/", 1)[1] for v in variables}


def test_looking_changes_nothing(watched, tmp_path):
    config = TrainConfig.from_dict(
        tables(train={"dtype_policy": "fp8"}, optimizer={"moments": "bfloat16"})
    )
    blind = Trainer(config, tokens(), tmp_path).train()
    for one, other in zip(blind.variables, watched[1].model.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_shares_are_those_of_the_numbers():
    # Scale 1: the largest is 448. Zero, two that vanish, one subnormal, four that stay.
    x = tf.constant([[448.0, 0.0, 1e-5, -1e-4, 2.0**-8, 1.0, -2.0, 100.0]])
    found = _stats(x, Fp8Recipe(tile=8).rows(x), E4M3)
    assert float(found.amax) == 448
    assert float(found.underflow) == pytest.approx(2 / 7)
    assert float(found.subnormal) == pytest.approx(1 / 7)
    assert float(found.overflow) == 0
    assert float(found.smallest_scale) == float(found.largest_scale) == 1


def test_overflow_is_what_a_scale_of_the_past_cannot_hold():
    x = tf.constant([[1.0, 2.0, 3.0, 4.0]])
    small = Fp8Recipe(tile=4).rows(x)
    found = _stats(tf.constant([[1.0, 2.0, 30.0, 40.0]]), small, E4M3)
    assert float(found.overflow) == 0.5


def step_of(**changes):
    config = TrainConfig.from_dict(tables(**changes))
    tf.keras.utils.set_random_seed(0)
    model = CausalLM(config.model.build(), dtype=config.policy())
    return model, TrainStep(model, AdamW(config.learning_rate()), config)


@pytest.fixture(scope="module")
def batch():
    return tf.constant(np.random.default_rng(3).integers(0, 300, (1, 4, 17)), tf.int32)


def test_a_step_without_a_finite_gradient_changes_nothing(batch):
    model, step = step_of(train={"nonfinite": "skip"})
    norm = model.blocks[0].input_layernorm.weight
    norm.assign(norm + np.nan)
    before = [v.numpy() for v in model.variables]
    output = step.compiled(batch)
    assert float(output.scalars["applied"]) == 0
    for one, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(one, variable.numpy())
    norm.assign(tf.ones_like(norm))
    assert float(step.compiled(batch).scalars["applied"]) == 1


class PoisonAt(Callback):
    """Makes one weight NaN for one step."""

    def __init__(self, step):
        self.step, self.trainer = step, None

    def on_step(self, metrics):
        norm = self.trainer.model.blocks[0].input_layernorm.weight
        if metrics.step == self.step:
            self.kept = norm.numpy()
            norm.assign(self.kept * np.nan)
        elif metrics.step == self.step + 1:
            norm.assign(self.kept)


def test_the_run_counts_what_it_skipped_and_remembers(tmp_path):
    config = TrainConfig.from_dict(tables(train={"nonfinite": "skip", "log_every": 1}))
    poison = PoisonAt(2)
    poison.trainer = Trainer(config, tokens(), tmp_path, callbacks=[poison])
    poison.trainer.train()
    assert [row["skipped"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        0,
        0,
        1,
        1,
        1,
        1,
    ]
    state = json.loads((poison.trainer.checkpoints.path(6) / "state.json").read_text())
    assert state["loss_scaling"] == {"skipped": 1, "scale": 1.0, "good_steps": 0}


def test_float16_finds_a_scale_and_learns(tmp_path):
    config = TrainConfig.from_dict(tables(train={"dtype_policy": "mixed_float16", "log_every": 1}))
    trainer = Trainer(config, tokens(), tmp_path)
    trainer._share._step.scaling.value.assign(2.0**24)  # too far: the first steps overflow
    trainer.train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    skipped = rows[-1]["skipped"]
    assert 1 <= skipped < 6
    assert trainer._share._step.scaling.value.numpy() == 2.0 ** (24 - skipped)
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"]


def test_float16_gradients_are_those_of_float32(batch):
    scalars = [
        step_of(train={"dtype_policy": policy})[1].compiled(batch).scalars
        for policy in ("float32", "mixed_float16")
    ]
    for name in ("loss", "gradient_norm"):
        assert float(scalars[1][name]) == pytest.approx(float(scalars[0][name]), rel=5e-3)


def test_the_scale_doubles_after_many_good_steps(batch):
    _, step = step_of(train={"dtype_policy": "mixed_float16"})
    step.scaling.good_steps.assign(1999)
    step.compiled(batch)
    assert (step.scaling.value.numpy(), step.scaling.good_steps.numpy()) == (2.0**16, 0)
