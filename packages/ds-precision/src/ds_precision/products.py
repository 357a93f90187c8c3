"""Matrix products by the compiled kernels: what they compute, and their gradients.

Experts are those of arXiv 2412.19437, eq. 12, attention that of eq. 10.

Letters: T tokens, D hidden_size, I moe_intermediate_size, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from ds_precision.choice import use_kernels
from ds_precision.deferred import WeightGradients
from ds_precision.kernels import operations
from ds_precision.weight_only import QuantizedWeights


def fast_matmul(x: tf.Tensor, kernel: tf.Tensor | QuantizedWeights) -> tf.Tensor:
    """Multiply `x [..., in]` by `kernel [in, out]`, by the compiled product.

    The kernel is read in its own type; `x` is not widened in memory. Sums are float32.

    Returns:
        `[..., out]` in the type of `x`.
    """
    w, scales = _parts(kernel)
    y = operations().ds_matmul(x=x, w=w, scales=scales)
    y.set_shape([*x.shape[:-1], w.shape[-1]])
    return y


def multiply(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Return `a b` of `[T, K]` and `[K, N]`, summed in float32, in the type of `a`."""
    return fast_matmul(a, b) if use_kernels(a, b) else tf.matmul(a, b)


def multiply_transposed(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Return `a b^T` of `[T, N]` and `[K, N]`, summed in float32, in the type of `a`."""
    if not use_kernels(a, b):
        return tf.matmul(a, b, transpose_b=True)
    y = operations().ds_matmul(x=a, w=b, scales=_no_scales(), transpose=True)
    return tf.ensure_shape(y, [a.shape[0], b.shape[0]])


def multiply_outer(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Return `a^T b` of `[T, K]` and `[T, N]` in float32."""
    if not use_kernels(a, b):
        return tf.matmul(tf.cast(a, tf.float32), tf.cast(b, tf.float32), transpose_a=True)
    y = operations().ds_outer(x=a, dy=b, W=tf.float32)
    return tf.ensure_shape(y, [a.shape[1], b.shape[1]])


def fused_experts(
    x: tf.Tensor,
    indices: tf.Tensor,
    gates: tf.Tensor,
    gate_up: tf.Tensor | QuantizedWeights,
    down: tf.Tensor | QuantizedWeights,
    done: ExpertsDone | None = None,
) -> tf.Tensor:
    """Return `y_t = sum_k gate_tk * down_e(silu(gate_e x_t) * up_e x_t)` with `e = e_tk`.

    Sorting, both products, SwiGLU and the sum are one operation; so are their gradients.

    Args:
        x: `[..., D]`, float32 or bfloat16; T rows in all.
        indices: `[T, K]` int32, each in `[0, E)`.
        gates: `[T, K]` float32.
        gate_up: `[E, D, 2I]`, gate first; float32 or bfloat16, whatever `x` is, or small.
        down: `[E, I, D]`, of the type of `gate_up`.
        done: what `experts_done` returned for equal operands: it is not computed once more, and
            the backward pass starts from it.

    Returns:
        `[..., D]` in the type of `x`; summed in float32.

    Raises:
        tf.errors.InvalidArgumentError: an index is out of range, or sizes do not fit.
    """
    if done is None:
        return _experts(x, indices, gates, gate_up, down).y

    @tf.custom_gradient
    def summed(
        x: tf.Tensor, gates: tf.Tensor, gate_up: tf.Tensor, down: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, ...]]]:
        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return _experts_gradients(x, gates, gate_up, down, done, dy)

        return tf.identity(done.y), gradient

    return summed(x, gates, gate_up, down)


def fused_experts_deferring(
    x: tf.Tensor,
    indices: tf.Tensor,
    gates: tf.Tensor,
    gate_up: keras.Variable,
    down: keras.Variable,
    later: WeightGradients,
) -> tf.Tensor:
    """Return what `fused_experts` does; the gradients of both stacks wait in `later`.

    Args:
        x: as for `fused_experts`, as are the next two.
        indices: `[T, K]`.
        gates: `[T, K]`.
        gate_up: `[E, D, 2I]`, or of one expert `[D, 2I]`.
        down: `[E, I, D]`, or of one expert `[I, D]`.
        later: where they wait, with `x`, the gradient of the result and 3I numbers an assignment.
    """
    weights = gate_up, down
    stacks = [
        tf.reshape(tf.convert_to_tensor(weight), [-1, *weight.shape[-2:]]) for weight in weights
    ]

    def compute(*operands: tf.Tensor) -> list[tf.Tensor]:
        gradients = operations().ds_experts_weight_grad(*operands, W=stacks[0].dtype)
        return [tf.reshape(g, w.shape) for g, w in zip(gradients, weights, strict=True)]

    @tf.custom_gradient
    def summed(
        x: tf.Tensor, gates: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, ...]]]:
        done = _experts(x, indices, gates, *stacks)

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, ...]:
            found = operations().ds_experts_input_grad(
                x=x,
                gates=gates,
                up=stacks[0],
                down=stacks[1],
                kept=done.kept,
                order=done.order,
                offsets=done.offsets,
                dy=dy,
            )
            operands = [x, found.middle, found.wide, done.order, done.offsets, dy]
            later.put_together(weights, operands, compute)
            return tf.cast(tf.ensure_shape(found.dx, x.shape), x.dtype), found.dgates

        return done.y, gradient

    return summed(x, gates)


