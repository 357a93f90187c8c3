"""Logits and chosen experts, on every case, in graph mode, op by op and under XLA."""

from __future__ import annotations

import numpy as np
import pytest
import reference_ours as ours
import tensorflow as tf
from reference_cases import BY_NAME, CASES, Case

from parity import pairs
from parity.measure import LOGITS, relative, same_experts

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_logits(case: Case) -> None:
    ids, mask = case.batch()
    mine = pairs.ours_of(case)(ids, mask).numpy()
    real = mask == 1
    assert relative(mine[real], pairs.peer_forward(case).logits[real]) < LOGITS


@every_case
def test_chosen_experts(case: Case) -> None:
    ids, mask = case.batch()
    chosen = ours.experts(pairs.ours_of(case), ids, mask)
    expected = pairs.peer_forward(case).experts
    assert len(chosen) == len(expected) == case.moe_layers
    real = mask.ravel() == 1
    for layer, (mine, theirs) in enumerate(zip(chosen, expected, strict=True)):
        assert same_experts(mine[real], theirs[real]), f"MoE layer {layer}"


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("name", ["left-padded", "yarn-two-mscales", "v2-group-limited"])
def test_logits_compiled(name: str, compiled: bool) -> None:
    case = BY_NAME[name]
    ids, mask = case.batch()
    model = pairs.ours_of(case)
    run = tf.function(model, jit_compile=compiled, autograph=False)
    mine = run(tf.constant(ids), tf.constant(mask)).numpy()
    real = mask == 1
    assert relative(mine[real], pairs.peer_forward(case).logits[real]) < LOGITS


@pytest.mark.parametrize("name", ["left-padded", "v2-lite"])
def test_padding_side_makes_no_difference(name: str) -> None:
    case = BY_NAME[name]
    ids, mask = case.batch()
    expected = pairs.peer_forward(case).logits
    right = [np.roll(row, -int(gap)) for row, gap in zip(ids, (mask == 0).sum(1), strict=True)]
    mine = pairs.ours_of(case)(np.stack(right), mask[:, ::-1]).numpy()
    assert relative(mine[mask[:, ::-1] == 1], expected[mask == 1]) < LOGITS
