"""Block scaling: one float32 scale for each block of a matrix (arXiv 2412.19437, 3.3.2).

Weights take blocks of 128x128, activations tiles of 1x128 (one token, 128 channels), so
that an outlier costs precision in its own block and nowhere else. Scales are computed
online, from the largest magnitude in the block.

Shape letters: R, C rows and columns of the matrix; P, Q rows and columns of blocks
(``ceil(R / block[0])``, ``ceil(C / block[1])``); I, J rows and columns inside a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from ds_precision.choice import use_kernels
from ds_precision.formats import E4M3, E5M2, Format, cast, from_ue8m0, to_ue8m0
from ds_precision.kernels import operations

WHOLE = (2**31 - 1, 2**31 - 1)
"""A block that holds any matrix."""

_EIGHT_BITS = (E4M3.dtype, E5M2.dtype)
# A scale below this would be subnormal in float32, where processors may flush it to zero.
_SMALLEST_SCALE = 2.0**-126
_SMALLEST_AMAX = 1e-4  # as in DeepSeek's kernels, where scales are powers of two


@dataclass(frozen=True)
class BlockScaled:
    """A matrix as small numbers and one scale a block: ``matrix = values * scales``.

    Scales multiply, like the ``weight_scale_inv`` of released checkpoints (the inverse of
    what the weight was multiplied by). ``tf.function`` takes and returns it as it is.

    Attributes:
        values: ``[..., R, C]``, dtype of the format.
        scales: ``[..., ceil(R / block[0]), ceil(C / block[1])]``, float32.
        block: rows and columns of a block; those at the lower and right edge may be smaller.
    """

    values: tf.Tensor
    scales: tf.Tensor
    block: tuple[int, int] = (128, 128)

    def spread_scales(self) -> tf.Tensor:
        """Return each number's own scale: ``[..., R, C]`` float32."""
        return _spread(tf.cast(self.scales, tf.float32), self.block, tf.shape(self.values))

    def __tf_flatten__(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Splits into the static part and the tensors, for ``tf.nest``."""
        return (self.block,), (self.values, self.scales)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[Any, ...], leaves: tuple[Any, ...]) -> BlockScaled:
        """Puts together what ``__tf_flatten__`` split."""
        return cls(*leaves, *metadata)


def quantize_blocks(
    x: tf.Tensor,
    block: tuple[int, int] = (128, 128),
    fmt: Format = E4M3,
    power_of_two: bool = False,
) -> BlockScaled:
    """Scales each block so that its largest magnitude becomes ``fmt.max``, and rounds.

    The scale is ``max|x| / fmt.max`` over the block, in float32, and the values are
    ``cast(x / scale)``. A block of zeros gets scale 1. A number that is at least
    ``fmt.smallest_normal / fmt.max`` of its block's largest (E4M3: 1/28672) comes back
    within ``fmt.worst_relative_error``, up to float32 rounding; smaller ones come back
    within half of ``fmt.smallest_subnormal * scale``. Scales are at least ``2^-126``;
    magnitudes below that (float32's subnormal numbers) may count as zero. A NaN or an
    infinity turns its whole block into NaN, and no other.

    Args:
        x: ``[..., R, C]``, a float dtype.
        block: rows and columns of a block; ``(128, 128)`` for weights, ``(1, 128)`` for
            activations, ``WHOLE`` for one scale a matrix.
        fmt: format of the values.
        power_of_two: round scales up to powers of two, as V3.1 does (DeepSeek's `act_quant` with
            `ue8m0`): multiplying by them is exact. There the largest magnitude counts as 1e-4 at
            least, so zeros get scale ``2^-22`` in E4M3.

    Returns:
        The values in the shape of ``x``, and their scales.

    Raises:
        ValueError: ``x`` is not a matrix or a stack of them, or ``block`` is not two
            positive numbers.
    """
    _check_block(block)
    x = tf.convert_to_tensor(x)
    if x.shape.rank in (0, 1):
        raise ValueError(f"x has shape {x.shape}; block scaling needs [..., rows, columns]")
    if fmt.dtype in _EIGHT_BITS and use_kernels(x):
        found = operations().ds_quantize(
            x=x, V=fmt.dtype, rows=block[0], columns=block[1], two=power_of_two
        )
        found.values.set_shape(x.shape)
        found.scales.set_shape(_scales_shape(x.shape, block))
        return BlockScaled(found.values, found.scales, block)
    x = tf.cast(x, tf.float32)
    shape = tf.shape(x)
    amax_PQ = _largest_in_blocks(x, block)
    if power_of_two:
        scales_PQ = from_ue8m0(to_ue8m0(tf.maximum(amax_PQ, _SMALLEST_AMAX) / fmt.max))
    else:
        scales_PQ = tf.where(amax_PQ == 0.0, 1.0, tf.maximum(amax_PQ / fmt.max, _SMALLEST_SCALE))
    # A finite number divided by an infinite scale would be a silent zero.
    scales_PQ = tf.where(tf.math.is_finite(amax_PQ), scales_PQ, float("nan"))
    values = cast(x / _spread(scales_PQ, block, shape), fmt)
    values.set_shape(x.shape)
    return BlockScaled(values, scales_PQ, block)


def dequantize_blocks(scaled: BlockScaled, dtype: tf.DType = tf.float32) -> tf.Tensor:
    """Multiplies the values by their block's scale.

    The product is taken in float32 and then rounded to ``dtype``, as ``weight_dequant`` of
    DeepSeek's published inference code does with ``weight`` and ``weight_scale_inv``.

    Args:
        scaled: values ``[..., R, C]`` and scales, one for each block.
        dtype: dtype of the result.

    Returns:
        ``[..., R, C]`` in ``dtype``.

    Raises:
        ValueError: the number of scales is not that of the blocks.
    """
    _check_block(scaled.block)
    _check_scales(scaled)
    scales = tf.cast(scaled.scales, tf.float32)
    small, known = scaled.values.dtype in _EIGHT_BITS, dtype in (tf.float32, tf.bfloat16)
    if small and known and use_kernels(scales):
        rows, columns = scaled.block
        y = operations().ds_dequantize(
            values=scaled.values, scales=scales, T=dtype, rows=rows, columns=columns
        )
        y.set_shape(scaled.values.shape)
        return y
    return tf.cast(tf.cast(scaled.values, tf.float32) * scaled.spread_scales(), dtype)


def _check_block(block: tuple[int, int]) -> None:
    match block:
        case (int(rows), int(columns)) if rows > 0 and columns > 0:
            return
    raise ValueError(f"block is {block}; it must be two positive numbers, such as (128, 128)")


def _check_scales(scaled: BlockScaled) -> None:
    values, scales = scaled.values.shape, scaled.scales.shape
    if not (values.is_fully_defined() and scales.is_fully_defined()):
        return
    rows, columns = scaled.block
    expected = _scales_shape(values, scaled.block).as_list()
    if scales.as_list() != expected:
        raise ValueError(
            f"scales have shape {scales.as_list()}; values {values.as_list()} in blocks of "
            f"{rows}x{columns} need {expected}"
        )


def _scales_shape(shape: tf.TensorShape, block: tuple[int, int]) -> tf.TensorShape:
    if shape.rank is None:
        return shape
    sides = zip(shape[-2:], block, strict=True)
    return shape[:-2] + [None if size is None else -(-size // side) for size, side in sides]


def _largest_in_blocks(x: tf.Tensor, block: tuple[int, int]) -> tf.Tensor:
    shape = tf.shape(x)
    sides = tf.maximum(tf.minimum(shape[-2:], tf.constant(block)), 1)  # of blocks beyond the edge
    # Zeros fill ragged edges; no largest magnitude notices.
    missing = -shape[-2:] % sides
    inner = tf.stack([tf.zeros_like(missing), missing], axis=1)
    x = tf.pad(x, tf.concat([tf.zeros([tf.rank(x) - 2, 2], tf.int32), inner], axis=0))
    counts = tf.shape(x)[-2:] // sides
    # XLA's maximum skips NaN on CPU; nothing skips an infinity.
    magnitude = tf.where(tf.math.is_finite(x), tf.abs(x), float("inf"))
    in_blocks = tf.stack([counts[0], sides[0], counts[1], sides[1]])
    x_PIQJ = tf.reshape(magnitude, tf.concat([shape[:-2], in_blocks], axis=0))
    return tf.reduce_max(x_PIQJ, axis=[-3, -1])


def _spread(scales: tf.Tensor, block: tuple[int, int], shape: tf.Tensor) -> tf.Tensor:
    """Repeats each scale over its block: ``[..., P, Q]`` to ``[..., R, C]``."""
    rows = tf.range(shape[-2]) // block[0]
    columns = tf.range(shape[-1]) // block[1]
    return tf.gather(tf.gather(scales, rows, axis=-2), columns, axis=-1)
