"""Matrix products by the compiled kernels: what they compute, their gradients, when they fit.

Letters: T tokens, D hidden_size, I moe_intermediate_size, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops
from tensorflow.python.ops import control_flow_util

from ds_precision.kernels import kernels

TYPES = (tf.float32, tf.bfloat16)


def use_kernels(*tensors: tf.Tensor) -> bool:
    """Say whether the compiled products serve these operands where this is traced.

    They do for float32 and bfloat16 on a CPU, outside XLA, where they could be compiled.
    """
    return (
        all(tensor.dtype in TYPES for tensor in tensors)
        and not traced_for_xla()
        and kernels() is not None
    )


def traced_for_xla() -> bool:
    """Say whether the code that calls this is being traced for `jit_compile=True`."""
    # TensorFlow has no public way to ask this; `tf.function(jit_compile=True)` traces inside
    # an XLA control-flow context (OptionalXlaContext in polymorphic_function.py).
    return control_flow_util.GraphOrParentsInXlaContext(ops.get_default_graph())


def fast_matmul(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """Multiply `x [..., in]` by `kernel [in, out]`, by the compiled product.

    The kernel is read in its own type; `x` is not widened in memory. Sums are float32.

    Returns:
        `[..., out]` in the type of `x`.
    """
    y = kernels().ds_matmul(x=x, w=kernel, scales=_no_scales())
    y.set_shape([*x.shape[:-1], kernel.shape[-1]])
    return y


def fused_experts(
    x: tf.Tensor, indices: tf.Tensor, gates: tf.Tensor, gate_up: tf.Tensor, down: tf.Tensor
) -> tf.Tensor:
    """Return `y_t = sum_k gate_tk * down_e(silu(gate_e x_t) * up_e x_t)` with `e = e_tk`.

    Sorting, both products, SwiGLU and the sum are one operation; so are their gradients.

    Args:
        x: `[..., D]`, float32 or bfloat16; T rows in all.
        indices: `[T, K]` int32, each in `[0, E)`.
        gates: `[T, K]` float32.
        gate_up: `[E, D, 2I]`, gate first; float32 or bfloat16, whatever `x` is.
        down: `[E, I, D]`, of the type of `gate_up`.

    Returns:
        `[..., D]` in the type of `x`; summed in float32.

    Raises:
        tf.errors.InvalidArgumentError: an index is out of range, or sizes do not fit.
    """
    y = kernels().ds_experts(
        x=x,
        indices=indices,
        gates=gates,
        up=gate_up,
        up_scales=_no_scales(),
        down=down,
        down_scales=_no_scales(),
        keep=True,
    ).y
    y.set_shape(x.shape)
    return y


def _no_scales() -> tf.Tensor:
    return tf.zeros([0])


@tf.RegisterGradient("DsMatmul")
def _matmul_gradient(op: tf.Operation, dy: tf.Tensor) -> list[tf.Tensor | None]:
    x, kernel = op.inputs[:2]
    dx = kernels().ds_matmul(x=dy, w=kernel, scales=_no_scales(), transpose=True)
    dw = kernels().ds_outer(x=x, dy=dy, W=kernel.dtype)
    dx.set_shape(x.shape)
    dw.set_shape(kernel.shape)
    return [dx, dw, None]


@tf.RegisterGradient("DsExperts")
def _experts_gradient(op: tf.Operation, dy: tf.Tensor, *_: Any) -> list[tf.Tensor | None]:
    x, _indices, gates, gate_up, _s, down, _t = op.inputs
    found = kernels().ds_experts_grad(
        x=x,
        gates=gates,
        up=gate_up,
        down=down,
        kept=op.outputs[1],
        order=op.outputs[2],
        offsets=op.outputs[3],
        dy=dy,
    )
    for gradient, operand in zip(found, (x, gates, gate_up, down), strict=True):
        gradient.set_shape(operand.shape)
    return [tf.cast(found.dx, x.dtype), None, found.dgates, found.dup, None, found.ddown, None]
