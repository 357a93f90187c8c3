"""What else a training step does, each in one pass over memory by a compiled operation.

Callers keep the same sums in stock operations beside these and ask `use_kernels` which to
take. Both give the same numbers up to rounding, and what torch and Keras compute: AdamW (arXiv
1711.05101), cross-entropy, RMSNorm (arXiv 1910.07467), the square sum of gradient clipping.

Letters: T tokens, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from ds_precision.kernels import operations


def fused_rms_norm(x: tf.Tensor, weight: tf.Tensor, epsilon: float) -> tf.Tensor:
    """Return `x / sqrt(mean(x^2) + epsilon) * weight`, computed in float32.

    Args:
        x: `[..., D]`, float32 or bfloat16.
        weight: `[D]` float32.
        epsilon: added to the mean square.

    Returns:
        `[..., D]` in the type of `x`.
    """
    y = operations().ds_rms_norm(x=x, weight=weight, epsilon=epsilon).y
    y.set_shape(x.shape)
    return y


def fused_cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Return `-log softmax(logits)[label]` in nats.

    Args:
        logits: `[T, V]`, float32 or bfloat16.
        labels: `[T]` int32.

    Returns:
        `[T]` float32.

    Raises:
        tf.errors.InvalidArgumentError: a label is not in `[0, V)`.
    """
    losses = operations().ds_cross_entropy(logits=logits, labels=labels).losses
    losses.set_shape(labels.shape)
    return losses


def fused_square_sum(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return the sum of the squares of all numbers of float32 tensors, a float32 scalar."""
    total = operations().ds_square_sum(x=list(tensors))
    total.set_shape([])
    return total


class AdamWUpdate(NamedTuple):
    """What `fused_adamw` computes.

    Attributes:
        variable: the new variable.
        momentum: its new first moment.
        velocity: its new second moment.
    """

    variable: tf.Tensor
    momentum: tf.Tensor
    velocity: tf.Tensor


def fused_adamw(
    variable: tf.Tensor,
    momentum: tf.Tensor,
    velocity: tf.Tensor,
    gradient: tf.Tensor,
    scalars: tf.Tensor,
) -> AdamWUpdate:
    """Do one step of AdamW, clipping and decay included.

        g <- scale g        m <- m + (1 - b1) (g - m)        v <- v + (1 - b2) (g^2 - v)
        p <- p - decay p - rate m / (sqrt(v) + epsilon)

    Args:
        variable: p, float32 of any shape.
        momentum: m, of the same shape.
        velocity: v, of the same shape.
        gradient: g, of the same shape. Its memory is reused where nothing else reads it.
        scalars: `[6]` float32: scale, rate, epsilon, decay, b1, b2.
    """
    found = operations().ds_adam_w(p=variable, m=momentum, v=velocity, g=gradient, scalars=scalars)
    for tensor in found:
        tensor.set_shape(variable.shape)
    return AdamWUpdate(*found)


@tf.RegisterGradient("DsRmsNorm")
def _rms_norm_gradient(op: tf.Operation, dy: tf.Tensor, *_: Any) -> list[tf.Tensor | None]:
    x, weight = op.inputs[:2]
    found = operations().ds_rms_norm_grad(x=x, weight=weight, scales=op.outputs[1], dy=dy)
    found.dx.set_shape(x.shape)
    found.dweight.set_shape(weight.shape)
    return [found.dx, found.dweight]


@tf.RegisterGradient("DsCrossEntropy")
def _cross_entropy_gradient(
    op: tf.Operation, dlosses: tf.Tensor, *_: Any
) -> list[tf.Tensor | None]:
    logits, labels = op.inputs
    dlogits = operations().ds_cross_entropy_grad(
        logits=logits, labels=labels, sums=op.outputs[1], dlosses=dlosses
    )
    dlogits.set_shape(logits.shape)
    return [dlogits, None]
