"""The comparison with the live reference sees planted errors."""

from __future__ import annotations

import pytest
from reference_cases import BY_NAME
from reference_plants import PLANTS, Plant

from ds_model import CausalLM
from parity import pairs
from parity.measure import LOGITS, relative


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_error_shows(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.patch(monkeypatch)
    for case in map(BY_NAME.__getitem__, plant.cases):
        ids, mask = case.batch()
        mine = CausalLM.from_pretrained(pairs.folder_of(case))(ids, mask).numpy()
        apart = relative(mine[mask == 1], pairs.peer_forward(case).logits[mask == 1])
        assert apart > 100 * LOGITS, f"moves the logits of {case.name} by only {apart:.1e}"
