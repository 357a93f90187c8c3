"""Tensors on disk to variables and back, as numpy arrays: the layout's transforms carried out.

Both ways go through the same views: where in a variable each tensor on disk has its place.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ds_model.checkpoint.fp8 import Fp8Matrix
from ds_model.checkpoint.layout import Entry, Transform
from ds_model.checkpoint.packed import PackedMatrix

Array = NDArray[np.generic]
Matrix = Array | Fp8Matrix | PackedMatrix

_BLOCK_BYTES = 2**18  # stays in a core's cache between reading it and writing it transposed
_BLOCK_ROWS = 64  # 64 rows of a tensor fill whole cache lines of its transpose


def places(entry: Entry, value: Array) -> Iterator[tuple[str, Array]]:
    """Where each tensor on disk lies in the variable.

    Args:
        entry: which variable, and how it is made.
        value: array of `entry.shape`, of any dtype.

    Yields:
        The tensor's name and a view of `value` in the tensor's own shape, to read or to write.
    """
    names = [source.name for source in entry.sources]
    match entry.transform:
        case Transform.COPY:
            views: Iterator[Array] = iter((value,))
        case Transform.TRANSPOSE:
            views = iter((value.T,))
        case Transform.GATE_UP:
            views = iter(np.split(value.T, 2, axis=0))
        case Transform.EXPERTS:
            views = (expert.T for expert in value)
        case Transform.EXPERTS_GATE_UP:
            views = (half for expert in value for half in np.split(expert.T, 2, axis=0))
    yield from zip(names, views, strict=True)


def blocks(tensor: Matrix) -> Iterator[slice]:
    """The rows of a tensor in pieces, for one pass over it.

    Each fits a core's cache: a transposed copy of the whole jumps through all of memory for each
    column, and takes three times as long.
    """
    row_bytes = tensor.nbytes // max(1, len(tensor))
    step = max(_BLOCK_ROWS, _BLOCK_BYTES // max(1, row_bytes))
    for first in range(0, len(tensor), step):
        yield slice(first, first + step)
