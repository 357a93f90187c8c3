"""The gradient of the language-model loss, parameter by parameter."""

from __future__ import annotations

import pytest
import reference_ours as ours
from reference_cases import CASES, Case
from reference_weights import trained_names

from parity import pairs, peer
from parity.measure import GRADIENTS, relative


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_parameter(case: Case) -> None:
    ids, mask = case.batch()
    expected = peer.gradients(pairs.peer_of(case), ids, mask)
    mine = ours.gradients(pairs.ours_of(case), ids, mask)
    names = trained_names(case.config)
    assert set(names) == set(expected)
    apart = {name: relative(mine[name], expected[name]) for name in names}
    wrong = {name: f"{value:.1e}" for name, value in apart.items() if not value < GRADIENTS}
    assert not wrong


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_loss(case: Case) -> None:
    ids, mask = case.batch()
    expected = peer.loss(pairs.peer_of(case), ids, mask).item()
    assert float(ours.loss(pairs.ours_of(case), ids, mask)) == pytest.approx(expected, rel=1e-6)
