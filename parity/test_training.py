"""Fifty steps of training, here and in torch: what `tools/compare_training.py` shows."""

from __future__ import annotations

import numpy as np
import pytest
from reference_cases import BY_NAME, Case
from tools.compare_training import TOLERANCE, compare

from parity import pairs

STEPS = 50


def batches(case: Case) -> np.ndarray:
    """Return `[steps, batch, sequence + 1]` ids that can be learnt: rows count in strides."""
    rng = np.random.default_rng(case.seed)
    start, stride = rng.integers(0, 90, (2, STEPS, 4, 1))
    return (3 + (start + (1 + stride % 4) * np.arange(25)) % 90).astype(np.int32)


@pytest.mark.parametrize("name", ["plain", "tied-head-mtp", "v2-group-limited"])
def test_loss_curve(name: str) -> None:
    case = BY_NAME[name]
    rows = compare(pairs.folder_of(case), batches(case))
    assert len(rows) == STEPS
    assert rows[-1].theirs < 0.8 * rows[0].theirs  # it learns, so that there is a curve
    worst = max(rows, key=lambda row: row.difference)
    assert worst.difference < TOLERANCE, f"step {worst.step}: {worst}"
    # Clipping acts on the norm: it agrees too, until a route flips.
    assert rows[0].our_norm == pytest.approx(rows[0].their_norm, rel=1e-5)
