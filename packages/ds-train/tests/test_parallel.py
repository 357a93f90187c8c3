"""Training on many ranks ends in the numbers of one process: each mesh is real processes here."""

import json
import shutil
from copy import deepcopy

import numpy as np
import pytest

from conftest import CUT, losses, start, tables, weights
from ds_train import TrainConfig, Trainer
from ds_train.metrics_log import read_metrics

STEPS = 20
MESHES = {
    "dp2": {"dp": 2},
    "ep2": {"ep": 2},
    "ep4": {"ep": 4},
    "pp2": {"pp": 2},
    "pp2 zb1p": {"pp": 2, "schedule": "zb1p"},
    "pp4 dualpipe": {"pp": 4, "schedule": "dualpipe"},
    "pp2 dualpipev": {"pp": 2, "schedule": "dualpipev"},
    "pp2 ep2": {"pp": 2, "ep": 2},
    "pp2 ep2 zero accumulating": {"pp": 2, "ep": 2, "zero": 1},
}


def config_of(mesh=None, **changes):
    """Return a configuration of eight sequences a step on a mesh."""
    mesh = mesh or {}
    shares = mesh.get("ep", 1) * mesh.get("dp", 1)
    two_ways = mesh.get("schedule", "").startswith("dualpipe")
    micro = 8 if two_ways else 4 if mesh.get("pp", 1) > 1 else 1
    train = {
        "steps": STEPS,
        "batch_size": 8,
        "accumulation": min(micro, 8 // shares),
        "log_every": 1,
        "average_decay": 0.9,
    }
    found = {
        "model": CUT,
        "parallel": mesh,
        "train": train | changes.pop("train", {}),
        "checkpoint": {"every": 5, "keep": 9},
    }
    return TrainConfig.from_dict(tables(**found, **changes))


@pytest.fixture(scope="session")
def alone(token_file, tmp_path_factory):
    """Return the folder and the weights of the run of one process."""
    out = tmp_path_factory.mktemp("alone")
    trainer = Trainer(config_of(), token_file, out)
    trainer.train()
    return out, weights(trainer)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, id=name, marks=[] if name == "dp2" else pytest.mark.ranks)
        for name, mesh in MESHES.items()
    ],
)
def test_every_mesh_ends_in_the_numbers_of_one_process(mesh, alone, token_file, tmp_path):
    config = config_of(mesh)
    said = []
    start(config, token_file, tmp_path, say=said.append)
    assert sum("pipeline" in line for line in said) == config.parallel.ranks

    out, want = alone
    rows, expected = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, out))
    assert [row["loads"] for row in rows] == [row["loads"] for row in expected]  # no route flips
    for name in ("loss", "cross_entropy", "mtp_cross_entropy", "balance_loss", "gradient_norm"):
        values = [[row[name] for row in run] for run in (rows, expected)]
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)
    # One process reads what the ranks saved.
    found = weights(resumed(config.in_one_process(), token_file, tmp_path))
    for name, values in want.items():
        apart = np.linalg.norm(found[name] - values) / (np.linalg.norm(values) + 1e-12)
        assert apart < 1e-4, name


def resumed(config, token_file, out):
    trainer = Trainer(config, token_file, out)
    trainer.train()
    return trainer


@pytest.mark.ranks
def test_a_batch_that_ranks_do_not_divide_counts_each_sequence_once(token_file, tmp_path):
    """Seven sequences in micro-batches of two and one, beside all seven at once."""
    ragged = {"batch_size": 7, "steps": 8}
    alone = tmp_path / "alone"
    Trainer(config_of(train=ragged | {"accumulation": 1}), token_file, alone).train()
    config = config_of({"pp": 2, "ep": 2}, train=ragged | {"accumulation": 3})
    start(config, token_file, tmp_path / "ranks")
    rows, expected = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ranks", "alone")
    )
    assert [row["loads"] for row in rows] == [row["loads"] for row in expected]
    for name in ("loss", "cross_entropy", "mtp_cross_entropy", "balance_loss"):
        values = [[row[name] for row in run] for run in (rows, expected)]
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)
    # A norm of small numbers' sums: the first is of the same weights, later ones drift.
    norms = [[row["gradient_norm"] for row in run] for run in (rows, expected)]
    np.testing.assert_allclose(norms[0][0], norms[1][0], rtol=1e-6)
    np.testing.assert_allclose(*norms, rtol=1e-4)
    assert config.in_one_process().train.accumulation == 7


@pytest.mark.ranks
@pytest.mark.parametrize("mesh", [{"dp": 2, "zero": 1}, {"pp": 2, "ep": 2}])
def test_steps_that_are_not_finite_are_skipped_as_in_one_process(mesh, token_file, tmp_path):
    changes = {"train": {"nonfinite": "skip", "steps": 4, "average_decay": 0.0}}
    changes["schedule"] = {"peak": 1e30, "floor": 1e30, "final": 1e30, "warmup_steps": 1}
    Trainer(config_of(**deepcopy(changes)), token_file, tmp_path / "alone").train()
    start(config_of(mesh, **deepcopy(changes)), token_file, tmp_path / "ranks")
    rows, expected = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ranks", "alone")
    )
    assert [row["skipped"] for row in rows] == [row["skipped"] for row in expected]
    assert rows[-1]["skipped"] == 3  # the first step takes the weights so far
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)


@pytest.mark.ranks
def test_float16_is_scaled_as_in_one_process(token_file, tmp_path):
    train = {"dtype_policy": "mixed_float16", "steps": 6}
    Trainer(config_of(train=dict(train)), token_file, tmp_path / "alone").train()
    config = config_of({"pp": 2, "dp": 2, "zero": 1}, train=dict(train))
    start(config, token_file, tmp_path / "ranks")
    rows, expected = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ranks", "alone")
    )
    for name in ("skipped", "loss_scale"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    for name in ("loss", "gradient_norm"):
        values = [[row[name] for row in run] for run in (rows, expected)]
        np.testing.assert_allclose(*values, rtol=0.02, err_msg=name)
    states = [
        json.loads((tmp_path / name / "checkpoints" / "step-00000006" / "state.json").read_text())
        for name in ("ranks", "alone")
    ]
    assert states[0]["loss_scaling"] == states[1]["loss_scaling"]


@pytest.mark.ranks
def test_a_run_goes_on_on_another_mesh(alone, token_file, tmp_path):
    """Ten steps on pp2 x ep2, five on ep4, five in one process."""
    for mesh, last in ((MESHES["pp2 ep2 zero accumulating"], 10), (MESHES["ep4"], 15)):
        start(config_of(mesh), token_file, tmp_path)
        for folder in (tmp_path / "checkpoints").iterdir():
            if int(folder.name[-8:]) > last:
                shutil.rmtree(folder)
    found = weights(resumed(config_of(), token_file, tmp_path))
    np.testing.assert_allclose(losses(tmp_path), losses(alone[0]), rtol=1e-5)
    for name, values in alone[1].items():
        apart = np.linalg.norm(found[name] - values) / (np.linalg.norm(values) + 1e-12)
        assert apart < 1e-4, name
