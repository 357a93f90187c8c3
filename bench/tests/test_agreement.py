import numpy as np
import pytest

from bench.agreement import Reference, compare, difference


@pytest.fixture
def expected():
    random = np.random.default_rng(0)
    logits = random.normal(size=(8, 50)).astype(np.float32)
    return Reference(logits, np.arange(32), {"loss": 9.0, "gradient_norm": 2.0})


def test_log_probabilities_agree_with_the_logits_they_came_from(expected):
    logits = expected.logits
    said = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert difference(said, logits) < 1e-6


def test_a_difference_is_relative_to_the_largest_logit():
    expected, added = np.array([[-1.0, 0.0, 1.0]]), np.array([[0.1, -0.2, 0.1]])
    assert difference(expected + added, expected) == pytest.approx(0.2)


def test_a_text_counts_until_the_first_token_that_differs(expected):
    greedy = expected.greedy.copy()
    greedy[5] = 99
    said = Reference(expected.logits, greedy, {"loss": 9.9, "gradient_norm": 2.0})
    found = compare("peer", "bfloat16", said, expected)
    assert (found.greedy, found.first_tokens, found.logits) == (5, 8, 0.0)
    assert found.loss == pytest.approx(0.1)
    assert found.gradient_norm == 0


def test_a_system_that_does_not_train_says_nothing_of_losses(expected):
    found = compare("peer", "float32", Reference(expected.logits, expected.greedy, None), expected)
    assert (found.greedy, found.loss, found.gradient_norm) == (32, None, None)
