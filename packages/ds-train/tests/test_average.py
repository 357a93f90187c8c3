"""The running average of the weights: its recurrence, its place, and what a stop leaves of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from conftest import tables, tokens
from ds_train import Callback, CheckpointError, TrainConfig, Trainer
from ds_train.average import ParameterAverage


def averaging(**train):
    return TrainConfig.from_dict(tables(train={"average_decay": 0.75, **train}))


def test_it_follows_its_recurrence():
    weight = keras.Variable([1.0, -2.0])
    average = ParameterAverage([weight], decay=0.75)
    assert "CPU:0" in average.values[0].value.device
    want = weight.numpy().astype(np.float64)
    for step in range(5):
        weight.assign([float(step), 3.0])
        average.update()
        want = 0.75 * want + 0.25 * weight.numpy()
        np.testing.assert_allclose(average.values[0], want, rtol=1e-6)
    with average.in_place():
        np.testing.assert_allclose(weight, want, rtol=1e-6)
    np.testing.assert_array_equal(weight, [4.0, 3.0])
    with pytest.raises(ZeroDivisionError), average.in_place():
        raise ZeroDivisionError
    np.testing.assert_array_equal(weight, [4.0, 3.0])


class Follows(Callback):
    """Does the same sum beside a trainer."""

    def __init__(self):
        self.mean = None

    def on_step(self, _):
        now = [weight.numpy() for weight in self.trainer.model.trainable_variables]
        self.mean = [m + np.float32(0.25) * (w - m) for m, w in zip(self.mean, now, strict=True)]


def test_a_run_averages_its_weights_and_goes_on_with_that(tmp_path):
    follows = Follows()
    whole = Trainer(averaging(), tokens(), tmp_path / "whole", callbacks=[follows])
    follows.trainer = whole
    follows.mean = [weight.numpy() for weight in whole.model.trainable_variables]
    whole.train()
    for value, mean in zip(whole.average.values, follows.mean, strict=True):
        np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-7)

    class Stops(Callback):
        def on_step(self, metrics):
            if metrics.step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(averaging(), tokens(), tmp_path / "cut", callbacks=[Stops()]).train()
    again = Trainer(averaging(), tokens(), tmp_path / "cut")
    again.train()
    for value, other in zip(whole.average.values, again.average.values, strict=True):
        np.testing.assert_array_equal(value, other)


def test_a_run_without_one_does_not_go_on_with_one(finished):
    config = averaging()
    with pytest.raises(CheckpointError, match=r"average_decay was 0.0 and is now 0.75"):
        Trainer(config, tokens(), finished.out).train()
    assert finished.trainer.average is None
    assert tf.size(finished.trainer.model.trainable_variables[0]) > 0
