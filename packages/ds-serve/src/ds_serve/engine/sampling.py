"""From logits to tokens, each row by rules of its own; stock operations, so on any device.

The draw is a race (the Gumbel trick): each token's log-probability plus noise of its own, and the
highest wins. The noise depends on the text's seed and on how many tokens it has, on nothing else;
so the same seed gives the same text whatever else is in the batch, and whether or not its tokens
were drafted: a draft is right when it is what would have been drawn. That accepts a guess as
often as the model gives it, and leaves the distribution as it was.

Shape letters: A rows, V vocabulary, W words of 32 bits, n changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from ds_serve.engine.text import MOST_ALTERNATIVES, Text, words_for

_SEED_WORD = 2**31  # TensorFlow's seeds are pairs of these


class Choice(NamedTuple):
    """How each row's token is chosen.

    Attributes:
        numbers: `[A, 4]` float32: temperature, top_p, min_p, and top_k.
        seeds: `[A, 2]` int32.
        changed: `[n, 2]` int32: rows and tokens whose logits are changed.
        changes: `[n, 2]` float32: what to divide a positive logit by, or multiply one that is not;
            and what to subtract then.
        allowed: `[A, W]` int32: a bit for each token that may come; `[0, W]` where all may.
        telling: scalar bool: whether anybody asked for log-probabilities.
    """

    numbers: np.ndarray | tf.Tensor
    seeds: np.ndarray | tf.Tensor
    changed: np.ndarray | tf.Tensor
    changes: np.ndarray | tf.Tensor
    allowed: np.ndarray | tf.Tensor
    telling: np.ndarray | tf.Tensor

    @staticmethod
    def spec(vocabulary: int) -> Choice:
        """Return the types and known sizes, so that no call is traced anew."""
        return Choice(
            tf.TensorSpec([None, 4], tf.float32),
            tf.TensorSpec([None, 2], tf.int32),
            tf.TensorSpec([None, 2], tf.int32),
            tf.TensorSpec([None, 2], tf.float32),
            tf.TensorSpec([None, words_for(vocabulary)], tf.int32),
            tf.TensorSpec([], tf.bool),
        )


class Chosen(NamedTuple):
    """What came of it.

    Attributes:
        tokens: `[A]` int32.
        logprobs: `[A]` float32, by the model alone; empty if nobody asked.
        likeliest: `[A, 20]` int32, likewise.
        likeliest_logprobs: `[A, 20]` float32, likewise.
    """

    tokens: tf.Tensor
    logprobs: tf.Tensor
    likeliest: tf.Tensor
    likeliest_logprobs: tf.Tensor


def is_plain(text: Text) -> bool:
    """Say whether a text's next token is just the likeliest, and nobody asked for more."""
    rules = text.rules
    if rules.temperature or rules.logprobs is not None or text.matcher is not None:
        return False
    return not (rules.changes_logits and changes_of(text))


