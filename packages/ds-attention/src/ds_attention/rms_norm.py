"""RMSNorm (arXiv 1910.07467): divide by the root mean square, multiply by a weight."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from ds_precision import RestoresPolicy, fused_rms_norm, use_kernels


@keras.saving.register_keras_serializable(package="ds_attention")
class RMSNorm(RestoresPolicy, keras.layers.Layer):
    """Normalise the last axis in float32, whatever the dtype policy.

    Args:
        epsilon: added to the mean square [1e-6].
        **kwargs: of `keras.layers.Layer`.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create `weight [features]`, ones."""
        self.weight = self.add_weight(
            name="weight", shape=(input_shape[-1],), initializer="ones", autocast=False
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Map `[..., features]` to the same shape and type."""
        weight = tf.convert_to_tensor(self.weight)
        if use_kernels(x, weight):
            return fused_rms_norm(x, tf.cast(weight, tf.float32), self.epsilon)
        wide = tf.cast(x, tf.float32) if x.dtype.size < 4 else x
        scale = tf.math.rsqrt(
            tf.reduce_mean(tf.square(wide), axis=-1, keepdims=True) + self.epsilon
        )
        return tf.cast(wide * scale * tf.cast(weight, wide.dtype), x.dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return `input_shape`."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal layer."""
        return super().get_config() | {"epsilon": self.epsilon}
