"""Checkpoints under kills, full disks and damage."""

import errno
import json
import os
import resource
import signal

import keras
import numpy as np
import pytest

from conftest import MODEL
from ds_model import CausalLM
from ds_train import AdamW, CheckpointError, TrainConfig
from ds_train.checkpoint import CheckpointStore, whole_contents


def make(seed):
    keras.utils.set_random_seed(seed)
    model = CausalLM(TrainConfig.from_dict({"model": MODEL}).model.build())
    optimizer = AdamW(1e-3)
    optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(seed)
    for variable in [*optimizer.momentums, *optimizer.velocities]:
        variable.assign(rng.random(variable.shape))
    return model, optimizer


def numbers(model, optimizer):
    return [v.numpy() for v in [*model.variables, *optimizer.momentums, *optimizer.velocities]]


@pytest.fixture(scope="module")
def pair():
    return make(1)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_every_number_comes_back(pair, store):
    model, optimizer = pair
    optimizer.iterations.assign(17)
    store.save(17, whole_contents(model, optimizer), {"colour": "blue"})
    other, other_optimizer = make(2)
    assert store.read_state(17) == {"step": 17, "colour": "blue"}
    store.load(17, whole_contents(other, other_optimizer))
    assert int(other_optimizer.iterations) == 17
    for ours, theirs in zip(numbers(*pair), numbers(other, other_optimizer), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_newest_are_kept(pair, store):
    for step in (1, 2, 3, 4):
        store.save(step, whole_contents(*pair), {})
    assert store.steps() == [3, 4]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may handle it."""


def _failing_flush(monkeypatch, call, error):
    calls = iter(range(1, 100))
    real = os.fsync

    def fsync(handle):
        if next(calls) == call:
            raise error
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


# Four files, the new folder, its parent: the disk can say no at each.
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_killed_at_any_flush_the_old_checkpoint_stands(pair, store, monkeypatch, call):
    store.save(1, whole_contents(*pair), {})
    with monkeypatch.context() as patch:
        _failing_flush(patch, call, Killed())
        with pytest.raises(Killed):
            store.save(2, whole_contents(*pair), {})
    assert store.steps() == [1]
    store.read_state(1)
    store.save(2, whole_contents(*pair), {})  # what the kill left behind is in nobody's way
    assert store.steps() == [1, 2]
    store.read_state(2)


@pytest.mark.parametrize("call", [1, 3, 5])
def test_a_full_disk_is_one_line_and_loses_nothing(pair, store, monkeypatch, call):
    store.save(1, whole_contents(*pair), {})
    with monkeypatch.context() as patch:
        _failing_flush(patch, call, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(CheckpointError, match=r"No space left on device.*step 1 is intact"):
            store.save(2, whole_contents(*pair), {})
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    store.read_state(1)


def test_a_real_refusal_of_the_kernel_is_one_line(pair, store):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*there is none yet") as caught:
            store.save(1, whole_contents(*pair), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_found_before_anything_is_loaded(pair, store, name):
    store.save(1, whole_contents(*pair), {})
    store.save(2, whole_contents(*pair), {})
    path = store.path(2) / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match=rf"{name} has \d+ bytes.*go on from step 1"):
        store.read_state(2)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{name} does not have the SHA-256"):
        store.read_state(2)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"broken checkpoint.*{name}"):
        store.read_state(2)


def test_a_broken_manifest_is_one_line(pair, store):
    store.save(1, whole_contents(*pair), {})
    for text in ("{", "[]", json.dumps({"state.json": 3})):
        (store.path(1) / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"broken checkpoint.*start again") as caught:
            store.read_state(1)
        assert "\n" not in str(caught.value)


def test_another_models_checkpoint_is_refused_whole(pair, store):
    store.save(1, whole_contents(*pair), {})
    config = TrainConfig.from_dict({"model": MODEL | {"moe_intermediate_size": 24}})
    other = CausalLM(config.model.build())
    optimizer = AdamW(1e-3)
    optimizer.build(other.trainable_variables)
    before = numbers(other, optimizer)
    with pytest.raises(CheckpointError, match=r"another model.*should be \(4, 32, 48\)"):
        store.load(1, whole_contents(other, optimizer))
    for was, now in zip(before, numbers(other, optimizer), strict=True):
        np.testing.assert_array_equal(was, now)
