"""Whole-number weights as `compressed-tensors` stores them: format "pack-quantized".

A matrix `NAME [R, C]` lies in three tensors: `NAME_packed [R, C * bits / 32]` int32, whose words
hold neighbours of a row from their low bits on, 2^(bits - 1) standing for 0; `NAME_scale [R, G]`,
one for every C / G neighbours of a row; and `NAME_shape [2]`. Numbers times scales are the weights.
vLLM and Kimi-K2-Thinking's release of 4 bits use the same.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from ds_model.errors import CheckpointError
from ds_precision import quantize_weights

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
PARTS = (PACKED, SCALE, SHAPE)
MODES = {"int8": (8, 32), "int8_channel": (8, None), "int4": (4, 32)}
"""Bits, and neighbours under one scale; `None` is all of a row."""

_METHOD, _FORMAT = "compressed-tensors", "pack-quantized"
_WORD = 32
_STRIPE = 256  # rows quantized at once: more leave the caches, fewer leave threads idle


class PackedMatrix:
    """A matrix whose numbers are made where it is sliced: what readers of plain arrays need of one.

    Args:
        packed: `[R, C * bits / 32]` int32.
        scales: `[R, G]`, bfloat16, float16 or float32.
        columns: C.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self, packed: NDArray[np.generic], scales: NDArray[np.generic], columns: int
    ) -> None:
        self.scales = scales
        self.bits = packed.shape[1] * _WORD // columns
        self.shape = (len(packed), columns)
        self.size = len(packed) * columns
        self.nbytes = self.size * self.dtype.itemsize  # of the numbers
        self._bytes = np.ascontiguousarray(packed).view(np.uint8)
        small: Any = np.uint8 if self.bits == 4 else np.int8
        self.small_dtype = np.dtype(small)
        self.small_columns = self._bytes.shape[1]

    def __len__(self) -> int:
        """Return R."""
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        """Return some rows `[r, C]` float32."""
        stored = self._bytes[rows]
        numbers = np.empty((len(stored), self.shape[1]), np.float32)
        if self.bits == 4:
            numbers[:, 0::2], numbers[:, 1::2] = stored & 15, stored >> 4
        else:
            numbers[:] = stored
        numbers -= 1 << (self.bits - 1)
        scales = self.scales[rows].astype(np.float32)
        groups = numbers.reshape(len(numbers), scales.shape[1], -1)
        groups *= scales[:, :, None]
        return numbers

    def small(self, rows: slice) -> NDArray[np.generic]:
        """Return rows as `QuantizedWeights` has columns: `[r, C / 2]` uint8 or `[r, C]` int8."""
        stored = self._bytes[rows]
        return stored if self.bits == 4 else (stored ^ 0x80).view(np.int8)

    @property
    def fits(self) -> bool:
        """Whether `QuantizedWeights` can hold it as it is."""
        together = self.shape[1] // self.scales.shape[1]
        return self.scales.dtype == ml_dtypes.bfloat16 and together % 32 == 0

    def has_mode(self, mode: str) -> bool:
        """Say whether this is what `pack` makes in that mode."""
        bits, together = MODES.get(mode, (0, 0))
        groups = self.shape[1] // (together or self.shape[1])
        return self.fits and self.bits == bits and self.scales.shape[1] == groups


def pack(matrix: Any, mode: str) -> dict[str, NDArray[np.generic]]:
    """Quantize a matrix; returns the tensors it is stored in, by the suffix of their names.

    Args:
        matrix: `[R, C]`, an array or what slices like one; C a multiple of 32.
        mode: of `MODES`.

    Raises:
        ValueError: C is not a multiple of 32; a number that is not finite.
    """
    packed, scales = [], []
    for first in range(0, len(matrix), _STRIPE):
        stripe = np.asarray(matrix[first : first + _STRIPE], np.float32)
        with tf.device("CPU"):
            found = quantize_weights(tf.constant(stripe.T), mode)
        values = np.ascontiguousarray(found.values.numpy().T)
        packed.append(values if values.dtype == np.uint8 else values.view(np.uint8) ^ 0x80)
        scales.append(found.scales.numpy().T)
    return {
        PACKED: np.concatenate(packed).view(np.int32),
        SCALE: np.ascontiguousarray(np.concatenate(scales)),
        SHAPE: np.array(matrix.shape, np.int64),
    }


