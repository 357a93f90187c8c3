"""Each transform computes the released product, and is undone exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_model.checkpoint.layout import Entry, Tensor, Transform
from ds_model.checkpoint.transforms import blocks, places

D, I, E = 5, 3, 4  # noqa: E741 - the letters of the layout
NUMBERS = np.random.default_rng(0)


def entry(transform, shape, *shapes):
    return Entry("x", shape, transform, tuple(Tensor(f"t{i}", s) for i, s in enumerate(shapes)))


CASES = {
    Transform.COPY: entry(Transform.COPY, (D,), (D,)),
    Transform.TRANSPOSE: entry(Transform.TRANSPOSE, (D, I), (I, D)),
    Transform.GATE_UP: entry(Transform.GATE_UP, (D, 2 * I), (I, D), (I, D)),
    Transform.EXPERTS: entry(Transform.EXPERTS, (E, I, D), *[(D, I)] * E),
    Transform.EXPERTS_GATE_UP: entry(Transform.EXPERTS_GATE_UP, (E, D, 2 * I), *[(I, D)] * (2 * E)),
}


def join(which, files):
    """The variable that `files` make, as loading makes it."""
    value = np.empty(which.shape, next(iter(files.values())).dtype)
    for name, place in places(which, value):
        place[...] = files[name]
    return value


def tensors(which, dtype=np.float32):
    return {s.name: NUMBERS.normal(size=s.shape).astype(dtype) for s in which.sources}


@pytest.mark.parametrize("which", CASES.values(), ids=[case.value for case in CASES])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_places_hold_what_was_filled_in_bit_for_bit(which, dtype):
    files = tensors(which, dtype)
    value = join(which, files)
    assert value.shape == which.shape
    back = dict(places(which, value))
    assert list(back) == list(files)
    for name, array in files.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_gate_comes_before_up():
    which = CASES[Transform.GATE_UP]
    files = tensors(which)
    x = NUMBERS.normal(size=D).astype(np.float32)
    expected = np.concatenate([files["t0"] @ x, files["t1"] @ x])
    np.testing.assert_allclose(x @ join(which, files), expected, rtol=1e-5)


@given(st.integers(0, E - 1))
def test_expert_keeps_its_place(expert):
    up_and_gate, down = CASES[Transform.EXPERTS_GATE_UP], CASES[Transform.EXPERTS]
    files = tensors(up_and_gate)
    x = np.ones(D, np.float32)
    expected = np.concatenate([files[f"t{2 * expert}"] @ x, files[f"t{2 * expert + 1}"] @ x])
    stacked = join(up_and_gate, files)
    np.testing.assert_allclose(x @ stacked[expert], expected, rtol=1e-4, atol=1e-6)
    files = tensors(down)
    np.testing.assert_array_equal(join(down, files)[expert], files[f"t{expert}"].T)


@pytest.mark.parametrize("which", CASES.values(), ids=[case.value for case in CASES])
def test_the_places_cover_the_variable_once(which):
    counts = np.zeros(which.shape, int)
    for source, (name, place) in zip(which.sources, places(which, counts), strict=True):
        assert (name, place.shape) == (source.name, source.shape)
        np.add(place, 1, out=place)
    np.testing.assert_array_equal(counts, 1)


@given(st.integers(0, 5000), st.integers(1, 40_000))
def test_blocks_are_all_rows_in_order(rows, columns):
    tensor = np.broadcast_to(np.zeros(1, np.float32), (rows, columns))
    pieces = list(blocks(tensor))
    assert [row for piece in pieces for row in range(rows)[piece]] == list(range(rows))
    for piece in pieces:
        assert tensor[piece].nbytes <= max(2**18, 64 * 4 * columns)
