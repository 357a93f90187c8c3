"""The byte n-gram: proper distributions, and Witten-Bell figures worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_train.evaluation import ByteNgram

TEXT = [b"abracadabra", b"the cat sat on the mat", b""]


@given(st.lists(st.binary(max_size=40), min_size=1).filter(any), st.binary(max_size=8))
def test_every_distribution_sums_to_one(training, context):
    total = ByteNgram(training, order=5).probabilities(context).sum()
    assert total == pytest.approx(1.0, abs=1e-9)


def test_witten_bell_by_hand():
    # Training "aab": N(a)=2, N(b)=1, T()=2; after "a": N=2 (a, b once each), T=2.
    model = ByteNgram([b"aab"], order=2)
    unigram_a = (2 + 2 / 256) / (3 + 2)
    unigram_z = (2 / 256) / 5
    after_a = model.probabilities(b"a")
    assert after_a[ord("a")] == pytest.approx((1 + 2 * unigram_a) / 4)
    assert after_a[ord("z")] == pytest.approx((2 * unigram_z) / 4)
    # "b" was never followed by anything: back off entirely.
    assert model.probabilities(b"b")[ord("a")] == pytest.approx(unigram_a)


def test_bits_are_the_sum_over_single_predictions():
    model = ByteNgram(TEXT, order=4)
    held = [b"a cat", b"abra"]
    bits = [
        -np.log2(model.probabilities(text[:i])[text[i]]) for text in held for i in range(len(text))
    ]
    assert model.bits_per_byte(held) == pytest.approx(np.mean(bits))


def test_documents_do_not_run_into_each_other():
    # If they did, "x" after "b" would be likely.
    joined = ByteNgram([b"ab", b"xy"], order=2).probabilities(b"b")
    assert joined[ord("x")] == pytest.approx(joined[ord("y")])


def test_longer_contexts_help_on_real_text():
    text = b"the cat sat on the mat and the rat sat on the cat " * 20
    bits = [ByteNgram([text], order).bits_per_byte([text]) for order in (1, 2, 3, 5)]
    assert bits == sorted(bits, reverse=True)


def test_an_order_that_does_not_fit_64_bits_is_refused():
    with pytest.raises(ValueError, match="1 to 7, got 8"):
        ByteNgram([b"a"], order=8)
