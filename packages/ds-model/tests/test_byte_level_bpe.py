"""Training: deterministic, within its splits, room for every byte."""

import re

import pytest

from ds_model.byte_level_bpe import SPECIAL_TOKENS, train_bpe
from ds_model.errors import TokenizerError

TEXTS = ["Four score and seven years ago", "our fathers brought forth, in 1776,\n" * 3]


def test_training_is_deterministic():
    assert train_bpe(TEXTS, 300).to_str() == train_bpe(iter(TEXTS), 300).to_str()


def test_no_token_crosses_digits_words_or_lines():
    """The released splits: at most three digits, no letters with digits, no word over a line."""
    tokenizer = train_bpe(["1234567 abc123\nabc123\nabc " * 50], 400)
    for token in range(len(SPECIAL_TOKENS), tokenizer.get_vocab_size()):
        piece = tokenizer.decode([token])
        assert not re.search(r"\d{4}|\d[a-z]|[a-z]\d|[a-z]\n|\n[a-z]", piece), piece


def test_too_small_a_vocabulary_is_named():
    with pytest.raises(TokenizerError, match="vocab_size is 263; it must be at least 264"):
        train_bpe(TEXTS, 263)
