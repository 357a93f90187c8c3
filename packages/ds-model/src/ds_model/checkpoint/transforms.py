"""Tensors on disk to variables and back, as numpy arrays: the layout's transforms carried out."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ds_model.checkpoint.layout import Entry, Transform

Array = NDArray[np.generic]


def join(entry: Entry, read: Callable[[str], Array]) -> Array:
    """The variable's value, in the dtype of the files; each source is read once.

    Args:
        entry: which variable, and how it is made.
        read: gives the array of a tensor name; the shape must be the entry's source shape.

    Returns:
        Array of `entry.shape`. Experts are copied into place one at a time, so that the peak
        is the stacked array and one expert.
    """
    names = [source.name for source in entry.sources]
    match entry.transform:
        case Transform.COPY:
            return read(names[0])
        case Transform.TRANSPOSE:
            return read(names[0]).T
        case Transform.GATE_UP:
            return np.concatenate([read(names[0]), read(names[1])], axis=0).T
        case Transform.EXPERTS:
            return _stacked(entry, ((read(name).T,) for name in names))
        case Transform.EXPERTS_GATE_UP:
            pairs = zip(names[::2], names[1::2], strict=True)
            return _stacked(entry, ((read(gate).T, read(up).T) for gate, up in pairs))


def split(entry: Entry, value: Array) -> Iterator[tuple[str, Array]]:
    """The tensors on disk that `value` becomes: the inverse of `join`, contiguous, same dtype."""
    names = [source.name for source in entry.sources]
    match entry.transform:
        case Transform.COPY:
            arrays: Iterator[Array] = iter((value,))
        case Transform.TRANSPOSE:
            arrays = iter((value.T,))
        case Transform.GATE_UP:
            arrays = iter(np.split(value.T, 2, axis=0))
        case Transform.EXPERTS:
            arrays = (expert.T for expert in value)
        case Transform.EXPERTS_GATE_UP:
            arrays = (half for expert in value for half in np.split(expert.T, 2, axis=0))
    for name, array in zip(names, arrays, strict=True):
        yield name, np.ascontiguousarray(array)


def _stacked(entry: Entry, experts: Iterator[tuple[Array, ...]]) -> Array:
    first = next(experts)
    stack = np.empty(entry.shape, first[0].dtype)
    np.concatenate(first, axis=1, out=stack[0])
    for index, expert in enumerate(experts, start=1):
        np.concatenate(expert, axis=1, out=stack[index], casting="unsafe")
    return stack
