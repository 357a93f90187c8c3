"""A reference file: what `transformers` said about one case, small enough to commit.

Gradients are kept as each tensor's length (2-norm), largest entry and a few of its entries,
in the order of `trained_names`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from reference_cases import Case

FOLDER = Path(__file__).parent / "reference"
SAMPLES = 16


def path_of(case: Case, folder: Path = FOLDER) -> Path:
    """Return where the case's numbers lie."""
    return folder / f"{case.name}.safetensors"


def read(case: Case) -> dict[str, np.ndarray]:
    """Return the committed numbers of the case.

    `logits [B, S, V]`, `experts.{layer} [T, K]`, `mtp.{depth} [B, S - depth, V]`,
    `greedy [B, S + 64]`, `gradient.norms [P]`, `gradient.peaks [P]`,
    `gradient.samples [P, 16]`.
    """
    return load_file(path_of(case))


def series(tensors: dict[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    """Return `prefix.0`, `prefix.1`, ... in order."""
    found: list[np.ndarray] = []
    while f"{prefix}.{len(found)}" in tensors:
        found.append(tensors[f"{prefix}.{len(found)}"])
    return found


def digest(gradients: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Reduce gradients to what a reference file keeps of them."""
    flat = [gradients[name].astype(np.float64).ravel() for name in names]
    norms = [np.linalg.norm(g) for g in flat]
    peaks = [np.abs(g).max(initial=0.0) for g in flat]
    # Evenly spread over the tensor; a tensor of size zero has nothing to spread over.
    where = [np.linspace(0, g.size - 1, SAMPLES).round().astype(int) for g in flat]
    samples = [g[w] if g.size else np.zeros(SAMPLES) for g, w in zip(flat, where, strict=True)]
    return {
        "gradient.norms": np.array(norms, np.float32),
        "gradient.peaks": np.array(peaks, np.float32),
        "gradient.samples": np.array(samples, np.float32),
    }
