"""Keeping the experts evenly loaded.

Loss-free balancing (arXiv 2408.15664; 2412.19437, eq. 16): after each optimizer step the bias
of an overloaded expert goes down by gamma, that of an underloaded one up. Beside it a small
sequence-wise loss (2412.19437, eq. 17-20).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tensorflow as tf

from ds_moe.router import Router


def update_biases(
    routers: Iterable[Router], loads: Sequence[tf.Tensor], gamma: float | tf.Tensor
) -> None:
    """Move each router's bias by `gamma * sign(mean_load - load)`.

    Call it once an optimizer step, outside the gradient tape, with loads summed over the
    step's micro-batches. In the replica context of a `tf.distribute` strategy the loads are
    summed over replicas here, so that every replica makes the same step. Routers without a
    bias are passed over.

    Args:
        routers: in the order of `loads`.
        loads: one `[E]` a router.
        gamma: bias update speed [0.001].
    """
    for router, local in zip(routers, loads, strict=True):
        bias = router.e_score_correction_bias
        if bias is None:
            continue
        load = tf.cast(_sum_over_replicas(local), tf.float32)
        step = tf.cast(gamma, tf.float32) * tf.sign(tf.reduce_mean(load) - load)
        bias.assign(tf.convert_to_tensor(bias) + step)


def _sum_over_replicas(load: tf.Tensor) -> tf.Tensor:
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return load
    return context.all_reduce(tf.distribute.ReduceOp.SUM, load)


def sequence_balance_loss(scores: tf.Tensor, indices: tf.Tensor, batch_size: int) -> tf.Tensor:
    """Return the sequence-wise balance loss without its factor alpha.

    `sum_i f_i P_i` for each sequence, averaged over the batch (arXiv 2412.19437, eq. 17-20).
    `f_i` counts the experts that were chosen, with bias and group limit, rather than the
    paper's plain top K of the scores.

    Args:
        scores: `[T, E]` of a `Routing`, T = batch_size * sequence.
        indices: `[T, K]` of the same.
        batch_size: number of sequences.

    Returns:
        A float32 scalar; 1 when scores and choices are even.
    """
    experts, per_token = scores.shape[-1], indices.shape[-1]
    scores_BSE = tf.reshape(scores, [batch_size, -1, experts])
    chosen_BSE = tf.reshape(
        tf.reduce_sum(tf.one_hot(indices, experts, dtype=scores.dtype), axis=1),
        tf.shape(scores_BSE),
    )
    frequency_BE = tf.reduce_mean(chosen_BSE, axis=1) * (experts / per_token)
    share_BSE = scores_BSE / (tf.reduce_sum(scores_BSE, axis=-1, keepdims=True) + 1e-20)
    return tf.reduce_mean(tf.reduce_sum(frequency_BE * tf.reduce_mean(share_BSE, axis=1), axis=-1))


def max_violation(load: tf.Tensor) -> tf.Tensor:
    """Return MaxVio, `max(load) / mean(load) - 1` (arXiv 2408.15664, eq. 4).

    Args:
        load: `[..., E]` float32, tokens.

    Returns:
        `[...]` float32; 0 where all experts got the same.
    """
    mean = tf.reduce_mean(load, axis=-1)
    return tf.math.divide_no_nan(tf.reduce_max(load, axis=-1), mean) - 1
