"""The feed-forward of DeepSeek's blocks: SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from ds_moe.experts import swiglu
from ds_precision import (
    Linear,
    QuantizedWeights,
    RestoresPolicy,
    deferred_weight_gradients,
    fp8_recipe,
    fused_experts,
    use_kernels,
)


@keras.saving.register_keras_serializable(package="ds_moe")
class SwiGLU(RestoresPolicy, keras.layers.Layer):
    """`down(silu(gate(x)) * up(x))`, gate and up as one product.

    Args:
        hidden_size: width of input and output.
        intermediate_size: inner width.
        initializer_range: standard deviation of fresh weights.
        **kwargs: of `keras.layers.Layer`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.initializer_range = initializer_range

        def linear(name: str, units: int) -> Linear:
            return Linear(
                units, initializer_range=initializer_range, dtype=self.dtype_policy, name=name
            )

        self.gate_up_proj = linear("gate_up_proj", 2 * intermediate_size)
        self.down_proj = linear("down_proj", hidden_size)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the two matrices."""
        if input_shape[-1] != self.hidden_size:
            raise ValueError(
                f"input has {input_shape[-1]} features; hidden_size is {self.hidden_size}"
            )
        self.gate_up_proj.build((None, self.hidden_size))
        self.down_proj.build((None, self.intermediate_size))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Map `[..., hidden_size]` to the same shape."""
        apart = self._trains_in_fp8 or deferred_weight_gradients() is not None
        if apart or not use_kernels(x):
            return self.down_proj(swiglu(self.gate_up_proj(x)))
        # One expert that every token chooses.
        return fused_experts(
            x,
            tf.zeros([0, 1], tf.int32),
            tf.zeros([0, 1]),
            _stacked(self.gate_up_proj.weights_to_multiply),
            _stacked(self.down_proj.weights_to_multiply),
        )

    @property
    def _trains_in_fp8(self) -> bool:
        return fp8_recipe(self.dtype_policy) is not None and self.down_proj.kernel is not None

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal layer."""
        return super().get_config() | {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "initializer_range": self.initializer_range,
        }


def _stacked(weights: Any) -> tf.Tensor | QuantizedWeights:
    """Return one expert's weights as a stack of one."""
    if isinstance(weights, QuantizedWeights):
        return QuantizedWeights(*(tf.convert_to_tensor(part)[None] for part in weights))
    return tf.convert_to_tensor(weights)[None]
