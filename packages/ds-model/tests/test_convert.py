"""Conversions keep every value they can, and show nothing until they are whole."""

import json
import os
import shutil
import subprocess

import keras
import ml_dtypes
import numpy as np
import pytest
from reference_cases import CASES
from reference_weights import weights, write_checkpoint
from safetensors.numpy import save_file
from typer.testing import CliRunner

from ds_model import CausalLM, CheckpointError, ModelConfig
from ds_model.checkpoint.convert import ExpertSlice, to_hf, to_keras
from ds_model.checkpoint.journal import verify
from ds_model.checkpoint.reader import SINGLE, TensorFiles
from ds_model.cli import app

RELEASED = next(case for case in CASES if case.name == "released")
BIAS = "e_score_correction_bias"
MTP = f"model.layers.{RELEASED.config['num_hidden_layers']}."


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(RELEASED, tmp_path / "source")


def stored(directory):
    with TensorFiles(directory) as files:
        return {name: np.array(files.read(name)) for name in files.names}


def test_to_bfloat16_rounds_all_but_the_router_bias(source, tmp_path):
    seen = []
    target = tmp_path / "target"
    to_hf(source, target, "bfloat16", 30_000, lambda *progress: seen.append(progress))
    found = stored(target)
    for name, array in weights(RELEASED).items():
        expected = array if name.endswith(BIAS) else array.astype(ml_dtypes.bfloat16)
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected, name)
    assert seen == [(done, len(found)) for done in range(1, len(found) + 1)]
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert ModelConfig.from_pretrained(target) == ModelConfig.from_pretrained(source)


def test_up_and_down_again_is_lossless(source, tmp_path):
    to_hf(source, tmp_path / "small", "bfloat16")
    to_hf(tmp_path / "small", tmp_path / "wide", "float32")
    to_hf(tmp_path / "wide", tmp_path / "again", "bfloat16")
    assert (tmp_path / "again" / SINGLE).read_bytes() == (tmp_path / "small" / SINGLE).read_bytes()


def test_keras_and_back_is_lossless(source, tmp_path):
    to_keras(source, tmp_path / "model.keras")
    to_hf(tmp_path / "model.keras", tmp_path / "back")
    found = stored(tmp_path / "back")
    for name, array in weights(RELEASED).items():
        np.testing.assert_array_equal(found[name], array, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model.keras", "source"]


def test_tokenizer_goes_along_and_code_does_not(source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("x")
    (source / "modeling_deepseek.py").write_text("raise SystemExit")
    to_hf(source, tmp_path / "target")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert names == {"config.json", SINGLE, "SHA256SUMS", "tokenizer.json", "chat_template.jinja"}


def test_an_absent_mtp_module_stays_absent(source, tmp_path):
    main = {k: v for k, v in weights(RELEASED).items() if not k.startswith(MTP)}
    save_file(main, source / SINGLE)
    to_hf(source, tmp_path / "target", "float16")
    assert stored(tmp_path / "target").keys() == main.keys()
    assert CausalLM.from_pretrained(tmp_path / "target").mtp == []


def test_nothing_is_overwritten(source):
    before = (source / SINGLE).read_bytes()
    for target in (source, source / SINGLE):
        with pytest.raises(CheckpointError, match="exists"):
            to_hf(source, target)
    assert (source / SINGLE).read_bytes() == before


def test_an_empty_directory_is_a_place_to_write(source, tmp_path):
    (tmp_path / "target").mkdir()
    to_hf(source, tmp_path / "target")
    assert stored(tmp_path / "target").keys() == weights(RELEASED).keys()


def test_an_error_leaves_nothing_behind(source, tmp_path):
    tensors = weights(RELEASED)
    last = list(tensors)[-3]
    save_file(tensors | {last: tensors[last] * 1e9}, source / SINGLE)
    with pytest.raises(CheckpointError, match=last):
        to_hf(source, tmp_path / "target", "float16", 20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_killed_conversion_shows_nothing_and_can_be_repeated(source, tmp_path):
    """A child process dies without a chance to clean up, in the middle of the shards."""
    target = tmp_path / "target"

    def die(done: int, total: int) -> None:
        if 2 * done > total:
            os._exit(9)

    child = os.fork()
    if child == 0:
        to_hf(source, target, "float32", 20_000, die)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not target.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name != "source"]  # it had begun
    to_hf(source, target, "float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


class StoppedError(Exception):
    """Stands for a kill: nothing here catches it."""


def stop_at(share):
    def progress(done, total):
        if done >= share * total:
            raise StoppedError

    return progress


@pytest.mark.parametrize("dtype", [None, "bfloat16", "fp8"])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_a_stopped_conversion_goes_on_and_ends_in_the_same_bytes(source, tmp_path, dtype, share):
    to_hf(source, tmp_path / "whole", dtype, 9_000)
    with pytest.raises(StoppedError):
        to_hf(source, tmp_path / "target", dtype, 9_000, stop_at(share))
    assert not (tmp_path / "target").exists()
    steps = []
    to_hf(source, tmp_path / "target", dtype, 9_000, lambda *step: steps.append(step[0]))
    assert steps[0] > 1  # what was done was not done again
    whole, again = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "target")
    )
    assert again == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target", "whole"]


@pytest.mark.parametrize("change", ["a shard", "the source", "the dtype"])
def test_what_does_not_fit_any_more_is_done_again(source, tmp_path, change):
    target, dtype = tmp_path / "target", "bfloat16"
    with pytest.raises(StoppedError):
        to_hf(source, target, dtype, 9_000, stop_at(0.6))
    if change == "a shard":
        first = next(tmp_path.glob(".target.partial/.model-00001*"))
        first.write_bytes(first.read_bytes()[:-1] + b"x")
    elif change == "the source":
        os.utime(source / SINGLE, ns=(1, 1))
    else:
        dtype = "float32"
    limit = 9_000 if change == "a shard" else 60_000  # fewer shards than the first try's
    steps = []
    to_hf(source, target, dtype, limit, lambda *step: steps.append(step[0]))
    assert steps[0] == 1
    to_hf(source, tmp_path / "whole", dtype, limit)
    whole, again = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "target")
    )
    assert again == whole  # nothing of the first try is left, hidden files neither


