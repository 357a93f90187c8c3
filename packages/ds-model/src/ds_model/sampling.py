"""From logits to tokens: greedy, temperature, nucleus; and the exact acceptance of drafts.

Shape letters: B batch, S positions, K drafts, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf


class Sampling(NamedTuple):
    """How tokens are chosen.

    Attributes:
        temperature: scalar float32; 0 takes the best token.
        top_p: scalar float32: the smallest set of tokens with this much probability is kept.
        seed: scalar int32.
    """

    temperature: tf.Tensor
    top_p: tf.Tensor
    seed: tf.Tensor


def probabilities(logits: tf.Tensor, sampling: Sampling) -> tf.Tensor:
    """Return what tokens are drawn from, `[..., V]` float32; one-hot at temperature 0."""

    def greedy() -> tf.Tensor:
        return tf.one_hot(tf.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)

    def warm() -> tf.Tensor:
        p = tf.nn.softmax(logits / sampling.temperature)
        return tf.cond(sampling.top_p < 1, lambda: _nucleus(p, sampling.top_p), lambda: p)

    return tf.cond(sampling.temperature > 0, warm, greedy)


def _nucleus(p: tf.Tensor, top_p: tf.Tensor) -> tf.Tensor:
    """Keep the most probable tokens that together reach `top_p`, and renormalise."""
    order = tf.argsort(p, axis=-1, direction="DESCENDING", stable=True)
    ordered = tf.gather(p, order, batch_dims=p.shape.rank - 1)
    # A token stays while those before it fall short; so the best one always does.
    needed = tf.cumsum(ordered, axis=-1, exclusive=True) < top_p
    kept = tf.gather(needed, tf.argsort(order, axis=-1), batch_dims=p.shape.rank - 1)
    p = tf.where(kept, p, 0.0)
    return p / tf.reduce_sum(p, axis=-1, keepdims=True)


def draw(p: tf.Tensor, sampling: Sampling, stream: tf.Tensor) -> tf.Tensor:
    """Draw one token from each row of `p [B, V]`; `stream` tells draws apart."""
    return tf.cond(
        sampling.temperature > 0,
        lambda: tf.random.stateless_categorical(
            tf.math.log(p), 1, [sampling.seed, stream], dtype=tf.int32
        )[:, 0],
        lambda: tf.argmax(p, axis=-1, output_type=tf.int32),
    )


def verify(
    p: tf.Tensor, q: tf.Tensor, drafts: tf.Tensor, sampling: Sampling, stream: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Accept drafts so that the outcome is distributed as if there had been none.

    Speculative sampling (arXiv 2211.17192, algorithm 1): draft d is kept with probability
    `min(1, p(d) / q(d))`; the first one refused is replaced by a draw from `max(p - q, 0)`.
    At temperature 0 both are one-hot and this is plain comparison.

    Args:
        p: `[B, K + 1, V]`: the model's distribution after the pending token and each draft.
        q: `[B, K, V]`: what each draft was drawn from.
        drafts: `[B, K]` int32.
        sampling: how tokens are chosen.
        stream: tells the draws of different rounds apart.

    Returns:
        `tokens [B, K + 1]`: the accepted drafts, then one token of the model's own, then
        nothing of meaning; `accepted [B]`: how many drafts were.
    """
    count = drafts.shape[1]
    if not count:
        return draw(p[:, 0], sampling, stream)[:, None], tf.zeros([tf.shape(p)[0]], tf.int32)
    of_p = tf.gather(p[:, :-1], drafts, batch_dims=2)
    of_q = tf.gather(q, drafts, batch_dims=2)
    luck = tf.random.stateless_uniform(tf.shape(of_p), [sampling.seed, stream + 1])
    kept = tf.cast(luck * of_q < of_p, tf.int32)
    accepted = tf.reduce_sum(tf.math.cumprod(kept, axis=1), axis=1)
    # A draft distribution of zero behind the last draft makes the bonus token a plain draw.
    q = tf.concat([q, tf.zeros_like(p[:, :1])], axis=1)
    rest = tf.maximum(tf.gather(p - q, accepted, batch_dims=1), 0)
    own = draw(rest / tf.reduce_sum(rest, axis=-1, keepdims=True), sampling, stream)
    padded = tf.concat([drafts, drafts[:, :1]], axis=1)
    own_place = tf.range(count + 1)[None] == accepted[:, None]
    return tf.where(own_place, own[:, None], padded), accepted
