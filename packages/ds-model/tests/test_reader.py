"""Files are opened whole or refused with a line that names what is wrong."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from ds_model.checkpoint.reader import INDEX, SINGLE, TensorFiles
from ds_model.errors import CheckpointError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4).astype(ml_dtypes.bfloat16)


def sharded(directory: Path, **weight_map: str) -> Path:
    save_file({"a": A}, directory / "one.safetensors")
    save_file({"b": B}, directory / "two.safetensors")
    weight_map = weight_map or {"a": "one.safetensors", "b": "two.safetensors"}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorFiles(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reads_shards_by_index(tmp_path):
    with TensorFiles(sharded(tmp_path)) as files:
        assert files.names == ["a", "b"]
        assert files.shape("a") == (2, 3)
        assert (files.dtype("a"), files.dtype("b")) == ("F32", "BF16")
        np.testing.assert_array_equal(files.read("a"), A)
        np.testing.assert_array_equal(files.read("b"), B)
        assert files.read("b").dtype == ml_dtypes.bfloat16


def test_single_file_wins_over_index_as_in_transformers(tmp_path):
    save_file({"a": 2 * A}, sharded(tmp_path) / SINGLE)
    with TensorFiles(tmp_path) as files:
        assert files.names == ["a"]
        np.testing.assert_array_equal(files.read("a"), 2 * A)


def test_names_a_place_that_is_no_directory(tmp_path):
    assert "missing" in refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "a file" in refused(tmp_path / "file")


def test_names_what_a_directory_lacks(tmp_path):
    assert SINGLE in refused(tmp_path)
    (sharded(tmp_path) / "two.safetensors").unlink()
    assert "two.safetensors" in refused(tmp_path)


@pytest.mark.parametrize(
    "outside", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "", ".", ".."]
)
def test_refuses_an_index_that_leaves_the_directory(tmp_path, outside):
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file({"a": A}, tmp_path / "one.safetensors")
    assert outside in refused(sharded(inner, a=outside))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"],
)
def test_refuses_a_broken_index(tmp_path, text):
    (sharded(tmp_path) / INDEX).write_bytes(text.encode("latin-1"))
    assert INDEX in refused(tmp_path)


def test_refuses_an_index_nested_without_end(tmp_path):
    (sharded(tmp_path) / INDEX).write_text("[" * 200_000)
    assert INDEX in refused(tmp_path)


def test_refuses_a_tensor_that_its_file_lacks_or_two_files_hold(tmp_path):
    message = refused(sharded(tmp_path, a="two.safetensors", b="two.safetensors"))
    assert "tensor a" in message
    save_file({"a": A, "b": B}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    assert "tensor a is in both" in refused(tmp_path)


def test_refuses_fp8_without_scales_by_tensor(tmp_path):
    save_file({"w": np.zeros((2, 2), ml_dtypes.float8_e4m3fn)}, tmp_path / SINGLE)
    with (
        TensorFiles(tmp_path) as files,
        pytest.raises(CheckpointError, match=r"tensor w is F8_E4M3, and w_scale_inv is missing"),
    ):
        files.read("w")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_within_its_bounds(data, tmp_path_factory):
    """Truncation anywhere, and any overwritten byte of the header."""
    directory = tmp_path_factory.mktemp("damaged")
    whole = save({"a": A, "b": B})
    content = damaged(data, whole)
    (directory / SINGLE).write_bytes(content)
    try:
        with TensorFiles(directory) as files:
            for name in files.names:
                shape, dtype = files.shape(name), files.dtype(name)
                if dtype in ("F32", "BF16", "F16"):
                    assert files.read(name).shape == shape
    except CheckpointError as error:
        assert SINGLE in str(error)  # noqa: PT017 - a good file raises nothing
    else:
        assert len(content) == len(whole)


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24 * 10**12]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}},
        {
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [12, 36]},
        },
        {"a": {"dtype": "F33", "shape": [2, 3], "data_offsets": [0, 24]}},
    ],
    ids=["beyond the file", "overflow", "backwards", "overlap", "unknown dtype"],
)
def test_refuses_a_lying_header(tmp_path, entries):
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(36)
    (tmp_path / SINGLE).write_bytes(content)
    assert SINGLE in refused(tmp_path)


def test_refuses_a_header_length_beyond_reason(tmp_path):
    (tmp_path / SINGLE).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert SINGLE in refused(tmp_path)