def test_checksums_are_those_of_sha256sum_and_are_held_to(source, tmp_path):
    target = tmp_path / "target"
    to_hf(source, target, "bfloat16", 30_000)
    checked = subprocess.run(  # the system's own tool, not ours
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],  # noqa: S607
        cwd=target,
        capture_output=True,
        check=True,
    )
    shards = sorted(target.glob("*.safetensors"))
    assert checked.stdout.count(b": OK") == len(shards) > 1
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    steps = []
    with pytest.raises(CheckpointError, match=rf"{shards[0].name} has SHA-256 .*get it again"):
        verify(target, lambda *step: steps.append(step))
    assert steps == [(0, len(shards))]
    words = ["convert", str(target), str(tmp_path / "copy")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "get it again" in refused.output
    assert not (tmp_path / "copy").exists()
    assert CliRunner().invoke(app, [*words, "--no-check"]).exit_code == 0
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"lists {shards[0].name}, which is not in"):
        verify(target, lambda *_: None)
    (target / "SHA256SUMS").write_text("no sum\n")
    with pytest.raises(CheckpointError, match="no checksum: 'no sum'"):
        verify(target, lambda *_: None)
    (target / "SHA256SUMS").unlink()
    assert verify(target, lambda *_: None) == 0


def test_ranks_slices_are_all_experts_and_what_else_there_is(source, tmp_path):
    experts = RELEASED.config["n_routed_experts"]
    whole, met = stored(source), []
    for rank in range(2):
        to_hf(source, tmp_path / f"{rank}", experts=ExpertSlice(rank, 2))
        found = stored(tmp_path / f"{rank}")
        for name, array in found.items():
            np.testing.assert_array_equal(array, whole[name])
        numbers = {
            int(name.split(".experts.")[1].split(".")[0]) for name in found if ".experts." in name
        }
        assert numbers == set(range(rank * experts // 2, (rank + 1) * experts // 2))
        met.append(set(found))
        config = json.loads((tmp_path / f"{rank}" / "config.json").read_text())
        assert config["expert_slice"] == {"rank": rank, "of": 2}
    assert met[0] | met[1] == set(whole)
    assert {name for name in whole if ".mlp.experts." not in name} == met[0] & met[1]
    with pytest.raises(CheckpointError, match=r"missing|experts"):
        CausalLM.from_pretrained(tmp_path / "0")


def test_experts_that_cannot_be_shared_out_are_named(source, tmp_path):
    with pytest.raises(CheckpointError, match="experts can't be shared out evenly to 3 ranks"):
        to_hf(source, tmp_path / "target", experts=ExpertSlice(0, 3))
    for wrong in ("8/8", "x", "1", "-1/4", "1/0"):
        with pytest.raises(CheckpointError, match=f"experts is '{wrong}'; it must be RANK/OF"):
            ExpertSlice.parse(wrong)
    assert ExpertSlice.parse("3/8") == ExpertSlice(3, 8)


def test_a_broken_source_is_named(source, tmp_path):
    (source / SINGLE).write_bytes((source / SINGLE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=SINGLE):
        to_hf(source, tmp_path / "target")
    with pytest.raises(CheckpointError, match="missing"):
        to_hf(tmp_path / "nowhere", tmp_path / "target")
    (tmp_path / "bad.keras").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match=r"bad\.keras"):
        to_hf(tmp_path / "bad.keras", tmp_path / "target")
    with pytest.raises(CheckpointError, match=r"end in \.keras"):
        to_keras(source, tmp_path / "target")


def test_a_keras_file_of_another_model_is_named(tmp_path):
    other = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    other.save(tmp_path / "other.keras")
    with pytest.raises(CheckpointError, match=r"other\.keras holds a Sequential, not a CausalLM"):
        to_hf(tmp_path / "other.keras", tmp_path / "target")
    with pytest.raises(CheckpointError, match="is a file"):
        to_keras(tmp_path / "other.keras", tmp_path / "again.keras")


def test_no_room_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)  # noqa: ARG005
    with pytest.raises(CheckpointError, match=r"no room.* 100 free"):
        to_hf(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
