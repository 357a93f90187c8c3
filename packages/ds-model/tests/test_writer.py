"""Shards as the format wants them, and nothing half-written under a final name."""

import json
import resource
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from ds_model.checkpoint.mapped_file import READABLE, MappedFile
from ds_model.checkpoint.reader import INDEX, SINGLE, TensorFiles
from ds_model.checkpoint.writer import TensorWriter
from ds_model.errors import CheckpointError

DTYPES = [np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)]
NUMBERS = np.random.default_rng(0)


def write(directory, arrays, limit=10**9):
    with TensorWriter(directory, limit) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
        writer.finish()


def read(directory):
    with TensorFiles(directory) as files:
        return {name: np.array(files.read(name)) for name in files.names}


def arrays(count, size=10, value=1.0):
    return {f"t{i}": np.full(size, value + i, np.float32) for i in range(count)}


@contextmanager
def full_disk(after):
    """Any file that grows beyond `after` bytes fails, as on a disk without room."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8), limit=st.integers(4, 200))
def test_what_is_written_is_read(sizes, limit, tmp_path_factory):
    directory = tmp_path_factory.mktemp("w")
    written = {f"t{i}": np.arange(size, dtype=np.float32) for i, size in enumerate(sizes)}
    write(directory, written, limit)
    found = read(directory)
    assert found.keys() == written.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(found[name], array)
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            held = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(held) <= limit or len([size for size in held if size]) == 1


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_tensors_are_stored_rounded_and_aligned_whatever_their_strides(kinds, tmp_path_factory):
    directory = tmp_path_factory.mktemp("w")
    expected = {}
    with TensorWriter(directory) as writer:
        for i, (own, dtype, transposed) in enumerate(kinds):
            array = NUMBERS.normal(size=(3, 5)).astype(own)
            array = array.T if transposed else array
            writer.add(f"t{i}", array, dtype)
            expected[f"t{i}"] = array.astype(dtype)
        writer.finish()
    with safe_open(directory / SINGLE, "numpy") as opened:
        for name, array in expected.items():
            found = opened.get_tensor(name)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
    for stored in MappedFile(directory / SINGLE).tensors.values():
        assert stored.start % READABLE[stored.dtype].itemsize == 0


def test_shards_and_index_have_the_released_names(tmp_path):
    write(tmp_path, arrays(3), limit=50)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        INDEX,
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 120
    assert index["weight_map"]["t1"] == "model-00002-of-00003.safetensors"


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    tensors = {
        "b.weight": NUMBERS.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "a.10.weight": NUMBERS.normal(size=(5, 7)).astype(ml_dtypes.bfloat16),
        "a.2.weight": NUMBERS.normal(size=(1,)).astype(ml_dtypes.bfloat16),
        "empty": np.empty((0, 4), ml_dtypes.bfloat16),
        "c.bias": NUMBERS.normal(size=11).astype(np.float32),
    }
    write(tmp_path, tensors)
    assert (tmp_path / SINGLE).read_bytes() == save(tensors, {"format": "pt"})


def test_file_says_pt_and_can_be_read_by_others(tmp_path):
    write(tmp_path, arrays(1))
    with safe_open(tmp_path / SINGLE, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
    (tmp_path / "usual").touch()
    assert (tmp_path / SINGLE).stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(("before", "after"), [(50, 10**9), (10**9, 50), (50, 50), (50, 90)])
def test_a_new_checkpoint_replaces_an_old_one_whole(tmp_path, before, after):
    write(tmp_path, arrays(3), before)
    write(tmp_path, arrays(3, value=7.0), after)
    assert {name: array[0] for name, array in read(tmp_path).items()} == {
        "t0": 7,
        "t1": 8,
        "t2": 9,
    }
    assert (tmp_path / SINGLE).exists() != (tmp_path / INDEX).exists()


def test_leaving_without_finish_leaves_nothing(tmp_path):
    with TensorWriter(tmp_path, 50) as writer:
        for name, array in arrays(3).items():
            writer.add(name, array)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(tmp_path):
    write(tmp_path, arrays(1))
    with full_disk(4096), pytest.raises(CheckpointError, match="can't be written"):
        write(tmp_path, arrays(1, size=5000, value=5.0))
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert read(tmp_path)["t0"][0] == 1


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file"):
        TensorWriter(tmp_path / "file")
