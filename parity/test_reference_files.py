"""The committed reference files are what transformers says today."""

from __future__ import annotations

import numpy as np
import pytest
import reference_file
from reference_cases import COMMITTED, Case

from parity import layers
from parity.measure import relative
from parity.write_references import numbers


def assert_same(committed: dict[str, np.ndarray], today: dict[str, np.ndarray]) -> None:
    assert committed.keys() == today.keys()
    for name, array in today.items():
        if array.dtype == np.float32:
            # Another machine's kernels add up in another order.
            assert relative(committed[name], array) < 1e-5, name
        else:
            np.testing.assert_array_equal(committed[name], array, err_msg=name)


@pytest.mark.parametrize("case", COMMITTED, ids=lambda case: case.name)
def test_model(case: Case) -> None:
    assert_same(reference_file.read(case), numbers(case))


@pytest.mark.parametrize("layer", layers.LAYERS, ids=lambda layer: f"{layer.package}-{layer.name}")
def test_layer(layer: layers.Layer) -> None:
    with np.load(layer.path) as committed:
        assert_same(dict(committed), layers.numbers(layer))


def test_all_are_there_and_small() -> None:
    wanted = {reference_file.path_of(case) for case in COMMITTED}
    wanted |= {layer.path for layer in layers.LAYERS}
    files = set(layers.PACKAGES.glob("*/tests/reference/*"))
    assert files == wanted
    assert sum(file.stat().st_size for file in files) < 3_000_000