def names_of(stored: Mapping[str, Any]) -> list[str]:
    """Return the matrices that the names of a directory's tensors announce."""
    return [name.removesuffix(PACKED) for name in stored if name.endswith(f".weight{PACKED}")]


def quantization_config(mode: str) -> dict[str, Any]:
    """Return what `config.json` says of such weights."""
    bits, together = MODES[mode]
    groups = {"group_0": _group(["Linear"], bits, together)}
    if bits < 8:  # the head, which every token's choice hangs on
        groups["group_1"] = _group(["re:.*lm_head$"], *MODES["int8"])
    return {
        "quant_method": _METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["re:.*kv_b_proj$", "re:.*mlp\\.gate$"],
        "kv_cache_scheme": None,
    }


def _group(targets: list[str], bits: int, together: int | None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    spread = {"strategy": "group", "group_size": together} if together else {"strategy": "channel"}
    return {"targets": targets, "weights": weights | spread, "input_activations": None}


def is_packed(config: Mapping[str, Any]) -> bool:
    """Say whether a `config.json` announces such weights, in a way that can be read.

    Raises:
        CheckpointError: it does, in another way; names the field.
    """
    said = config.get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != _METHOD:
        return False
    where = "config.json's quantization_config"
    if said.get("format") != _FORMAT:
        raise CheckpointError(
            f"{where}.format is {said.get('format')!r}; {_FORMAT!r} is what can be read"
        )
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}.config_groups is {groups!r}; it must be an object")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise CheckpointError(f"{where}.config_groups.{name} describes no weights")
        read: dict[str, tuple[Any, ...]] = {
            "num_bits": (4, 8), "type": ("int",), "symmetric": (True,), "actorder": (None,)
        }  # fmt: skip
        for field, known in read.items():
            value = weights.get(field, known[0])
            if value not in known:
                what = f"{where}.config_groups.{name}.weights.{field}"
                wanted = " or ".join(map(repr, known))
                raise CheckpointError(f"{what} is {value!r}; {wanted} can be read")
    return True


def check_parts(name: str, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse a matrix whose parts do not fit together.

    Args:
        name: of the matrix.
        shapes: dtype, as safetensors names it, and shape of each part that is there, by suffix.

    Raises:
        CheckpointError: a part is missing, or of the wrong dtype or rank.
    """
    expected = {PACKED: (("I32",), 2), SCALE: (("BF16", "F16", "F32"), 2), SHAPE: (("I64",), 1)}
    for suffix, (dtypes, rank) in expected.items():
        if suffix not in shapes:
            raise CheckpointError(f"tensor {name}{PACKED} is there, and {name}{suffix} is missing")
        dtype, shape = shapes[suffix]
        if dtype not in dtypes or len(shape) != rank:
            raise CheckpointError(
                f"tensor {name}{suffix} is {dtype} {list(shape)}; it must be "
                f"{' or '.join(dtypes)} of rank {rank}"
            )
    if shapes[SHAPE][1] != (2,):
        raise CheckpointError(f"tensor {name}{SHAPE} is {list(shapes[SHAPE][1])}; it must be [2]")


def check_shape(
    name: str, shape: tuple[int, ...], packed: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    """Refuse a matrix whose numbers and scales are not as many as its shape says.

    Raises:
        CheckpointError: they are not.
    """
    rows, columns = shape
    fine = rows == packed[0] == scales[0] and columns > 0 and scales[1] > 0
    fine = fine and columns % scales[1] == 0 and columns % 8 == 0
    if not fine or packed[1] * _WORD not in (4 * columns, 8 * columns):
        raise CheckpointError(
            f"tensor {name}{SHAPE} says {list(shape)}; {name}{PACKED} is {list(packed)} and "
            f"{name}{SCALE} {list(scales)}, which fits neither 4 nor 8 bits"
        )
