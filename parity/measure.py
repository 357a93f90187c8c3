"""What "within e" means: largest absolute difference over largest absolute reference."""

from __future__ import annotations

import numpy as np

LOGITS = 1e-4
"""Bound on logits, ours against the reference."""

GRADIENTS = 1e-3
"""Bound on each parameter's gradient."""

TIE = 1e-4
"""Greedy tokens may differ only where the reference's two best logits lie this close."""


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """Return max |ours - reference| / max |reference|; 0 for two empty or all-zero arrays.

    Raises:
        ValueError: the shapes differ.
    """
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        raise ValueError(f"shape {ours.shape}, expected the reference's {reference.shape}")
    if reference.size == 0:
        return 0.0
    difference, scale = np.abs(ours - reference).max(), np.abs(reference).max()
    if scale == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / scale)


def same_experts(ours: np.ndarray, reference: np.ndarray) -> bool:
    """Compare chosen experts `[tokens, k]` as sets, token by token."""
    return np.array_equal(np.sort(ours, axis=-1), np.sort(reference, axis=-1))