class ExpertsDone(NamedTuple):
    """What the experts' backward pass needs beside their operands.

    Attributes:
        y: `[..., D]`: their result.
        kept: `[T * K, 2I]`: what SwiGLU was applied to.
        order: `[T * K]` int32: assignments by expert.
        offsets: `[E + 1]` int32: where each expert's begin.
    """

    y: tf.Tensor
    kept: tf.Tensor
    order: tf.Tensor
    offsets: tf.Tensor


def experts_done(
    x: tf.Tensor, indices: tf.Tensor, gates: tf.Tensor, gate_up: tf.Tensor, down: tf.Tensor
) -> ExpertsDone:
    """Run experts as `fused_experts` does; no gradient.

    For whoever makes their input `[..., D]` once more in the backward pass, but not what they give.
    """
    found = _experts(*map(tf.stop_gradient, (x, indices, gates, gate_up, down)))
    return ExpertsDone(*map(tf.stop_gradient, found))


def _experts(
    x: tf.Tensor,
    indices: tf.Tensor,
    gates: tf.Tensor,
    gate_up: tf.Tensor | QuantizedWeights,
    down: tf.Tensor | QuantizedWeights,
) -> ExpertsDone:
    up_values, up_scales = _parts(gate_up)
    down_values, down_scales = _parts(down)
    found = operations().ds_experts(
        x=x,
        indices=indices,
        gates=gates,
        up=up_values,
        up_scales=up_scales,
        down=down_values,
        down_scales=down_scales,
        keep=True,
    )
    found.y.set_shape(x.shape)
    return ExpertsDone(*found)


