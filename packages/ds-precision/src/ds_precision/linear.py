"""The one matrix product that every trained weight of the system passes through.

Keras' own `Dense` would do for float32, but it leaves no place to change the arithmetic of
all three products (forward, input gradient, weight gradient) at once, which is what FP8
training (arXiv 2412.19437, section 3.3; `ds_precision.fp8`) needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from ds_precision.choice import use_kernels
from ds_precision.deferred import WeightGradients, deferred_weight_gradients
from ds_precision.fp8 import FORMATS, RestoresPolicy, fp8_matmul, fp8_recipe
from ds_precision.products import fast_matmul, multiply_outer, multiply_transposed
from ds_precision.weight_only import (
    QuantizedWeights,
    check_mode,
    quantize_weights,
    replace_weights,
    takes_any_mode,
)


def matmul(x: tf.Tensor, kernel: Any) -> tf.Tensor:
    """Multiply the last axis of `x` by a weight matrix.

    The leading axes are folded into one before the product: a batched product against a
    broadcast matrix would make the weight's gradient once per batch row and then sum it.

    Args:
        x: `[..., in]`, floating.
        kernel: `[in, out]`, tensor or variable of any float type, cast to the type of `x`; or
            `QuantizedWeights`.

    Returns:
        `[..., out]` in the type of `x`.
    """
    later = deferred_weight_gradients()
    if later is not None and isinstance(kernel, keras.Variable):
        return _matmul_deferring(x, kernel, later)
    if isinstance(kernel, QuantizedWeights):
        if use_kernels(x):
            return fast_matmul(x, kernel)
        kernel = kernel.dequantize(x.dtype)
    kernel = tf.convert_to_tensor(kernel)
    if use_kernels(x, kernel):
        return fast_matmul(x, kernel)
    kernel = tf.cast(kernel, x.dtype)
    if x.shape.rank == 2:
        return tf.matmul(x, kernel)
    inner, outer = kernel.shape
    y = tf.matmul(tf.reshape(x, [-1, inner]), kernel)
    y = tf.reshape(y, tf.concat([tf.shape(x)[:-1], [outer]], 0))
    return tf.ensure_shape(y, [*x.shape[:-1], outer])


def _matmul_deferring(x: tf.Tensor, weight: keras.Variable, later: WeightGradients) -> tf.Tensor:
    """Multiply as `matmul` does; the weight's gradient waits in `later`."""
    kernel = tf.convert_to_tensor(weight)
    inner, outer = kernel.shape

    @tf.custom_gradient
    def product(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def backward(dy: tf.Tensor) -> tf.Tensor:
            rows = [tf.reshape(x, [-1, inner]), tf.reshape(dy, [-1, outer])]
            later.put(weight, rows, _outer)
            dx = multiply_transposed(rows[1], tf.cast(kernel, dy.dtype))
            return tf.reshape(dx, tf.shape(x))

        return matmul(x, kernel), backward

    return product(x)


def _outer(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    """Return `x^T dy`; compiled, in float32."""
    return multiply_outer(x, dy) if use_kernels(x, dy) else tf.matmul(x, dy, transpose_a=True)


@keras.saving.register_keras_serializable(package="ds_precision")
class Linear(RestoresPolicy, keras.layers.Layer):
    """`x @ kernel (+ bias)`, with the released layers' names.

    Args:
        units: size of the output's last axis.
        use_bias: whether a bias is added.
        initializer_range: standard deviation of the normal initialiser [0.006 in V3].
        fp8_input_format: what the input is rounded to under an `Fp8Policy`: "E4M3", or "E5M6"
            for the projection that follows attention (arXiv 2412.19437, section 3.3.3).
        **kwargs: of `keras.layers.Layer` (name, dtype policy, ...).

    Raises:
        ValueError: no such format.
    """

    def __init__(
        self,
        units: int,
        use_bias: bool = False,
        initializer_range: float = 0.02,
        fp8_input_format: str = "E4M3",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        takes_any_mode(self)
        if fp8_input_format not in FORMATS:
            raise ValueError(
                f"fp8_input_format is {fp8_input_format!r}; it must be one of {', '.join(FORMATS)}"
            )
        self.fp8_input_format = fp8_input_format
        self.units = units
        self.use_bias = use_bias
        self.initializer_range = initializer_range

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create `kernel [in, out]` and, if asked for, `bias [out]`."""
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.units),
            initializer=keras.initializers.RandomNormal(stddev=self.initializer_range),
            autocast=False,  # `matmul` reads it in its own type
        )
        self.bias = (
            self.add_weight(name="bias", shape=(self.units,), initializer="zeros")
            if self.use_bias
            else None
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Map `[..., in]` to `[..., units]`."""
        recipe = fp8_recipe(self.dtype_policy)
        if recipe is not None and self.kernel is not None:
            fmt = FORMATS[self.fp8_input_format]
            y = fp8_matmul(x, self.kernel, recipe, fmt, self.path)
        else:
            y = matmul(x, self.weights_to_multiply)
        return y if self.bias is None else y + tf.cast(self.bias, y.dtype)

    @property
    def weights_to_multiply(self) -> Any:
        """What `matmul` takes: the kernel, or its small form after `quantize`."""
        if self.kernel is not None:
            return self.kernel
        return QuantizedWeights(self.kernel_values, self.kernel_scales)

    def quantize(self, mode: str = "int8", **_: Any) -> None:
        """Replace the kernel by small weights, for inference; see `quantize_weights`.

        Args:
            mode: "int8", "int8_channel", "int4" or "fp8".
            **_: what else Keras hands over.

        Raises:
            ValueError: another mode; an `in` that is not a multiple of 32, but for "fp8".
        """
        check_mode(mode)
        if self.kernel is not None:
            self.put_quantized("kernel", quantize_weights(self.kernel, mode))

    def put_quantized(self, name: str, weights: QuantizedWeights) -> None:
        """Replace the kernel by small weights that are there already.

        Args:
            name: "kernel", the one weight that has a small form.
            weights: of `[in, units]`.
        """
        self.kernel_values, self.kernel_scales = replace_weights(self, name, weights)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return `input_shape` with its last axis replaced by `units`."""
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal layer."""
        return super().get_config() | {
            "units": self.units,
            "use_bias": self.use_bias,
            "initializer_range": self.initializer_range,
            "fp8_input_format": self.fp8_input_format,
        }
