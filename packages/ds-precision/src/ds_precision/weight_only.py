"""8-bit weights for serving: whole numbers with one scale for every 32 rows of a column.

The block is that of llama.cpp's Q8_0. Activations stay as they are and sums are float32: only
the weights are rounded, to within 1/254 of the largest of their 32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

BLOCK = 32


class Int8Weights(NamedTuple):
    """Weights `values * scales`, the scales repeated over 32 rows.

    Attributes:
        values: `[..., in, out]` int8.
        scales: `[..., in / 32, out]` float32.
    """

    values: tf.Tensor
    scales: tf.Tensor

    def dequantize(self, dtype: tf.DType = tf.float32) -> tf.Tensor:
        """Return the weights `[..., in, out]` as floating numbers."""
        scales = tf.repeat(tf.convert_to_tensor(self.scales), BLOCK, axis=-2)
        return tf.cast(tf.cast(self.values, tf.float32) * scales, dtype)


def quantize_int8(weights: Any) -> Int8Weights:
    """Round weights to the nearest of 255 steps for every 32 rows of a column.

    Args:
        weights: `[..., in, out]`, floating; a tensor or variable.

    Raises:
        ValueError: the number of rows is not a multiple of 32.
    """
    weights = tf.cast(tf.convert_to_tensor(weights), tf.float32)
    *leading, rows, columns = weights.shape
    if rows % BLOCK:
        raise ValueError(f"weights have {rows} rows; 8-bit weights need a multiple of {BLOCK}")
    blocks = tf.reshape(weights, [*leading, rows // BLOCK, BLOCK, columns])
    scales = tf.reduce_max(tf.abs(blocks), axis=-2, keepdims=True) / 127
    values = tf.round(tf.math.divide_no_nan(blocks, scales))
    return Int8Weights(
        tf.cast(tf.reshape(values, weights.shape), tf.int8), tf.squeeze(scales, axis=-2)
    )


def replace_by_int8(layer: keras.layers.Layer, name: str) -> Int8Weights:
    """Put 8-bit weights in a weight's place and set the attribute `name` to `None`.

    Args:
        layer: whose weight it is; built.
        name: of the attribute.

    Returns:
        Two new weights of the layer, which do not train.

    Raises:
        ValueError: the number of rows is not a multiple of 32.
    """
    found = quantize_int8(getattr(layer, name))
    # A built layer takes no new weights otherwise; Keras' own layers do the same to quantize.
    layer._tracker.unlock()  # noqa: SLF001 - Keras has no public way
    delattr(layer, name)
    setattr(layer, name, None)
    made = []
    for part, value in found._asdict().items():
        weight = layer.add_weight(
            name=f"{name}_{part}",
            shape=value.shape,
            dtype=value.dtype.name,
            initializer="zeros",
            trainable=False,
            autocast=False,
        )
        weight.assign(value)
        made.append(weight)
    layer._tracker.lock()  # noqa: SLF001 - see above
    return Int8Weights(*made)
