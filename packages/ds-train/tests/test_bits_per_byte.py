"""Bits per byte against sums that are worked out without windows or batches."""

import math

import numpy as np
import pytest
import tensorflow as tf

from ds_model import Tokenizer
from ds_train import DataError
from ds_train.data import Document
from ds_train.evaluation import bits_per_byte

TEXTS = ["the cat sat on the mat", "a", "und die Katze saß auf der Matte, " * 3]
DOCUMENTS = [Document(str(i), text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS * 4, 300)


def uniform(ids):
    """Every token equally likely."""
    return tf.zeros([*ids.shape, 300])


def knows_its_position(ids):
    """Logits that depend on how many tokens of context there are, and on the last one."""
    place = tf.cast(tf.range(ids.shape[1])[None, :, None], tf.float32)
    last = tf.cast(ids[..., None], tf.float32)
    vocabulary = tf.range(300, dtype=tf.float32)[None, None]
    return tf.sin(place * 0.7 + last * 0.3 + vocabulary)


def test_a_uniform_model_costs_log2_of_the_vocabulary(tokenizer):
    found = bits_per_byte(uniform, tokenizer, DOCUMENTS, context=8)
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (found.tokens, found.bytes) == (tokens, size)
    assert found.bits_per_byte == pytest.approx(tokens * math.log2(300) / size, rel=1e-6)


@pytest.mark.parametrize(("context", "stride", "batch_size"), [(8, None, 2), (6, 6, 3), (5, 1, 16)])
def test_windows_score_each_token_once_with_the_stated_context(
    tokenizer, context, stride, batch_size
):
    found = bits_per_byte(knows_its_position, tokenizer, DOCUMENTS, context, stride, batch_size)
    step = stride or context // 2
    bits = 0.0
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        for i in range(1, len(ids)):
            # The window that scores token i ends at `end`; token i sees what it holds before i.
            end = context if i <= context else context + -(-(i - context) // step) * step
            end = min(end, len(ids) - 1)
            begin = max(end - context, 0)
            logits = knows_its_position(np.array([ids[begin:i]]))[0, -1].numpy().astype(float)
            bits += (np.log(np.exp(logits).sum()) - logits[ids[i]]) / math.log(2)
    assert found.bits == pytest.approx(bits, rel=1e-5)


def test_no_text_is_refused(tokenizer):
    with pytest.raises(DataError, match="no held-out text"):
        bits_per_byte(uniform, tokenizer, [], context=8)
