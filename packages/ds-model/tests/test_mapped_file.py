"""A mapped file gives the tensors that safetensors gives, from any offset."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.numpy import save_file

from ds_model.checkpoint.mapped_file import MappedFile

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)


@settings(max_examples=50, deadline=None)
@given(kinds=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6))
def test_reads_what_safetensors_reads(kinds, tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "some.safetensors"
    numbers = np.random.default_rng(0)
    written = {f"t{i}": numbers.normal(size=s).astype(d) for i, (s, d) in enumerate(kinds)}
    save_file(written, path, metadata={"format": "pt"})
    file = MappedFile(path)
    with safe_open(path, framework="numpy") as theirs:
        assert file.tensors.keys() == set(theirs.keys())
        for name in file.tensors:
            expected = theirs.get_tensor(name)
            array = file.read(name)
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
            np.testing.assert_array_equal(array, written[name])


def test_reads_a_tensor_at_an_odd_address(tmp_path):
    """The format lets a tensor of two-byte numbers push the next one off its alignment."""
    entries = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]},
        "a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
    }
    header = json.dumps(entries).encode()
    data = np.float16(1.5).tobytes() + np.float32([2.5, -3.5]).tobytes()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    file = MappedFile(path)
    assert list(file.tensors) == ["a", "b"]
    np.testing.assert_array_equal(file.read("a"), [1.5])
    np.testing.assert_array_equal(file.read("b"), [2.5, -3.5])


@pytest.fixture
def large(tmp_path):
    values = np.arange(3_000_000, dtype=np.float32)
    save_file({"a": values, "b": -values}, tmp_path / "large.safetensors")
    return MappedFile(tmp_path / "large.safetensors"), values


def test_arrays_stay_valid_when_pages_are_given_back_and_the_file_let_go(large):
    file, values = large
    a, b = file.read("a"), file.read("b")
    file.release("a")
    file.release("b")
    del file
    np.testing.assert_array_equal(a, values)
    np.testing.assert_array_equal(b, -values)


def test_nobody_writes_to_the_file(large):
    file, _ = large
    with pytest.raises(ValueError, match="read-only"):
        file.read("a")[0] = 1
