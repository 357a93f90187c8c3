"""The comparison with the live reference sees planted errors."""

from __future__ import annotations

import pytest
import reference_ours as ours
from reference_cases import BY_NAME
from reference_plants import GRADIENT_PLANTS, MTP_PLANTS, PLANTS, Plant
from reference_weights import trained_names, weights

from parity import pairs, peer
from parity.measure import GRADIENTS, LOGITS, relative


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_error_shows(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.patch(monkeypatch)
    for case in map(BY_NAME.__getitem__, plant.cases):
        ids, mask = case.batch()
        mine = pairs.ours_of(case)(ids, mask).numpy()
        apart = relative(mine[mask == 1], pairs.peer_forward(case).logits[mask == 1])
        assert apart > 100 * LOGITS, f"moves the logits of {case.name} by only {apart:.1e}"


@pytest.mark.parametrize("plant", GRADIENT_PLANTS, ids=lambda plant: plant.name)
def test_planted_gradient_error_shows(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.patch(monkeypatch)
    for case in map(BY_NAME.__getitem__, plant.cases):
        expected = peer.gradients(pairs.peer_of(case), *case.batch())
        model = pairs.ours_of(case)
        mine = ours.gradients(model, *case.batch())
        apart = [relative(mine[name], expected[name]) for name in trained_names(case.config)]
        assert max(apart) > 100 * GRADIENTS


@pytest.mark.parametrize("plant", MTP_PLANTS, ids=lambda plant: plant.name)
def test_planted_mtp_error_shows(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.patch(monkeypatch)
    for case in map(BY_NAME.__getitem__, plant.cases):
        ids, _ = case.batch()
        expected, _ = peer.mtp_logits(pairs.peer_of(case), weights(case), ids)
        model = pairs.ours_of(case)
        assert relative(model.mtp_logits(ids)[0].numpy(), expected[0]) > 100 * LOGITS
