"""One safetensors file as arrays that lie in the file: nothing is read before it is looked at.

`safetensors` itself judges the file, and refuses headers that lie about sizes or overlap. The
tensors are mapped here, because it gives numpy a copy of each.
"""

import json
import mmap
import sys
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ds_model.checkpoint.layout import Shape
from ds_model.errors import CheckpointError

READABLE: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""What is read, by the name that safetensors gives it; all after the third make small weights."""


class Stored(NamedTuple):
    """A tensor in a file, as the header says.

    Attributes:
        dtype: as safetensors names it, such as `BF16`.
        shape: its shape.
        start: first byte in the file.
        stop: the byte after its last.
    """

    dtype: str
    shape: Shape
    start: int
    stop: int


class MappedFile:
    """A safetensors file, mapped for as long as this object or one of its arrays lives.

    Args:
        path: of the file.

    Attributes:
        tensors: what it holds, by name, in the order of the bytes.

    Raises:
        CheckpointError: it can't be read, is cut off, or its header lies.
    """

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="numpy"), path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
        begin = 8 + int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8:begin])
        header.pop("__metadata__", None)
        found = {
            name: Stored(
                value["dtype"],
                tuple(value["shape"]),
                begin + value["data_offsets"][0],
                begin + value["data_offsets"][1],
            )
            for name, value in header.items()
        }
        self.tensors = dict(sorted(found.items(), key=lambda item: item[1].start))

    def read(self, name: str) -> NDArray[np.generic]:
        """The tensor where it lies in the file: read-only, and perhaps not aligned.

        Raises:
            KeyError: no such tensor, or a dtype that is not in `READABLE`.
        """
        stored = self.tensors[name]
        return np.ndarray(stored.shape, READABLE[stored.dtype], self._map, stored.start)

    def release(self, name: str) -> None:
        """Stop counting the tensor's pages as this process's memory; arrays of it stay valid."""
        if sys.platform != "win32":  # which has no such call, and takes pages back as it needs
            stored = self.tensors[name]
            start = stored.start - stored.start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, stored.stop - start)
