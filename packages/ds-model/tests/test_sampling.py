import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_model.sampling import Sampling, choose, draw, guess, probabilities, verify

ROWS = 40_000


def rule(temperature: float, top_p: float = 1.0, seed: int = 0) -> Sampling:
    return Sampling(tf.constant(temperature), tf.constant(top_p), tf.constant(seed))


def logs(p) -> tf.Tensor:
    """Return logits whose softmax is `p`."""
    return tf.math.log(tf.constant(p, tf.float32))


def test_greedy_is_the_best_token_and_the_first_of_equals():
    logits = tf.constant([[0.1, 3.0, -1.0], [5.0, 4.0, 0.0], [2.0, 7.0, 7.0]])

    np.testing.assert_array_equal(choose(logits, rule(0.0), tf.constant(0)), [1, 0, 1])
    token, _ = guess(logits, tf.zeros_like(logits), rule(0.0), tf.constant(0))
    np.testing.assert_array_equal(token, [1, 0, 1])


def test_a_guess_is_drawn_from_what_it_says():
    logits = tf.tile([[0.3, -1.0, 2.0]], [ROWS, 1])
    token, q = guess(logits, tf.zeros_like(logits), rule(0.7, seed=5), tf.constant(2))

    np.testing.assert_allclose(q, probabilities(logits, rule(0.7)), rtol=1e-6)
    share = np.bincount(token, minlength=3) / ROWS
    np.testing.assert_allclose(share, q[0], atol=4 * (0.25 / ROWS) ** 0.5)


def test_temperature_divides_the_logits():
    logits = np.array([[1.0, 2.0, 4.0]], np.float32)
    expected = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum()

    np.testing.assert_allclose(probabilities(tf.constant(logits), rule(0.5)), expected, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    # Far enough apart that float32 knows which of two is the more probable.
    thousandths=st.lists(st.integers(-4000, 4000), min_size=2, max_size=12, unique=True),
    top_p=st.floats(0.05, 0.999),
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(thousandths, top_p):
    logits = [value / 1000 for value in thousandths]
    p = np.exp(np.array(logits, np.float64))
    p /= p.sum()
    order = np.argsort(-p)
    sums = np.cumsum(p[order])
    kept = order[: int(np.searchsorted(sums, top_p)) + 1]
    if np.abs(sums - top_p).min() < 1e-5:
        return  # rounding decides
    expected = np.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()

    got = probabilities(tf.constant([logits], tf.float32), rule(1.0, top_p))[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_draws_follow_the_distribution_and_the_seed():
    p = tf.tile([[0.1, 0.0, 0.6, 0.3]], [ROWS, 1])
    drawn = draw(p, rule(1.0, seed=3), tf.constant(5)).numpy()

    share = np.bincount(drawn, minlength=4) / ROWS
    np.testing.assert_allclose(share, [0.1, 0, 0.6, 0.3], atol=4 * (0.25 / ROWS) ** 0.5)
    np.testing.assert_array_equal(drawn, draw(p, rule(1.0, seed=3), tf.constant(5)))
    assert (drawn != draw(p, rule(1.0, seed=4), tf.constant(5)).numpy()).any()
    assert (drawn != draw(p, rule(1.0, seed=3), tf.constant(6)).numpy()).any()


def test_greedy_verification_keeps_the_agreeing_prefix_and_corrects_the_next():
    best = tf.one_hot([[1, 2, 0, 3]] * 4, 5)  # the model's own choices, K = 3
    drafts = tf.constant([[1, 2, 0], [1, 2, 4], [1, 3, 0], [0, 2, 0]])
    unread = tf.zeros([4, 3, 5])
    tokens, accepted = verify(best, unread, drafts, rule(0.0), tf.constant(0))

    np.testing.assert_array_equal(accepted, [3, 2, 1, 0])
    for row, count in zip(tokens.numpy(), accepted.numpy(), strict=True):
        np.testing.assert_array_equal(row[: count + 1], [1, 2, 0, 3][: count + 1])


@pytest.mark.parametrize("drafter", [[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
def test_drawn_verification_leaves_the_models_distribution(drafter):
    # arXiv 2211.17192, appendix A.1: whatever the drafter, the tokens are distributed as p.
    first, second = np.array([0.5, 0.2, 0.3, 0.0]), np.array([0.1, 0.4, 0.1, 0.4])
    q = np.array(drafter)
    logits = logs(np.tile([[first, second]], [ROWS, 1, 1]))
    q_B1V = tf.constant(np.tile(q, [ROWS, 1, 1]), tf.float32)
    sampling = rule(1.0, seed=9)
    drafts = draw(q_B1V[:, 0], sampling, tf.constant(77))[:, None]
    tokens, accepted = verify(logits, q_B1V, drafts, sampling, tf.constant(0))

    error = 4 * (0.25 / ROWS) ** 0.5
    share = np.bincount(tokens[:, 0], minlength=4) / ROWS
    np.testing.assert_allclose(share, first, atol=error)
    went_on = accepted.numpy() == 1
    bonus = np.bincount(tokens.numpy()[went_on, 1], minlength=4) / went_on.sum()
    np.testing.assert_allclose(bonus, second, atol=error / went_on.mean() ** 0.5)
    # Theorem 3.5: the acceptance rate is the overlap of the two.
    assert went_on.mean() == pytest.approx(np.minimum(first, q).sum(), abs=error)


def test_no_drafts_is_a_plain_draw():
    logits = logs([[[0.0, 1.0]], [[1.0, 0.0]]])
    none = tf.zeros([2, 0], tf.int32)
    tokens, accepted = verify(logits, tf.zeros([2, 0, 2]), none, rule(1.0), tf.constant(0))

    np.testing.assert_array_equal(tokens, [[1], [0]])
    np.testing.assert_array_equal(accepted, [0, 0])
