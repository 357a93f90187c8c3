"""Memory that numpy writes and TensorFlow then takes over as it is, without a copy.

`tf.constant` and `Variable.assign` copy an array, since its owner could still write to it.
TensorFlow takes what comes by DLPack as it lies, if it lies at an address that suits vector
instructions.
"""

from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from ds_model.checkpoint.layout import Shape

_ALIGNMENT = 64  # what TensorFlow asks for: one AVX-512 register


def aligned(shape: Shape, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """An array of `shape` without values, at an address that TensorFlow accepts."""
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def as_tensor(array: NDArray[np.generic]) -> tf.Tensor:
    """The array as a tensor on the same memory: write no more to the array afterwards.

    Args:
        array: contiguous, of a type of 1, 2 or 4 bytes; copied if not from `aligned`, or E4M3.
    """
    # The import does not look at the address, and operations abort; floats of 8 bits can't be cast.
    if array.ctypes.data % _ALIGNMENT or array.dtype == ml_dtypes.float8_e4m3fn:
        return tf.constant(array)
    # As bits: DLPack has bfloat16, and numpy's part of it has not.
    same_size: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
    bits: NDArray[np.integer] = array.view(same_size[array.itemsize])
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(bits.__dlpack__()), array.dtype)
