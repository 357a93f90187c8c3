"""The yardsticks against closed forms and the compressor's own sizes."""

import lzma

import numpy as np
import pytest

from ds_train.evaluation import (
    ngram_bits_per_byte,
    unigram_bits_per_byte,
    xz_bits_per_byte,
)


def test_unigrams_by_hand():
    # 256 bytes each once, plus add-one: uniform, 8 bits.
    assert unigram_bits_per_byte([bytes(range(256))], [b"any text"]) == pytest.approx(8.0)
    # 766 a's: P(a) = 767 / 1022, P(b) = 1 / 1022.
    want = -(np.log2(767 / 1022) + np.log2(1 / 1022)) / 2
    assert unigram_bits_per_byte([b"a" * 766], [b"ab"]) == pytest.approx(want)


def test_xz_is_the_growth_of_the_file():
    rng = np.random.default_rng(0)
    old, new = rng.bytes(4000), rng.bytes(1000)
    grown = len(lzma.compress(old + b"\n" + new, preset=9))
    want = 8 * (grown - len(lzma.compress(old + b"\n", preset=9))) / 1000
    assert xz_bits_per_byte([old], [new]) == want
    assert 7.9 < want < 8.4  # random bytes do not compress
    assert xz_bits_per_byte([old], [old[:1000]]) < 0.6  # what was seen costs next to nothing


def test_random_bytes_cost_the_ngram_at_least_eight_bits():
    rng = np.random.default_rng(1)
    assert ngram_bits_per_byte([rng.bytes(20_000)], [rng.bytes(5_000)]) >= 8.0