def _parts(weights: tf.Tensor | QuantizedWeights) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the numbers and their scales, none for floating weights."""
    if isinstance(weights, QuantizedWeights):
        return tf.convert_to_tensor(weights.values), tf.convert_to_tensor(weights.scales)
    return weights, _no_scales()


def _no_scales() -> tf.Tensor:
    return tf.zeros([0])


@tf.RegisterGradient("DsMatmul")
def _matmul_gradient(op: tf.Operation, dy: tf.Tensor) -> list[tf.Tensor | None]:
    x, kernel = op.inputs[:2]
    dx = operations().ds_matmul(x=dy, w=kernel, scales=_no_scales(), transpose=True)
    dw = operations().ds_outer(x=x, dy=dy, W=kernel.dtype)
    dx.set_shape(x.shape)
    dw.set_shape(kernel.shape)
    return [dx, dw, None]


@tf.RegisterGradient("DsExperts")
def _experts_gradient(op: tf.Operation, dy: tf.Tensor, *_: Any) -> list[tf.Tensor | None]:
    x, _indices, gates, gate_up, _s, down, _t = op.inputs
    done = ExpertsDone(*op.outputs)
    dx, dgates, dup, ddown = _experts_gradients(x, gates, gate_up, down, done, dy)
    return [dx, None, dgates, dup, None, ddown, None]


def _experts_gradients(
    x: tf.Tensor,
    gates: tf.Tensor,
    gate_up: tf.Tensor,
    down: tf.Tensor,
    done: ExpertsDone,
    dy: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    """Return the gradients of input, gates and both stacks."""
    found = operations().ds_experts_grad(
        x=x,
        gates=gates,
        up=gate_up,
        down=down,
        kept=done.kept,
        order=done.order,
        offsets=done.offsets,
        dy=dy,
    )
    for gradient, operand in zip(found, (x, gates, gate_up, down), strict=True):
        gradient.set_shape(operand.shape)
    return tf.cast(found.dx, x.dtype), found.dgates, found.dup, found.ddown


def fused_attention(
    q: tf.Tensor,
    kv: tf.Tensor,
    k_rope: tf.Tensor,
    rotation: tuple[tf.Tensor, tf.Tensor],
    slots: tf.Tensor,
    valid: tf.Tensor | None,
    scale: float,
    interleave: bool,
    done: AttentionDone | None = None,
) -> tf.Tensor:
    """Attend causally, block by block: no tensor of queries by keys ever exists.

    `softmax(scale * [q_nope; rope(q_rope)] . [k_nope; k_rope]) v`, exactly, in float32 (the
    running softmax of arXiv 2205.14135).

    Args:
        q: `[B, S, H, N + R]`, float32 or bfloat16, its last R numbers not yet rotated.
        kv: `[B, L, H, N + V]`: keys' own parts, then values; of the type of `q`.
        k_rope: `[B, L, R]`: the rotated key that all heads share; of the type of `q`.
        rotation: cosines and sines, each `[B or 1, S, R / 2]` float32.
        slots: `[B or 1, S]` int32: a query sees keys 0 to its slot.
        valid: `[B, L]` boolean: and of those the valid ones; all if `None`.
        scale: factor on the scores.
        interleave: whether rotated pairs lie side by side in `q`.
        done: what `attention_done` returned for equal operands: it is not computed once more, and
            the backward pass starts from it.

    Returns:
        `[B, S, H, V]` in the type of `q`; zero for a query that sees nothing.

    Raises:
        tf.errors.InvalidArgumentError: sizes do not fit.
    """
    rest = (*rotation, slots, tf.zeros([0, 0], tf.bool) if valid is None else valid)
    if done is None:
        return _attention(q, kv, k_rope, rest, scale, interleave).y

    @tf.custom_gradient
    def attended(
        q: tf.Tensor, kv: tf.Tensor, k_rope: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, ...]]]:
        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return _attention_gradients((q, kv, k_rope), rest, done, dy, scale, interleave)

        return tf.identity(done.y), gradient

    return attended(q, kv, k_rope)


class AttentionDone(NamedTuple):
    """What attention's backward pass needs beside its operands.

    Attributes:
        y: `[B, S, H, V]`: its result.
        sums: `[B, H, S]` float32: the logarithms of the scores' sums.
    """

    y: tf.Tensor
    sums: tf.Tensor


def attention_done(*operands: Any) -> AttentionDone:
    """Attend as `fused_attention` does, its arguments without the last; no gradient.

    For whoever makes queries, keys and values once more in the backward pass, but not this.
    """
    q, kv, k_rope, rotation, slots, valid, scale, interleave = operands
    rest = (*rotation, slots, tf.zeros([0, 0], tf.bool) if valid is None else valid)
    q, kv, k_rope = map(tf.stop_gradient, (q, kv, k_rope))
    return AttentionDone(*map(tf.stop_gradient, _attention(q, kv, k_rope, rest, scale, interleave)))


def _attention(
    q: tf.Tensor,
    kv: tf.Tensor,
    k_rope: tf.Tensor,
    rest: tuple[tf.Tensor, ...],
    scale: float,
    interleave: bool,
) -> AttentionDone:
    cosines, sines, slots, valid = rest
    found = operations().ds_attention(
        q=q,
        kv=kv,
        k_rope=k_rope,
        cosines=cosines,
        sines=sines,
        slots=slots,
        valid=valid,
        scale=scale,
        interleave=interleave,
    )
    found.y.set_shape([*q.shape[:3], kv.shape[-1] - (q.shape[-1] - k_rope.shape[-1])])
    return AttentionDone(found.y, found.sums)


@tf.RegisterGradient("DsAttention")
def _attention_gradient(op: tf.Operation, dy: tf.Tensor, *_: Any) -> list[tf.Tensor | None]:
    inputs, done = list(op.inputs), AttentionDone(*op.outputs)
    scale, interleave = op.get_attr("scale"), op.get_attr("interleave")
    found = _attention_gradients(inputs[:3], inputs[3:], done, dy, scale, interleave)
    return [*found, None, None, None, None]


def _attention_gradients(
    operands: Sequence[tf.Tensor],
    rest: Sequence[tf.Tensor],
    done: AttentionDone,
    dy: tf.Tensor,
    scale: float,
    interleave: bool,
) -> tuple[tf.Tensor, ...]:
    """Return the gradients of queries, of keys' parts with values, of the shared rotated key."""
    found = operations().ds_attention_grad(
        *operands, *rest, *done, dy, scale=scale, interleave=interleave
    )
    q, kv, k_rope = operands
    found.dq.set_shape(q.shape)
    found.dkv.set_shape(kv.shape)
    dk_rope = tf.cast(tf.reduce_sum(found.dk_rope, axis=1), k_rope.dtype)
    return found.dq, found.dkv, dk_rope
