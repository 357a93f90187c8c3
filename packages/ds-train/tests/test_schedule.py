"""The schedule against the rates that the paper prints and closed forms."""

import math

import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_train import WarmupConstantCosine

# Section 4.2, one step for 1B tokens: 14.8T tokens are 14,800 steps of 1B.
PAPER = {
    "peak": 2.2e-4,
    "floor": 2.2e-5,
    "final": 7.3e-6,
    "warmup_steps": 200,
    "constant_until": 10_000,
    "cosine_until": 14_300,
    "tail_until": 14_633,
}


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 2.2e-4 / 200),
        (99, 1.1e-4),
        (199, 2.2e-4),
        (5_000, 2.2e-4),
        (10_000, 2.2e-4),
        (12_150, (2.2e-4 + 2.2e-5) / 2),  # half way down a cosine
        (14_300, 2.2e-5),
        (14_632, 2.2e-5),
        (14_633, 7.3e-6),
        (14_799, 7.3e-6),
    ],
)
def test_published_rates(step, rate):
    assert float(WarmupConstantCosine(**PAPER)(step)) == pytest.approx(rate, rel=1e-5)


def test_cosine_quarter_points():
    rate = float(WarmupConstantCosine(**PAPER)(10_000 + 4_300 // 4))
    want = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4)) / 2
    assert rate == pytest.approx(want, rel=1e-5)


@given(st.integers(200, 14_799), st.integers(200, 14_799))
def test_never_rises_after_warm_up(a, b):
    schedule = WarmupConstantCosine(**PAPER)
    early, late = sorted((a, b))
    assert float(schedule(late)) <= float(schedule(early)) * (1 + 1e-6)


def test_phases_out_of_order_are_refused():
    with pytest.raises(ValueError, match="in order"):
        WarmupConstantCosine(**(PAPER | {"cosine_until": 9_000}))


def test_serialises():
    schedule = WarmupConstantCosine(**PAPER)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert again.get_config() == PAPER
