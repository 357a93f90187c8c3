"""FP8 weights as released checkpoints store them (arXiv 2412.19437, section 3.3.2).

A matrix `NAME` in E4M3 has its scales beside it, `NAME_scale_inv`: one for each block of 128 rows
and 128 columns, smaller at the lower and right edges. Values times scales are the weights; V3's
scales are any float32, V3.1's powers of two, as float32 or as E8M0.

Shape letters: R, C rows and columns of the matrix; P, Q rows and columns of blocks.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from ds_model.errors import CheckpointError
from ds_precision import BlockScaled, dequantize_blocks, quantize_blocks

SCALES = "_scale_inv"
BLOCK = (128, 128)

# The linear maps of attention, experts and dense feed-forwards. Embedding, head, routers, norms and
# the MTP modules' projections stay as they are, as in the released files.
_QUANTIZED = re.compile(r"\.(self_attn|mlp)\.(.*\.)?\w+_proj(_with_mqa)?\.weight$")
_STRIPE = 8 * BLOCK[0]  # rows quantized at once


class Fp8Matrix:
    """A matrix whose numbers are made where it is sliced: what readers of plain arrays need of one.

    Args:
        values: `[R, C]` in E4M3.
        scales: `[P, Q]`, float32, bfloat16 or E8M0; they multiply.
        block: rows and columns of a block.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        values: NDArray[np.generic],
        scales: NDArray[np.generic],
        block: tuple[int, int] = BLOCK,
    ) -> None:
        self._values = values
        self.scales = scales.astype(np.float32)
        self.block = block
        self.shape = values.shape
        self.size = values.size
        self.nbytes = values.size * self.dtype.itemsize  # of the numbers
        self.small_dtype = values.dtype
        self.small_columns = values.shape[1]

    def __len__(self) -> int:
        """Return R."""
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        """Return some rows `[r, C]` float32, the products of DeepSeek's `weight_dequant`."""
        high, wide = self.block
        first, last, _ = rows.indices(len(self))
        if first >= last:
            return np.zeros((0, self.shape[1]), np.float32)
        top, bottom = first // high, (last - 1) // high
        # Within one row of blocks these may start anywhere; else they start where a block does.
        start, block = (first, last - first) if top == bottom else (top * high, high)
        with tf.device("CPU"):
            scaled = BlockScaled(
                tf.constant(self._values[start:last]),
                tf.constant(self.scales[top : bottom + 1]),
                (block, wide),
            )
            return dequantize_blocks(scaled).numpy()[first - start :]

    def small(self, rows: slice) -> NDArray[np.generic]:
        """Return some rows `[r, C]` as they are stored."""
        return self._values[rows]


def block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns of a block, from a `config.json`.

    Raises:
        CheckpointError: `quantization_config` is of another kind than the released one.
    """
    said = config.get("quantization_config")
    if said is None:
        return BLOCK
    where = "config.json's quantization_config"
    if not isinstance(said, dict):
        raise CheckpointError(f"{where} is {said!r}; it must be an object")
    method, fmt = said.get("quant_method"), said.get("fmt", "e4m3")
    if method != "fp8":
        raise CheckpointError(f"{where}.quant_method is {method!r}; 'fp8' is what can be read")
    if fmt != "e4m3":
        raise CheckpointError(f"{where}.fmt is {fmt!r}; 'e4m3' is what can be read")
    match said.get("weight_block_size", list(BLOCK)):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case other:
            message = f"{where}.weight_block_size is {other!r}; it must be two positive numbers"
            raise CheckpointError(message)


def is_quantized(name: str) -> bool:
    """Say whether the released layout stores this tensor in FP8."""
    return _QUANTIZED.search(name) is not None


def quantize(
    matrix: Any,
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Return values `[R, C]` in E4M3 and scales `[P, Q]` float32; see `quantize_blocks`.

    What comes back differs by at most 6.25% of a number, or by 2^-10 of a 448th of the largest in
    its block where that is more.
    """
    values, scales = [], []
    for first in range(0, len(matrix), _STRIPE):
        stripe = quantize_blocks(
            tf.constant(np.asarray(matrix[first : first + _STRIPE], np.float32))
        )
        values.append(stripe.values.numpy())
        scales.append(stripe.scales.numpy())
    return np.concatenate(values), np.concatenate(scales)


def quantization_config() -> dict[str, Any]:
    """Return what the released `config.json` says of such weights."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
    }
