"""The committed reference files are what transformers says today."""

from __future__ import annotations

import numpy as np
import pytest
import reference_file
from reference_cases import COMMITTED, Case

from parity.measure import relative
from parity.write_references import numbers


@pytest.mark.parametrize("case", COMMITTED, ids=lambda case: case.name)
def test_reproduces(case: Case) -> None:
    committed, today = reference_file.read(case), numbers(case)
    assert committed.keys() == today.keys()
    for name, array in today.items():
        if array.dtype == np.int32:
            np.testing.assert_array_equal(committed[name], array, err_msg=name)
        else:
            # Another machine's kernels add up in another order.
            assert relative(committed[name], array) < 1e-5, name


def test_small_enough_to_commit() -> None:
    files = list(reference_file.FOLDER.iterdir())
    assert {file.stem for file in files} == {case.name for case in COMMITTED}
    assert sum(file.stat().st_size for file in files) < 3_000_000
