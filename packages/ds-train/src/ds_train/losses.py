"""The three losses of pre-training (arXiv 2412.19437, sections 2.1.2 and 2.2).

    loss = CE + lambda * mean_k CE_k + alpha * sum_layers L_balance

Shape letters: B batch, S sequence (tokens of input), V vocabulary, k MTP depth,
T tokens (B * S).
"""

from collections.abc import Sequence

import tensorflow as tf

from ds_model import ModelOutput
from ds_moe import Routing, sequence_balance_loss
from ds_precision import fused_cross_entropy, use_kernels


def cross_entropy(logits_BSV: tf.Tensor, labels_BS: tf.Tensor) -> tf.Tensor:
    """Returns the mean over all positions of `-log P(label)`, nats, float32 scalar."""
    if use_kernels(logits_BSV):
        logits_TV = tf.reshape(logits_BSV, [-1, logits_BSV.shape[-1]])
        labels_T = tf.reshape(tf.cast(labels_BS, tf.int32), [-1])
        return tf.reduce_mean(fused_cross_entropy(logits_TV, labels_T))
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=labels_BS, logits=tf.cast(logits_BSV, tf.float32)
    )
    return tf.reduce_mean(losses)


def next_token_loss(logits: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
    """Returns the main model's cross-entropy.

    Args:
        logits: `[B, S, V]` of the inputs `tokens[:, :S]`.
        tokens: `[B, S + 1]`; position i is scored against token i + 1.
    """
    return cross_entropy(logits, tokens[:, 1:])


def mtp_loss(mtp_logits: Sequence[tf.Tensor], tokens: tf.Tensor) -> tf.Tensor:
    """Returns the MTP modules' cross-entropy, averaged over depths (eq. 24-25 without lambda).

    Args:
        mtp_logits: Depth k (from 1) is `[B, S - k, V]`.
        tokens: `[B, S + 1]`; at depth k position i is scored against token i + k + 1.
    """
    if not mtp_logits:
        return tf.zeros([])
    depths = [
        cross_entropy(logits, tokens[:, depth + 1 :])
        for depth, logits in enumerate(mtp_logits, start=1)
    ]
    return tf.add_n(depths) / len(depths)


def balance_loss(routings: Sequence[Routing], batch_size: int | tf.Tensor) -> tf.Tensor:
    """Returns the sequence-wise balance loss, summed over expert layers (eq. 17-20, no alpha)."""
    if not routings:
        return tf.zeros([])
    return tf.add_n([sequence_balance_loss(r.scores, r.indices, batch_size) for r in routings])


def pretraining_loss(
    output: ModelOutput, tokens: tf.Tensor, mtp_weight: float | tf.Tensor, balance_alpha: float
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Sums the three losses.

    Args:
        output: Of `model.forward(tokens[:, :-1], training=True, mtp=True)`.
        tokens: `[B, S + 1]` integer.
        mtp_weight: Lambda of eq. 25.
        balance_alpha: Alpha of eq. 17.

    Returns:
        The float32 scalar to minimise, and its parts by name, unweighted.
    """
    parts = {
        "cross_entropy": next_token_loss(output.logits, tokens),
        "mtp_cross_entropy": mtp_loss(output.mtp_logits, tokens),
        "balance_loss": balance_loss(output.routings, tf.shape(tokens)[0]),
    }
    loss = (
        parts["cross_entropy"]
        + mtp_weight * parts["mtp_cross_entropy"]
        + balance_alpha * parts["balance_loss"]
    )
    return loss, parts
