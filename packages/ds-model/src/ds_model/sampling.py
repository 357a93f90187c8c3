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


def choose(logits: tf.Tensor, sampling: Sampling, stream: tf.Tensor) -> tf.Tensor:
    """Take the best token of each row of `logits [B, V]`, or draw one; `[B]` int32.

    Args:
        logits: `[B, V]` float32.
        sampling: how tokens are chosen.
        stream: tells draws apart.
    """
    return tf.cond(
        sampling.temperature > 0,
        lambda: draw(probabilities(logits, sampling), sampling, stream),
        lambda: best(logits),
    )


def guess(
    logits: tf.Tensor, unused: tf.Tensor, sampling: Sampling, stream: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Do as `choose`, and return what was drawn from, which `verify` wants to know.

    Returns:
        `[B]` int32, and `[B, V]` float32: `unused`, which is of that shape, at temperature 0.
    """

    def warm() -> tuple[tf.Tensor, tf.Tensor]:
        q = probabilities(logits, sampling)
        return draw(q, sampling, stream), q

    return tf.cond(sampling.temperature > 0, warm, lambda: (best(logits), unused))


def best(logits: tf.Tensor) -> tf.Tensor:
    """Return the most probable tokens, int32; the first of equals."""
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def probabilities(logits: tf.Tensor, sampling: Sampling) -> tf.Tensor:
    """Return what tokens are drawn from above temperature 0, `[..., V]` float32."""
    p = tf.nn.softmax(logits / sampling.temperature)
    return tf.cond(sampling.top_p < 1, lambda: _nucleus(p, sampling.top_p), lambda: p)


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
    seed = [sampling.seed, stream]
    return tf.random.stateless_categorical(tf.math.log(p), 1, seed, dtype=tf.int32)[:, 0]


def verify(
    logits: tf.Tensor, q: tf.Tensor, drafts: tf.Tensor, sampling: Sampling, stream: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Accept drafts so that the outcome is distributed as if there had been none.

    At temperature 0 a draft is kept if it is the model's best token. Above, this is
    speculative sampling (arXiv 2211.17192, algorithm 1): draft d is kept with probability
    `min(1, p(d) / q(d))`; the first one refused is replaced by a draw from `max(p - q, 0)`.

    Args:
        logits: `[B, K + 1, V]`: the model's, after the pending token and each draft.
        q: `[B, K, V]`: what each draft was drawn from; not read at temperature 0.
        drafts: `[B, K]` int32.
        sampling: how tokens are chosen.
        stream: tells the draws of different rounds apart.

    Returns:
        `tokens [B, K + 1]`: the accepted drafts, then one token of the model's own, then
        nothing of meaning; `accepted [B]`: how many drafts were.
    """
    if not drafts.shape[1]:
        return choose(logits[:, 0], sampling, stream)[:, None], tf.zeros_like(
            logits[:, 0, 0], tf.int32
        )

    def greedy() -> tuple[tf.Tensor, tf.Tensor]:
        tokens = best(logits)
        return tokens, _agreeing(drafts == tokens[:, :-1])

    def warm() -> tuple[tf.Tensor, tf.Tensor]:
        return _verify_drawn(probabilities(logits, sampling), q, drafts, sampling, stream)

    return tf.cond(sampling.temperature > 0, warm, greedy)


def _agreeing(kept: tf.Tensor) -> tf.Tensor:
    """Count the leading true values of each row."""
    return tf.reduce_sum(tf.math.cumprod(tf.cast(kept, tf.int32), axis=1), axis=1)


def _verify_drawn(
    p: tf.Tensor, q: tf.Tensor, drafts: tf.Tensor, sampling: Sampling, stream: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    of_p = tf.gather(p[:, :-1], drafts, batch_dims=2)
    of_q = tf.gather(q, drafts, batch_dims=2)
    luck = tf.random.stateless_uniform(tf.shape(of_p), [sampling.seed, stream + 1])
    accepted = _agreeing(luck * of_q < of_p)
    # A draft distribution of zero behind the last draft makes the bonus token a plain draw.
    q = tf.concat([q, tf.zeros_like(p[:, :1])], axis=1)
    rest = tf.maximum(tf.gather(p - q, accepted, batch_dims=1), 0)
    own = draw(rest / tf.reduce_sum(rest, axis=-1, keepdims=True), sampling, stream)
    padded = tf.concat([drafts, drafts[:, :1]], axis=1)
    own_place = tf.range(drafts.shape[1] + 1)[None] == accepted[:, None]
    return tf.where(own_place, own[:, None], padded), accepted
