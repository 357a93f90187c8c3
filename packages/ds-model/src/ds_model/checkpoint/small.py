"""Which of a model's weights are kept small for inference, and how they come from files.

Letters: see `layout`.
"""

from collections.abc import Iterator, Sequence
from math import prod

import ml_dtypes
import numpy as np

from ds_model.checkpoint.fp8 import BLOCK, Fp8Matrix, is_quantized
from ds_model.checkpoint.layout import Entry, Shape, Transform, layout
from ds_model.checkpoint.memory import aligned, as_tensor
from ds_model.checkpoint.packed import PackedMatrix
from ds_model.checkpoint.reader import TensorFiles
from ds_model.checkpoint.transforms import blocks, places
from ds_model.config import ModelConfig
from ds_precision import QuantizedWeights

STORED = "stored"
"""Instead of a mode: as the files are."""

_KEPT = (".gate.weight", ".kv_b_proj.kernel")
_HEAD = "lm_head.kernel"
_FORMS = frozenset(
    {Transform.TRANSPOSE, Transform.GATE_UP, Transform.EXPERTS, Transform.EXPERTS_GATE_UP}
)


def small_form(entry: Entry, mode: str) -> str | None:
    """Return the mode that a variable takes in a model of some mode; `None` if it stays as it is.

    Embedding, norms and routers stay, and so does `kv_b_proj`, which decoding takes apart. In
    "fp8" also what the released files keep: the head and the MTP modules' projections. In "int4"
    the head takes "int8", as it does in llama.cpp's files of 4 bits.
    """
    if entry.transform not in _FORMS or entry.path.endswith(_KEPT):
        return None
    if mode == "fp8":
        return mode if is_quantized(entry.sources[0].name) else None
    return "int8" if mode == "int4" and entry.path == _HEAD else mode


def forms_by_name(config: ModelConfig, mode: str) -> dict[str, str]:
    """Return the mode of each tensor on disk that is not kept as it is; whole-number modes.

    Raises:
        CheckpointError: see `layout`.
    """
    found: dict[str, str] = {}
    for entry in layout(config):
        if form := small_form(entry, mode):
            found |= dict.fromkeys((source.name for source in entry.sources), form)
    return found


def bytes_in_memory(config: ModelConfig, mode: str | None) -> int:
    """Return the bytes of a model's weights in a mode; what is not small is bfloat16.

    Routers are float32 in any case.
    """
    total = 0
    for entry in layout(config):
        form = small_form(entry, mode) if mode else None
        wide = 4 if ".gate." in entry.path else 2
        total += round(entry.size * wide if form is None else _bits(entry.shape, form) / 8)
    return total


def _bits(shape: Shape, form: str) -> float:
    *leading, rows, columns = shape
    count = prod(shape)
    if form == "fp8":
        high, wide = BLOCK
        return 8 * count + 32 * prod(leading) * -(-rows // high) * -(-columns // wide)
    groups = 1 if form == "int8_channel" else rows / 32
    return count * (4 if form == "int4" else 8) + 16 * prod(leading) * groups * columns


def stored_small(files: TensorFiles, entries: Sequence[Entry], mode: str) -> set[str]:
    """Return the paths of the variables that the files hold as a model of that mode keeps them.

    With `STORED` that is any small form, but the two products of a feed-forward have the same.
    """
    found = {entry.path: kind for entry in entries if (kind := _stored_kind(files, entry, mode))}
    if mode != STORED:
        return set(found)
    return {path for path, kind in found.items() if found.get(_partner(path)) == kind}


def _partner(path: str) -> str:
    """The other product of a feed-forward; the path itself where there is none."""
    one, two = "gate_up_proj", "down_proj"
    return path.replace(one, two) if one in path else path.replace(two, one)


def _stored_kind(files: TensorFiles, entry: Entry, mode: str) -> tuple[object, ...] | None:
    """What distinguishes a small form from others; `None` if the variable can't take the files'."""
    if mode != STORED:
        form = small_form(entry, mode)
    else:  # any form that the variable can take
        form = STORED if entry.transform in _FORMS and not entry.path.endswith(_KEPT) else None
    if form is None or not all(files.is_small(source.name) for source in entry.sources):
        return None
    matrices = [files.read(source.name) for source in entry.sources]
    alike = {(m.small_dtype, m.scales.shape) for m in matrices if not isinstance(m, np.ndarray)}
    if len(alike) > 1 or not all(_fits(matrix, entry, form) for matrix in matrices):
        return None
    return tuple(kind for kind, _ in alike)


def _fits(matrix: object, entry: Entry, form: str) -> bool:
    if isinstance(matrix, PackedMatrix):
        return matrix.fits if form == STORED else matrix.has_mode(form)
    if not isinstance(matrix, Fp8Matrix) or form not in (STORED, "fp8"):
        return False
    # Gate and up lie side by side: blocks of one may not reach into the other.
    beside = entry.shape[-1] > matrix.shape[0]
    return matrix.block == BLOCK and not (beside and matrix.shape[0] % BLOCK[1])


def read_small(files: TensorFiles, entry: Entry) -> QuantizedWeights:
    """Return a variable in the small form that the files have; see `stored_small`."""
    first = files.read(entry.sources[0].name)
    if not isinstance(first, PackedMatrix | Fp8Matrix):
        raise TypeError(f"{entry.sources[0].name} is not stored small")
    beside = entry.shape[-1] // first.shape[0]  # matrices in one row of the variable
    leading = entry.shape[:-2]
    values = aligned((*leading, first.small_columns, entry.shape[-1]), first.small_dtype)
    down, across = first.scales.shape[1], first.scales.shape[0] * beside
    kind = np.dtype(np.float32 if isinstance(first, Fp8Matrix) else ml_dtypes.bfloat16)
    scales = aligned((*leading, down, across), kind)
    both = zip(places(entry, values), places(entry, scales), strict=True)
    for (name, numbers), (_, factors) in both:
        with files.borrow(name) as matrix:
            if isinstance(matrix, PackedMatrix | Fp8Matrix):
                for rows in blocks(matrix):
                    numbers[rows] = matrix.small(rows)
                factors[...] = matrix.scales
    return QuantizedWeights(as_tensor(values), as_tensor(scales))


def modes_of(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yield the ways to hold a model for serving, with the bytes of its weights in each."""
    yield "bfloat16", bytes_in_memory(config, None)
    for mode in ("fp8", "int8", "int4"):
        yield mode, bytes_in_memory(config, mode)
