"""The feed-forward of DeepSeek's blocks: SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from ds_moe.experts import swiglu
from ds_precision import (
    ExpertsDone,
    Linear,
    QuantizedWeights,
    RestoresPolicy,
    deferred_weight_gradients,
    experts_done,
    fp8_recipe,
    fused_experts,
    fused_experts_deferring,
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

    def call(self, x: tf.Tensor, done: ExpertsDone | None = None) -> tf.Tensor:
        """Map `[..., hidden_size]` to the same shape.

        Args:
            x: `[..., hidden_size]`.
            done: of an equal input, by `done`: nothing is computed again.
        """
        if not self.one_operation(x):
            return self.down_proj(swiglu(self.gate_up_proj(x)))
        later = deferred_weight_gradients()
        if later is not None and self.down_proj.kernel is not None:
            weights = self.gate_up_proj.kernel, self.down_proj.kernel
            return fused_experts_deferring(x, *_no_choice(), *weights, later)
        return fused_experts(x, *self._as_expert(), done=done)

    def one_operation(self, x: tf.Tensor) -> bool:
        """Say whether one compiled operation does all of it for `x [..., D]` here."""
        return not self._trains_in_fp8 and use_kernels(x)

    def done(self, x: tf.Tensor) -> ExpertsDone:
        """Return what the backward pass needs beside `x [..., D]`, which can be made again."""
        return experts_done(x, *self._as_expert())

    def recomputed(self, h: tf.Tensor, norm: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
        """Return `self(norm(h))` of `h [..., D]`, and don't hold what the norm gave.

        That is made again. Where this is not one compiled operation, all of it would have to be
        done again; then nothing is.
        """
        deferring = deferred_weight_gradients() is not None
        if deferring or not self.one_operation(h) or self.down_proj.kernel is None:
            return self(norm(h))
        done = self.done(norm(tf.stop_gradient(h)))

        @tf.recompute_grad
        def again(h: tf.Tensor) -> tf.Tensor:
            return self(norm(h), done=done)

        return again(h)

    def _as_expert(self) -> tuple[Any, Any, Any, Any]:
        """Return the operands of one expert that every token chooses."""
        return (
            *_no_choice(),
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


def _no_choice() -> tuple[tf.Tensor, tf.Tensor]:
    """Return the indices and gates that stand for: every token, and wholly."""
    return tf.zeros([0, 1], tf.int32), tf.zeros([0, 1])


def _stacked(weights: Any) -> tf.Tensor | QuantizedWeights:
    """Return one expert's weights as a stack of one."""
    if isinstance(weights, QuantizedWeights):
        return QuantizedWeights(*(tf.convert_to_tensor(part)[None] for part in weights))
    return tf.convert_to_tensor(weights)[None]
