"""Losses against their formulas in numpy float64, position by position."""

import numpy as np
import pytest
import tensorflow as tf

from ds_model import ModelOutput
from ds_moe import Routing
from ds_train.losses import balance_loss, mtp_loss, next_token_loss, pretraining_loss


def nll(logits, label):
    """-log softmax(logits)[label]."""
    return np.log(np.exp(logits).sum()) - logits[label]


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    batch, length, vocab = 2, 5, 7
    tokens = rng.integers(0, vocab, (batch, length + 1))
    main = rng.normal(size=(batch, length, vocab))
    deeper = [rng.normal(size=(batch, length - k, vocab)) for k in (1, 2)]
    return tokens, main, deeper


def test_next_token(case):
    tokens, logits, _ = case
    want = np.mean([nll(logits[b, i], tokens[b, i + 1]) for b in range(2) for i in range(5)])
    assert float(next_token_loss(tf.constant(logits), tokens)) == pytest.approx(want, rel=1e-6)


def test_mtp_depth_k_predicts_token_i_plus_k_plus_1(case):
    tokens, _, deeper = case
    want = np.mean(
        [
            np.mean([nll(d[b, i], tokens[b, i + k + 1]) for b in range(2) for i in range(5 - k)])
            for k, d in enumerate(deeper, start=1)
        ]
    )
    found = mtp_loss([tf.constant(d) for d in deeper], tokens)
    assert float(found) == pytest.approx(want, rel=1e-6)


def test_balance_loss_is_one_a_layer_when_even():
    # Every expert scores the same and every expert is chosen as often as any other.
    scores = tf.fill([8, 4], 0.5)
    indices = tf.constant([[0, 1], [2, 3]] * 4)
    routing = Routing(indices, tf.fill([8, 2], 0.5), scores, tf.fill([4], 4.0))
    assert float(balance_loss([routing, routing, routing], 2)) == pytest.approx(3.0, rel=1e-6)
    # All tokens to two of four experts that hold all the score: twice as much.
    scores = tf.constant([[0.5, 0.5, 0.0, 0.0]] * 8)
    routing = Routing(tf.constant([[0, 1]] * 8), routing.gates, scores, tf.zeros([4]))
    assert float(balance_loss([routing], 2)) == pytest.approx(2.0, rel=1e-6)


def test_the_sum_is_weighted(case):
    tokens, main, deeper = case
    output = ModelOutput(
        tf.constant(main, tf.float32), tuple(tf.constant(d, tf.float32) for d in deeper), ()
    )
    loss, parts = pretraining_loss(output, tf.constant(tokens), 0.3, 1e-4)
    want = parts["cross_entropy"] + 0.3 * parts["mtp_cross_entropy"]
    assert float(loss) == pytest.approx(float(want), rel=1e-6)


def test_without_mtp_and_experts_it_is_the_cross_entropy(case):
    tokens, main, _ = case
    loss, parts = pretraining_loss(
        ModelOutput(tf.constant(main, tf.float32), (), ()), tf.constant(tokens), 0.3, 1e-4
    )
    assert float(loss) == float(parts["cross_entropy"])