def choice_for(rows: Sequence[tuple[Text, int]], vocabulary: int) -> Choice:
    """Say how rows are to be chosen.

    Args:
        rows: the text of each, and how many tokens it will have written before this one.
        vocabulary: how many tokens there are.
    """
    numbers = np.empty([len(rows), 4], np.float32)
    seeds = np.empty([len(rows), 2], np.int32)
    changed: list[tuple[int, int]] = []
    changes: list[tuple[float, float]] = []
    allowed = None
    telling = False
    for i, (text, written) in enumerate(rows):
        rules = text.rules
        numbers[i] = rules.temperature, rules.top_p, rules.min_p, rules.top_k
        # Two seeds that differ by a multiple of 2^31 alone are told apart by the second word.
        seeds[i] = rules.seed % _SEED_WORD, (rules.seed // _SEED_WORD * 7919 + written) % _SEED_WORD
        telling |= rules.logprobs is not None
        if rules.changes_logits:
            for token, change in changes_of(text).items():
                changed.append((i, token))
                changes.append(change)
        if text.matcher is not None:
            if allowed is None:
                allowed = np.full([len(rows), words_for(vocabulary)], -1, np.int32)
            allowed[i] = text.matcher.allowed()
    return Choice(
        numbers,
        seeds,
        np.array(changed, np.int32).reshape(-1, 2),
        np.array(changes, np.float32).reshape(-1, 2),
        np.zeros([0, words_for(vocabulary)], np.int32) if allowed is None else allowed,
        np.array(telling),
    )


def changes_of(text: Text) -> dict[int, tuple[float, float]]:
    """Return, for each token whose logit changes, what to divide it by and what to subtract."""
    rules, found = text.rules, {}
    if rules.repetition_penalty != 1:
        found = dict.fromkeys(text.tokens, (rules.repetition_penalty, 0.0))
    if rules.presence_penalty or rules.frequency_penalty:
        for token, count in text.counts.items():
            factor, _ = found.get(token, (1.0, 0.0))
            found[token] = factor, rules.presence_penalty + rules.frequency_penalty * count
    for token, bias in rules.logit_bias.items():
        factor, less = found.get(token, (1.0, 0.0))
        found[token] = factor, less - bias
    if text.written < rules.min_tokens:
        for token in rules.ends:
            found[token] = 1.0, np.inf
    return found


def choose(logits: tf.Tensor, choice: Choice) -> Chosen:
    """Choose a token for each row of `logits [A, V]` float32; see `Choice`."""
    changed = tf.cond(tf.size(choice.changed) > 0, lambda: _change(logits, choice), lambda: logits)
    changed = tf.cond(
        tf.size(choice.allowed) > 0, lambda: _forbid(changed, choice.allowed), lambda: changed
    )
    best = tf.argmax(changed, axis=-1, output_type=tf.int32)
    warm = choice.numbers[:, 0] > 0
    tokens = tf.cond(tf.reduce_any(warm), lambda: _draw(changed, choice, best), lambda: best)
    return Chosen(
        tokens, *tf.cond(choice.telling, lambda: _tell(logits, tokens), lambda: _nothing(logits))
    )


def take_likeliest(logits: tf.Tensor) -> Chosen:
    """Do as `choose` where the choice is plain."""
    return Chosen(tf.argmax(logits, axis=-1, output_type=tf.int32), *_nothing(logits))


def _change(logits: tf.Tensor, choice: Choice) -> tf.Tensor:
    was = tf.gather_nd(logits, choice.changed)
    factor, less = choice.changes[:, 0], choice.changes[:, 1]
    now = tf.where(was > 0, was / factor, was * factor) - less
    return tf.tensor_scatter_nd_update(logits, choice.changed, now)


def _forbid(logits: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
    bits = tf.bitwise.right_shift(allowed[:, :, None], tf.range(32)[None, None])
    open_ = tf.reshape(tf.bitwise.bitwise_and(bits, 1), [tf.shape(allowed)[0], -1])
    return tf.where(open_[:, : logits.shape[-1]] > 0, logits, logits.dtype.min)


def _draw(logits: tf.Tensor, choice: Choice, best: tf.Tensor) -> tf.Tensor:
    """Draw where the temperature is above 0, and take the best token elsewhere."""
    rows = tf.where(choice.numbers[:, 0] > 0)[:, 0]
    numbers = tf.gather(choice.numbers, rows)
    scores = tf.gather(logits, rows) / numbers[:, :1]
    top_p, min_p, top_k = numbers[:, 1], numbers[:, 2], numbers[:, 3]
    scores = tf.cond(
        tf.reduce_any((top_p < 1) | (top_k > 0)),
        lambda: _likeliest(scores, top_p, top_k),
        lambda: scores,
    )
    # The share is of the likeliest token's probability: a distance between scores.
    lowest = tf.reduce_max(scores, axis=-1) + tf.math.log(min_p)
    scores = tf.where(scores >= lowest[:, None], scores, scores.dtype.min)
    size = logits.shape[-1]

    def noise(seed: tf.Tensor) -> tf.Tensor:
        tiny = np.finfo(np.float32).tiny
        luck = tf.random.stateless_uniform([size], seed, minval=tiny, dtype=tf.float32)
        return -tf.math.log(-tf.math.log(luck))

    luck = tf.map_fn(noise, tf.gather(choice.seeds, rows), fn_output_signature=tf.float32)
    drawn = tf.argmax(scores + luck, axis=-1, output_type=tf.int32)
    return tf.tensor_scatter_nd_update(best, rows[:, None], drawn)


def _likeliest(scores: tf.Tensor, top_p: tf.Tensor, top_k: tf.Tensor) -> tf.Tensor:
    """Keep the `top_k` likeliest, and of those the fewest that together have `top_p`.

    Tokens of equal score share one fate.
    """
    size = scores.shape[-1]
    ordered = tf.sort(scores, axis=-1, direction="DESCENDING")
    kept = tf.where(top_k > 0, tf.minimum(top_k, float(size)), float(size))
    inside = tf.range(size, dtype=tf.float32)[None] < kept[:, None]
    p = tf.nn.softmax(tf.where(inside, ordered, ordered.dtype.min))
    # A token stays while those before it fall short; so the best one always does.
    inside &= (tf.cumsum(p, axis=-1, exclusive=True) < top_p[:, None]) | (top_p[:, None] >= 1)
    count = tf.reduce_sum(tf.cast(inside, tf.int32), axis=-1)
    lowest = tf.gather(ordered, tf.maximum(count - 1, 0), batch_dims=1)
    return tf.where(scores >= lowest[:, None], scores, scores.dtype.min)


def _tell(logits: tf.Tensor, tokens: tf.Tensor) -> tuple[tf.Tensor, ...]:
    logprobs = tf.nn.log_softmax(logits)
    values, ids = tf.math.top_k(logprobs, min(MOST_ALTERNATIVES, logits.shape[-1]))
    return tf.gather(logprobs, tokens, batch_dims=1), ids, values


def _nothing(logits: tf.Tensor) -> tuple[tf.Tensor, ...]:
    width = min(MOST_ALTERNATIVES, logits.shape[-1])
    return tf.zeros([0]), tf.zeros([0, width], tf.int32), tf.zeros([0, width])
