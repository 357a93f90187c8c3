"""Conversions keep every value they can, and show nothing until they are whole."""

import json
import os
import shutil

import keras
import ml_dtypes
import numpy as np
import pytest
from reference_cases import CASES
from reference_weights import weights, write_checkpoint
from safetensors.numpy import save_file

from ds_model import CausalLM, CheckpointError, ModelConfig
from ds_model.checkpoint.convert import to_hf, to_keras
from ds_model.checkpoint.reader import SINGLE, TensorFiles

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
    assert names == {"config.json", SINGLE, "tokenizer.json", "chat_template.jinja"}


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
