"""The experts of `run_experts` when their weights' gradients wait (`defer_weight_gradients`).

Compiled, the backward pass is two operations in place of one. In stock operations it is one product
an expert on just its rows, as in `sorted_experts`, with the two halves written out: rows' gradients
at once, weights' gradients when they are asked for.

Shape letters: T tokens, D hidden_size, I moe_intermediate_size, E experts, K experts a token,
A = T*K assignments.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from ds_moe.experts import combine, sort_by_expert, swiglu
from ds_precision import WeightGradients, fused_experts_deferring, matmul, use_kernels


def deferred_experts(
    x: tf.Tensor,
    indices: tf.Tensor,
    gates: tf.Tensor,
    gate_up: keras.Variable,
    down: keras.Variable,
    later: WeightGradients,
) -> tf.Tensor:
    """Sum the chosen experts' outputs; arguments as for `run_experts`.

    Args:
        x: `[T, D]`, floating.
        indices: `[T, K]` int32.
        gates: `[T, K]`, floating.
        gate_up: `[E, D, 2I]`, gate first.
        down: `[E, I, D]`.
        later: where the gradients of both wait.

    Returns:
        `[T, D]` in the type of `x`.
    """
    if use_kernels(x, tf.convert_to_tensor(gate_up), tf.convert_to_tensor(down)):
        return fused_experts_deferring(x, indices, gates, gate_up, down, later)
    experts = gate_up.shape[0]
    order_A, counts_E = sort_by_expert(indices, experts)
    wide, narrow = (
        tf.unstack(tf.cast(tf.convert_to_tensor(weight), x.dtype)) for weight in (gate_up, down)
    )

    def split(rows_A: tf.Tensor) -> list[tf.Tensor]:
        return tf.split(rows_A, counts_E, num=experts)

    def outers(a_AN: tf.Tensor, b_AM: tf.Tensor) -> tf.Tensor:
        pairs = zip(split(a_AN), split(b_AM), strict=True)
        return tf.stack([tf.matmul(a, b, transpose_a=True) for a, b in pairs])

    @tf.custom_gradient
    def run(x_AD: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        h = tf.concat([matmul(*pair) for pair in zip(split(x_AD), wide, strict=True)], axis=0)
        inner = swiglu(h)
        pairs = zip(split(inner), narrow, strict=True)
        y_AD = tf.concat([matmul(*pair) for pair in pairs], axis=0)

        def backward(dy_AD: tf.Tensor) -> tf.Tensor:
            pairs = zip(split(dy_AD), narrow, strict=True)
            dinner = tf.concat([tf.matmul(dy, w, transpose_b=True) for dy, w in pairs], axis=0)
            gate, up = tf.split(h, 2, axis=-1)
            s = tf.sigmoid(gate)
            dh = tf.concat([dinner * up * (s + gate * s * (1 - s)), dinner * gate * s], axis=-1)
            later.put(down, [inner, dy_AD], outers)
            later.put(gate_up, [x_AD, dh], outers)
            pairs = zip(split(dh), wide, strict=True)
            return tf.concat([tf.matmul(d, w, transpose_b=True) for d, w in pairs], axis=0)

        return y_AD, backward

    y_AD = run(tf.gather(x, order_A // indices.shape[1]))
    return combine(tf.gather(y_AD, tf.math.invert_permutation(order_A)), gates)
