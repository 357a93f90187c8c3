"""Bits per byte: a language model's code length for text, whatever its tokenizer.

    bits per byte = sum over tokens of -log2 P(token | context) / bytes of the text

A document starts after the token that begins (or, failing that, ends) a text. Its tokens are
scored once each, in windows of `context` tokens that overlap: the first window scores all of
its tokens, each further one its last `stride`, so a token sees at least `context - stride`
tokens before it where the document has them.

Shape letters: B windows of a batch, S context.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from ds_model import CausalLM, Tokenizer
from ds_train.data import Document
from ds_train.errors import DataError


@dataclass(frozen=True)
class BitsPerByte:
    """The result, and what it was computed from.

    Attributes:
        bits_per_byte: Bits over bytes.
        bits: Code length of all documents.
        bytes: Their UTF-8 size.
        tokens: Tokens scored.
    """

    bits_per_byte: float
    bits: float
    bytes: int
    tokens: int


@dataclass(frozen=True)
class _Window:
    ids: Sequence[int]  # inputs and, one further, labels
    scored_from: int  # first label that counts


def bits_per_byte(
    model: CausalLM,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    context: int,
    stride: int | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> BitsPerByte:
    """Measures a model on documents.

    Args:
        model: Any causal model over the tokenizer's ids.
        tokenizer: Splits the documents; special tokens in the text are read as characters.
        documents: What was never trained on.
        context: Tokens of a window.
        stride: Tokens that each further window scores; half the context unless given.
        batch_size: Windows at a time.
        progress: Called with windows done and in all.

    Raises:
        DataError: If there is no text, or the tokenizer has no token to start from.
    """
    stride = stride or max(context // 2, 1)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        msg = "the tokenizer has neither bos_token nor eos_token to start a document from"
        raise DataError(msg)
    documents = list(documents)
    ids = tokenizer.encode_batch([d.text for d in documents], split_special_tokens=True)
    windows = [w for row in ids for w in _windows([start, *row], context, stride)]
    size = sum(len(d.text.encode()) for d in documents)
    if not windows:
        msg = "no held-out text to measure on"
        raise DataError(msg)

    @tf.function(autograph=False)
    def nats(inputs_BS: tf.Tensor, labels_BS: tf.Tensor, weights_BS: tf.Tensor) -> tf.Tensor:
        losses_BS = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=labels_BS, logits=model(inputs_BS)
        )
        return tf.reduce_sum(tf.cast(losses_BS, tf.float64) * weights_BS)

    total, tokens = 0.0, 0
    for index, arrays in enumerate(_arrays(windows, context, batch_size), start=1):
        total += float(nats(*map(tf.constant, arrays)))
        tokens += int(arrays[-1].sum())
        if progress is not None:
            progress(min(index * batch_size, len(windows)), len(windows))
    bits = total / math.log(2)
    return BitsPerByte(bits / size, bits, size, tokens)


def _windows(ids: list[int], context: int, stride: int) -> Iterator[_Window]:
    if len(ids) < 2:
        return
    done = min(context, len(ids) - 1)
    yield _Window(ids[: done + 1], 0)
    while done < len(ids) - 1:
        end = min(done + stride, len(ids) - 1)
        begin = max(end - context, 0)
        yield _Window(ids[begin : end + 1], done - begin)
        done = end


def _arrays(
    windows: Sequence[_Window], context: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of one shape, so that one graph does; what fills them weighs nothing."""
    for group in _groups(windows, batch_size):
        inputs = np.zeros((batch_size, context), np.int32)
        labels = np.zeros((batch_size, context), np.int32)
        weights = np.zeros((batch_size, context), np.float64)
        for row, window in enumerate(group):
            length = len(window.ids) - 1
            inputs[row, :length] = window.ids[:-1]
            labels[row, :length] = window.ids[1:]
            weights[row, window.scored_from : length] = 1.0
        yield inputs, labels, weights


def _groups(windows: Sequence[_Window], size: int) -> Iterator[Sequence[_Window]]:
    for first in range(0, len(windows), size):
        yield windows[first : first + size]
