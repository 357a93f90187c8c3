"""The whole model against what transformers said of the same weights (`reference/`).

The files are written by `python -m parity.write_references`, and the parity suite holds
them to what transformers says today. "Within e": largest absolute difference over largest
absolute reference, padding left out; chosen experts compared as sets.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import reference_file
import reference_ours as ours
from reference_cases import BY_NAME, COMMITTED, Case
from reference_plants import GRADIENT_PLANTS, MTP_PLANTS, PLANTS, Plant
from reference_weights import trained_names, write_checkpoint

from ds_model import CausalLM

every_case = pytest.mark.parametrize("case", COMMITTED, ids=lambda case: case.name)
with_mtp = pytest.mark.parametrize(
    "case", [case for case in COMMITTED if case.depth], ids=lambda case: case.name
)


@functools.cache
def model_of(case: Case) -> CausalLM:
    with tempfile.TemporaryDirectory() as folder:
        return CausalLM.from_pretrained(write_checkpoint(case, Path(folder)))


reference_of = functools.cache(reference_file.read)


def distance(mine: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """Return the relative difference at real tokens."""
    real = mask.astype(bool)
    return float(np.abs(mine - reference)[real].max() / np.abs(reference[real]).max())


@every_case
def test_logits(case: Case) -> None:
    ids, mask = case.batch()
    assert distance(model_of(case)(ids, mask).numpy(), reference_of(case)["logits"], mask) < 1e-4


@every_case
def test_chosen_experts(case: Case) -> None:
    ids, mask = case.batch()
    expected = reference_file.series(reference_of(case), "experts")
    chosen = ours.experts(model_of(case), ids, mask)
    assert len(chosen) == len(expected) == case.moe_layers
    real = mask.ravel() == 1
    for mine, theirs in zip(chosen, expected, strict=True):
        np.testing.assert_array_equal(np.sort(mine[real]), np.sort(theirs[real]))


@with_mtp
def test_mtp_logits(case: Case) -> None:
    ids, _ = case.batch()
    expected = reference_file.series(reference_of(case), "mtp")
    depths = model_of(case).mtp_logits(ids)
    assert len(depths) == len(expected) == case.depth
    for mine, theirs in zip(depths, expected, strict=True):
        assert distance(mine.numpy(), theirs, np.ones(theirs.shape[:2])) < 1e-4


def gradient_distance(case: Case, model: CausalLM) -> float:
    """Return the largest relative difference of any parameter's gradient."""
    expected, names = reference_of(case), trained_names(case.config)
    mine = reference_file.digest(ours.gradients(model, *case.batch()), names)
    # An expert that no token reached has no gradient there, and must have none here.
    peaks = np.maximum(expected["gradient.peaks"], 1e-30)
    norms = np.maximum(expected["gradient.norms"], 1e-30)
    samples = np.abs(mine["gradient.samples"] - expected["gradient.samples"]).max(axis=1) / peaks
    lengths = np.abs(mine["gradient.norms"] - expected["gradient.norms"]) / norms
    return float(np.maximum(samples, lengths).max())


@every_case
def test_gradients(case: Case) -> None:
    assert gradient_distance(case, model_of(case)) < 1e-3


# Each model compiles its own loop, which takes seconds: the parity suite does all cases.
@pytest.mark.parametrize("name", ["released", "left-padded", "v2-lite"])
def test_greedy(name: str) -> None:
    case = BY_NAME[name]
    ids, mask = case.batch()
    expected = reference_of(case)["greedy"]
    new = expected.shape[1] - ids.shape[1]
    made = model_of(case).generate(ids, mask, max_new_tokens=new, eos_token_id=())
    np.testing.assert_array_equal(made.numpy(), expected)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_error_shows(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.patch(monkeypatch)
    for case in map(BY_NAME.__getitem__, plant.cases):
        ids, mask = case.batch()
        apart = distance(model_of(case)(ids, mask).numpy(), reference_of(case)["logits"], mask)
        assert apart > 1e-2, f"{plant.name} moves the logits of {case.name} by only {apart:.1e}"


@pytest.mark.parametrize("plant", GRADIENT_PLANTS, ids=lambda plant: plant.name)
def test_planted_gradient_error_shows(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.patch(monkeypatch)
    for case in map(BY_NAME.__getitem__, plant.cases):
        ids, mask = case.batch()
        model = model_of(case)
        assert distance(model(ids, mask).numpy(), reference_of(case)["logits"], mask) < 1e-4
        assert gradient_distance(case, model) > 0.1


@pytest.mark.parametrize("plant", MTP_PLANTS, ids=lambda plant: plant.name)
def test_planted_mtp_error_shows(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.patch(monkeypatch)
    for case in map(BY_NAME.__getitem__, plant.cases):
        first = model_of(case).mtp_logits(case.batch()[0])[0].numpy()
        theirs = reference_of(case)["mtp.0"]
        assert distance(first, theirs, np.ones(theirs.shape[:2])) > 1e-2
