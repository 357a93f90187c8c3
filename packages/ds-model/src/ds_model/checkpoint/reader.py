"""Reading a released directory: which file holds which tensor, checked before anything is loaded.

One `model.safetensors`, or shards named by `model.safetensors.index.json`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ds_model.checkpoint.layout import Shape
from ds_model.checkpoint.mapped_file import READABLE, MappedFile
from ds_model.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 * 2**20  # V3's own index is 9 MB; a lying one must not fill memory


class TensorFiles:
    """The tensors of one directory, by name; a context manager that holds the files mapped.

    Args:
        directory: holds `model.safetensors`, or an index and its shards.

    Raises:
        CheckpointError: no such directory, no weights, a broken or missing file, an index that
            names a file outside the directory or a tensor that its file does not hold.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = check_directory(directory)
        self._files: dict[str, MappedFile] = {}
        self.file_of: dict[str, str] = {}
        self._open_all()

    def __enter__(self) -> Self:
        """Return the open files."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the files; arrays that were read stay valid, and keep theirs mapped."""
        self._files.clear()

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return list(self.file_of)

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum((self._directory / file).stat().st_size for file in self._files)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the header."""
        return self._file(name).tensors[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors names it, such as `BF16`, from the header."""
        return self._file(name).tensors[name].dtype

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor lies: the number of its file, and the first byte in it."""
        return list(self._files).index(self.file_of[name]), self._file(name).tensors[name].start

    def read(self, name: str) -> NDArray[np.generic]:
        """The tensor as a read-only array in the mapped file (BF16 as `ml_dtypes.bfloat16`).

        Raises:
            CheckpointError: a dtype other than F32, BF16 and F16.
        """
        self.check_dtype(name)
        return self._file(name).read(name)

    @contextmanager
    def borrow(self, name: str) -> Iterator[NDArray[np.generic]]:
        """What `read` gives, for one pass over it: its pages are given back afterwards.

        Raises:
            CheckpointError: a dtype other than F32, BF16 and F16.
        """
        yield self.read(name)
        self._file(name).release(name)

    def check_dtype(self, name: str) -> None:
        """Refuse a tensor that can't be read.

        Raises:
            CheckpointError: a dtype other than F32, BF16 and F16.
        """
        dtype = self.dtype(name)
        if dtype not in READABLE:
            hint = "convert the checkpoint to BF16 first" if dtype.startswith("F8") else "not read"
            message = f"tensor {name} has dtype {dtype}, and {', '.join(READABLE)} are read: {hint}"
            raise CheckpointError(message)

    def _file(self, name: str) -> MappedFile:
        return self._files[self.file_of[name]]

    def _open_all(self) -> None:
        if (self._directory / SINGLE).is_file():
            for name in self._open(SINGLE):
                self.file_of[name] = SINGLE
            return
        if not (self._directory / INDEX).is_file():
            raise CheckpointError(f"{self._directory} holds neither {SINGLE} nor {INDEX}")
        listed = _read_index(self._directory / INDEX)
        for file in dict.fromkeys(listed.values()):
            for name in self._open(file):
                if name in self.file_of:
                    message = f"tensor {name} is in both {self.file_of[name]} and {file}"
                    raise CheckpointError(message)
                self.file_of[name] = file
        for name, file in listed.items():
            if self.file_of.get(name) != file:
                raise CheckpointError(f"{INDEX} places tensor {name} in {file}, which lacks it")

    def _open(self, file: str) -> Iterable[str]:
        path = self._directory / file
        if not path.is_file():
            raise CheckpointError(f"{INDEX} names {file}, which is not in {self._directory}")
        self._files[file] = MappedFile(path)
        return self._files[file].tensors


def check_directory(directory: Path | str) -> Path:
    """The directory as a path.

    Raises:
        CheckpointError: it does not exist, or is a file.
    """
    path = Path(directory)
    if not path.is_dir():
        what = "a file" if path.exists() else "missing"
        raise CheckpointError(f"{path} is {what}: a checkpoint is a directory with config.json")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        CheckpointError: missing, too large, not UTF-8, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_INDEX_BYTES // 2**20} MiB")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, and holds {type(value).__name__}")
    return value


def _read_index(path: Path) -> Mapping[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            message = f"{path} places tensor {name} in {file!r}, not a file name in its directory"
            raise CheckpointError(message)
    return listed
