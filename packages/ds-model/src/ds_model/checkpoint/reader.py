"""Reading a released directory: which file holds which tensor, checked before anything is loaded.

One `model.safetensors`, or shards named by `model.safetensors.index.json`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ds_model.checkpoint.fp8 import BLOCK, SCALES, Fp8Matrix, block_of
from ds_model.checkpoint.layout import Shape
from ds_model.checkpoint.mapped_file import MappedFile
from ds_model.checkpoint.packed import (
    PACKED,
    PARTS,
    SCALE,
    SHAPE,
    PackedMatrix,
    check_parts,
    check_shape,
    is_packed,
    names_of,
)
from ds_model.checkpoint.transforms import Array, Matrix
from ds_model.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PLAIN = ("F32", "BF16", "F16")
_MAX_INDEX_BYTES = 64 * 2**20  # V3's own index is 9 MB; a lying one must not fill memory


class TensorFiles:
    """The tensors of one directory, by name; a context manager that holds the files mapped.

    An FP8 weight and its scales are one tensor here, whose numbers are their products; so are the
    parts of a matrix of whole numbers, see `packed`.

    Args:
        directory: holds `model.safetensors`, or an index and its shards.

    Raises:
        CheckpointError: no such directory, no weights, a broken or missing file, an index that
            names a file outside the directory or a tensor that its file does not hold; weights
            quantized in another way than the released ones.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = check_directory(directory)
        self._files: dict[str, MappedFile] = {}
        self.file_of: dict[str, str] = {}
        self._open_all()
        path = self._directory / "config.json"
        config = read_json(path) if path.is_file() else {}
        packed = names_of(self.file_of) if is_packed(config) else []
        self._packed: dict[str, Shape | None] = dict.fromkeys(packed)
        self._block = BLOCK if self._packed else block_of(config)
        self._scales_of = {
            name: name + SCALES
            for name in self.file_of
            if self.dtype(name) == "F8_E4M3" and name + SCALES in self.file_of
        }

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

    def __contains__(self, name: str) -> bool:
        """Say whether there is a tensor of that name, be it in parts."""
        return name in self.file_of or name in self._packed

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files; those in parts by their whole's name."""
        whole = dict.fromkeys(self._scales_of.values(), "")
        for name in self._packed:
            whole |= {name + PACKED: name, name + SCALE: "", name + SHAPE: ""}
        return [found for name in self.file_of if (found := whole.get(name, name))]

    @property
    def stored_names(self) -> list[str]:
        """The same part by part, for those who want bytes as they are."""
        return list(self.file_of)

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum((self._directory / file).stat().st_size for file in self._files)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the header; of whole numbers, from where it is noted."""
        if name in self._packed:
            return self._shape_of_parts(name)
        return self._file(name).tensors[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors names it, such as `BF16`, from the header; or INT4."""
        if name in self._packed:
            words = self._file(name + PACKED).tensors[name + PACKED].shape[-1]
            return f"INT{words * 32 // max(1, self.shape(name)[-1])}"
        return self._file(name).tensors[name].dtype

    def is_small(self, name: str) -> bool:
        """Say whether a tensor is stored as small numbers and scales."""
        return name in self._packed or name in self._scales_of

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor lies: the number of its file, and the first byte in it."""
        part = name + PACKED if name in self._packed else name
        return list(self._files).index(self.file_of[part]), self._file(part).tensors[part].start

    def read(self, name: str) -> Matrix:
        """The tensor as a read-only array in the mapped file (BF16 as `ml_dtypes.bfloat16`).

        Raises:
            CheckpointError: as for `check_dtype`.
        """
        self.check_dtype(name)
        if name in self._packed:
            packed, scales = self.stored(name + PACKED), self.stored(name + SCALE)
            return PackedMatrix(packed, scales, self.shape(name)[1])
        values = self.stored(name)
        if (scale := self._scales_of.get(name)) is not None:
            return Fp8Matrix(values, self.stored(scale), self._block)
        return values

    def stored(self, name: str) -> Array:
        """A tensor's numbers as they lie in the file, FP8 without its scales."""
        return self._file(name).read(name)

    @contextmanager
    def borrow(self, name: str) -> Iterator[Matrix]:
        """What `read` gives, for one pass over it: its pages are given back afterwards.

        Raises:
            CheckpointError: as for `read`.
        """
        yield self.read(name)
        part = name + PACKED if name in self._packed else name
        self._file(part).release(part)

    def check_dtype(self, name: str) -> None:
        """Refuse a tensor that can't be read.

        Raises:
            CheckpointError: a dtype other than F32, BF16, F16, F8_E4M3 with scales of their shape,
                and whole numbers of 4 or 8 bits with all their parts.
        """
        if name in self._packed:
            shape = self.shape(name)  # which looks at the parts first
            parts = [self._file(name + part).tensors[name + part] for part in (PACKED, SCALE)]
            check_shape(name, shape, *(part.shape for part in parts))
            return
        dtype = self.dtype(name)
        if dtype == "F8_E4M3":
            self._check_scales(name)
        elif dtype not in PLAIN:
            message = (
                f"tensor {name} has dtype {dtype}, and {', '.join(PLAIN)} and F8_E4M3 are read"
            )
            raise CheckpointError(message)

    def _shape_of_parts(self, name: str) -> Shape:
        known = self._packed[name]
        if known is not None:
            return known
        found = {}
        for suffix in PARTS:
            if (part := name + suffix) in self.file_of:
                stored = self._file(part).tensors[part]
                found[suffix] = (stored.dtype, stored.shape)
        check_parts(name, found)
        shape: Shape = tuple(self.stored(name + SHAPE).tolist())
        self._packed[name] = shape
        return shape

    def _check_scales(self, name: str) -> None:
        scales = name + SCALES
        if scales not in self.file_of:
            raise CheckpointError(f"tensor {name} is F8_E4M3, and {scales} is missing")
        if self.dtype(scales) not in ("F32", "BF16", "F8_E8M0"):
            message = f"tensor {scales} has dtype {self.dtype(scales)}; F32, BF16, F8_E8M0 are read"
            raise CheckpointError(message)
        blocks = tuple(
            -(-size // of) for size, of in zip(self.shape(name), self._block, strict=False)
        )
        if len(self.shape(name)) != len(self._block) or self.shape(scales) != blocks:
            rows, columns = self._block
            message = (
                f"tensor {scales} is {list(self.shape(scales))}; {list(self.shape(name))} in "
                f"blocks of {rows}x{columns} need {list(blocks)}"
            )
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
