"""The plan of a service beside figures that others published, and beside closed forms."""

import dataclasses

import pytest

from ds_model import ModelConfig
from ds_serve.capacity import (
    DECODE_UNIT,
    DEVICES,
    PREFILL_UNIT,
    Demand,
    Unit,
    decode_speed,
    decode_times,
    deploy,
    largest_batch,
    prefill_speed,
    prefill_times,
    published,
)

V3 = ModelConfig.preset("v3-671b")
H800 = DEVICES["H800"]


def test_published_figures():
    """Fitted to two runs; the others are as far off as the page says, and no further."""
    errors = {(run.what, run.source): run.error for run in published()}
    fitted = [run for run in published() if run.fitted]
    assert len(fitted) == 2
    assert all(abs(run.error) < 0.02 for run in fitted)
    saturated = [error for (_, source), error in errors.items() if "SGLang" in source]
    assert all(abs(error) < 0.05 for error in saturated)
    means = {what: error for (what, source), error in errors.items() if "DeepSeek" in source}
    decode, prefill = means.values()
    assert 0 < decode < 0.1  # a day's mean lies below what a node can do
    assert 0 < prefill < 0.65


def test_a_days_traffic_takes_the_nodes_that_were_there():
    """608 and 168 billion tokens a day at 73.7k and 14.8k a node are 226.75 nodes, as published."""
    nodes = 608e9 / 86_400 / 73_700 + 168e9 / 86_400 / 14_800
    assert nodes == pytest.approx(226.75, rel=0.001)
    assert nodes * 8 * 24 * 2 == pytest.approx(87_072, rel=0.001)
    planned = deploy(V3, H800, Demand(608e9 / 86_400, 168e9 / 86_400, 342 / 608, 4989, 21))
    assert 150 < planned.prefill_nodes + planned.decode_nodes < 226.75
    assert planned.speed >= 21


def test_where_a_tokens_time_goes():
    """By hand, from the sizes of the released model."""
    times = prefill_times(V3, H800, PREFILL_UNIT, 2000)
    # Three other nodes of four, 7168 numbers there in one byte and back in two, 58 layers.
    assert times.exchange == pytest.approx(58 * 3 * 7168 * 3 / 50e9)
    assert times.attention == pytest.approx(2 * 128 * (128 + 64 + 128) * 2000 * 61 / (1979e12 / 2))
    step = decode_times(V3, H800, DECODE_UNIT, 4989, 88)
    # 576 numbers of two bytes a token and layer.
    assert step.attention == pytest.approx(88 * 4989 * 576 * 2 * 61 / 3.35e12)
    assert step.exchange == pytest.approx(58 * 88 * 8 * (1 - 8 / 144) * 7168 * 3 / 50e9)


def test_more_costs_more():
    assert prefill_speed(V3, H800, PREFILL_UNIT, 4000) < prefill_speed(V3, H800, PREFILL_UNIT, 1000)
    half = prefill_speed(V3, H800, PREFILL_UNIT, 1000, 0.5)
    assert half == pytest.approx(2 * prefill_speed(V3, H800, PREFILL_UNIT, 1000))
    node, each = zip(
        *(decode_speed(V3, H800, DECODE_UNIT, 4989, b) for b in (1, 8, 64)), strict=True
    )
    assert list(node) == sorted(node)
    assert list(each) == sorted(each, reverse=True)
    wide = largest_batch(V3, H800, DECODE_UNIT, 4989)
    assert (
        largest_batch(V3, H800, Unit(4), 4989)
        < wide
        < largest_batch(V3, DEVICES["H200"], DECODE_UNIT, 4989)
    )


def test_what_cant_be_served_is_said():
    small = dataclasses.replace(H800, memory=10e9)
    with pytest.raises(ValueError, match="can't hold its weights and one text"):
        deploy(V3, small, Demand(1, 1))
    with pytest.raises(ValueError, match="one text alone gets"):
        deploy(V3, H800, Demand(1, 1, speed=1000))
