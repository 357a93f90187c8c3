"""Small weights for inference: activations stay as they are and sums are float32.

| mode | numbers | one scale | bits a weight | error in the worst case |
|---|---|---|---|---|
| "int8" | whole, -127 to 127 | 32 rows of a column | 8.5 | 1/253 of the largest of the 32 |
| "int8_channel" | the same | a column | 8 and 16 a column | 1/253 of the largest of the column |
| "int4" | whole, -8 to 7 | 32 rows of a column | 4.5 | 1/7 of the largest of the 32 |
| "fp8" | E4M3 | a block of 128x128 | 8 | 1/16 of each number, see `quantize_blocks` |

"int8" and "int4" are laid out as llama.cpp's Q8_0 and Q4_0 are, "fp8" is what DeepSeek released.
Scales are bfloat16 for whole numbers, which are rounded after their scale is, and float32 for E4M3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from ds_precision.block_scaling import BlockScaled, dequantize_blocks, quantize_blocks

ROWS = 32  # under one scale, and a multiple of it in "int8_channel"
BLOCK = (128, 128)
MODES = ("int8", "int8_channel", "int4", "fp8")
"""How weights can be made small: whole numbers with a scale for 32 inputs of an output (llama.cpp's
Q8_0 and Q4_0) or for an output, and E4M3 by blocks of 128 (DeepSeek's released files)."""
_ZERO = 8  # what stands for 0 in 4 bits
# Of the scale that reaches the largest number: a smaller one costs that number, helps the others.
_SHARES = (1.0, 0.95, 0.9, 0.85)


class QuantizedWeights(NamedTuple):
    """Small numbers and their scales; the type of the numbers says which mode it is.

    Attributes:
        values: `[..., in, out]` int8 or E4M3; or `[..., in / 2, out]` uint8, of which each byte
            holds two rows of a column, the even one in its low half, 8 standing for 0.
        scales: `[..., in / rows, out]` bfloat16; of E4M3 one float32 for each block of 128x128,
            smaller at the lower and right edge.
    """

    values: tf.Tensor
    scales: tf.Tensor

    def dequantize(self, dtype: tf.DType = tf.float32) -> tf.Tensor:
        """Return the weights `[..., in, out]` as floating numbers: the products in float32."""
        values, scales = (tf.convert_to_tensor(part) for part in self)
        if values.dtype.is_floating:
            return dequantize_blocks(BlockScaled(values, scales, BLOCK), dtype)
        if values.dtype == tf.uint8:
            values = _unpacked(values)
        rows = values.shape[-2] // scales.shape[-2]
        scales = tf.repeat(tf.cast(scales, tf.float32), rows, axis=-2)
        return tf.cast(tf.cast(values, tf.float32) * scales, dtype)


def check_mode(mode: str) -> None:
    """Refuse a mode that is not there.

    Raises:
        ValueError: names the modes.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")


def quantize_weights(weights: Any, mode: str) -> QuantizedWeights:
    """Round weights to one of the small forms; eagerly, one matrix after another.

    Args:
        weights: `[..., in, out]`, floating; a tensor or variable.
        mode: of `MODES`.

    Raises:
        ValueError: another mode; for whole numbers, rows that are not a multiple of 32; a number
            that is not finite.
    """
    check_mode(mode)
    weights = tf.convert_to_tensor(weights)
    if mode != "fp8" and weights.shape[-2] % ROWS:
        raise ValueError(
            f"weights have {weights.shape[-2]} rows; mode {mode!r} needs a multiple of {ROWS}"
        )
    if weights.shape.rank > 2:  # the float32 copies of one matrix are enough
        parts = [quantize_weights(matrix, mode) for matrix in tf.unstack(weights)]
        return QuantizedWeights(*(tf.stack(part) for part in zip(*parts, strict=True)))
    weights = tf.cast(weights, tf.float32)
    if not tf.reduce_all(tf.math.is_finite(weights)):
        raise ValueError("weights hold a number that is not finite; they can't be quantized")
    if mode == "fp8":
        found = quantize_blocks(weights, BLOCK)
        return QuantizedWeights(found.values, found.scales)
    rows, columns = weights.shape
    blocks = tf.reshape(weights, [-1, rows if mode == "int8_channel" else ROWS, columns])
    scales, values = _four_bits(blocks) if mode == "int4" else _eight_bits(blocks)
    values = tf.reshape(values, weights.shape)
    values = _packed(values) if mode == "int4" else tf.cast(values, tf.int8)
    return QuantizedWeights(values, tf.cast(tf.squeeze(scales, axis=1), tf.bfloat16))


def _eight_bits(blocks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    scales = tf.reduce_max(tf.abs(blocks), axis=1, keepdims=True) / 127
    # Half a step of bfloat16 is a quarter of ours at 127: no number passes that.
    scales = tf.cast(tf.cast(scales, tf.bfloat16), tf.float32)
    return scales, tf.round(tf.math.divide_no_nan(blocks, scales))


def _four_bits(blocks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the scales of the smallest squared error among a few, and the numbers they give."""
    most, least = (of(blocks, axis=1, keepdims=True) for of in (tf.reduce_max, tf.reduce_min))
    # The largest magnitude becomes -8, whatever its sign: there are more numbers on that side.
    reaching = tf.where(most > -least, most, least) / -_ZERO
    best = None
    for share in _SHARES:
        scales = tf.cast(tf.cast(reaching * share, tf.bfloat16), tf.float32)
        values = tf.round(tf.math.divide_no_nan(blocks, scales))
        values = tf.clip_by_value(values, -_ZERO, _ZERO - 1)
        error = tf.reduce_sum(tf.square(values * scales - blocks), axis=1, keepdims=True)
        if best is not None:
            better = error < best[0]
            error, scales, values = (
                tf.where(better, new, old)
                for new, old in zip((error, scales, values), best, strict=True)
            )
        best = error, scales, values
    return scales, values


def _packed(values: tf.Tensor) -> tf.Tensor:
    rows, columns = values.shape
    pairs = tf.reshape(tf.cast(values + _ZERO, tf.int32), [rows // 2, 2, columns])
    return tf.cast(pairs[:, 0] + pairs[:, 1] * 16, tf.uint8)


def _unpacked(values: tf.Tensor) -> tf.Tensor:
    *leading, rows, columns = values.shape
    pairs = tf.stack([tf.bitwise.bitwise_and(values, 15), values // 16], axis=-2)
    return tf.cast(tf.reshape(pairs, [*leading, 2 * rows, columns]), tf.int32) - _ZERO


def takes_any_mode(layer: keras.layers.Layer) -> None:
    """Let a layer's own `quantize` say which modes there are.

    Keras wraps the method of every new layer, and the wrapper knows Keras' own modes alone.
    """
    layer.__dict__.pop("quantize", None)


def replace_weights(
    layer: keras.layers.Layer, name: str, weights: QuantizedWeights
) -> QuantizedWeights:
    """Put small weights in a weight's place and set the attribute `name` to `None`.

    Args:
        layer: whose weight it is; built.
        name: of the attribute.
        weights: what to put there, of `[..., in, out]`.

    Returns:
        Two new weights of the layer, which do not train.
    """
    named = {f"{name}_{part}": value for part, value in weights._asdict().items()}
    return QuantizedWeights(*exchange_weight(layer, name, named))


def exchange_weight(
    layer: keras.layers.Layer, name: str, values: Mapping[str, tf.Tensor]
) -> list[keras.Variable]:
    """Put other weights in a weight's place and set the attribute `name` to `None`.

    Args:
        layer: whose weight it is; built.
        name: of the attribute.
        values: of any shapes and types, by the new weights' names.

    Returns:
        The new weights of the layer, which do not train.
    """
    # As Keras' own layers do, but past `Layer.__delattr__`, which collects garbage for each weight:
    # half a minute for a hundred of them.
    layer._untrack_variable(getattr(layer, name))  # noqa: SLF001 - Keras has no public way
    super(keras.layers.Layer, layer).__delattr__(name)
    setattr(layer, name, None)
    layer._tracker.unlock()  # noqa: SLF001 - a built layer takes no new weights otherwise
    made = []
    for new, value in values.items():
        tensor = tf.convert_to_tensor(value)
        weight = layer.add_weight(
            name=new,
            shape=tensor.shape,
            dtype=tensor.dtype.name,
            initializer=lambda *_, value=tensor, **__: value,  # Keras has no zeros of 8 bits
            trainable=False,
            autocast=False,
        )
        made.append(weight)
    layer._tracker.lock()  # noqa: SLF001 - see above
    return made
