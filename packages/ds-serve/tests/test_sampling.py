"""How tokens are chosen, against the same rules in NumPy and against their distribution."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_serve.engine.sampling import Choice, changes_of, choice_for, choose
from ds_serve.engine.text import Rules, Text

SIZE = 37
SIGNATURE = [tf.TensorSpec([None, SIZE], tf.float32), Choice.spec(SIZE)]
compiled = tf.function(choose, input_signature=SIGNATURE, autograph=False)


def text(rules, prompt=(1,), written=()):
    made = Text(list(prompt), rules, lambda _: None)
    for token in written:
        made.write(token)
    return made


def chosen(logits, *texts):
    rows = [(one, one.written) for one in texts]
    choice = tf.nest.map_structure(tf.constant, choice_for(rows, SIZE))
    return compiled(tf.constant(logits, tf.float32), choice)


def kept(logits, rules):
    """The tokens that may be drawn, by the definitions."""
    scores = logits / rules.temperature
    order = np.argsort(-scores)
    if rules.top_k:
        order = order[: rules.top_k]
    p = np.exp(scores[order] - scores[order].max())
    p /= p.sum()
    before = np.cumsum(p) - p
    nucleus = set(order[before < rules.top_p].tolist()) if rules.top_p < 1 else set(order.tolist())
    p_all = np.exp(scores - scores.max())
    return {token for token in nucleus if p_all[token] >= rules.min_p}


def test_greedy_takes_the_first_of_the_best():
    logits = np.zeros([2, SIZE])
    logits[0, [5, 9]] = 3
    logits[1, 30] = 1
    assert chosen(logits, text(Rules()), text(Rules())).tokens.numpy().tolist() == [5, 30]


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.2, 2),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)
def test_what_is_drawn_is_among_what_is_kept(temperature, top_k, top_p, min_p, seed):
    logits = np.random.default_rng(seed % 1000).normal(size=[1, SIZE]) * 2
    rules = Rules(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    token = int(chosen(logits, text(rules)).tokens[0])
    assert token in kept(logits[0], rules)


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_have_the_distribution_of_what_is_kept(rules):
    logits = np.random.default_rng(1).normal(size=SIZE) * 1.5
    count = 4000
    texts = [text(Rules(**rules, seed=seed)) for seed in range(count)]
    tokens = chosen(np.tile(logits, [count, 1]), *texts).tokens.numpy()
    open_ = kept(logits, Rules(**rules))
    p = np.exp(logits / rules["temperature"])
    p[[token for token in range(SIZE) if token not in open_]] = 0
    p /= p.sum()
    found = np.bincount(tokens, minlength=SIZE)
    assert found[p == 0].sum() == 0
    expected = p[p > 0] * count
    chi_squared = ((found[p > 0] - expected) ** 2 / expected).sum()
    degrees = (p > 0).sum() - 1
    assert chi_squared < degrees + 5 * np.sqrt(2 * degrees) + 5


def test_a_draw_depends_on_seed_and_place_and_on_nothing_else():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=SIZE)
    rules = Rules(temperature=1.0, seed=11)
    alone = int(chosen(logits[None], text(rules)).tokens[0])
    others = [text(Rules(temperature=t, seed=s, top_k=3)) for t, s in ((0.0, 11), (1.0, 12))]
    batch = np.stack([rng.normal(size=SIZE), logits, rng.normal(size=SIZE)])
    assert int(chosen(batch, others[0], text(rules), others[1]).tokens[1]) == alone
    places = {int(chosen(logits[None], text(rules, written=[3] * n)).tokens[0]) for n in range(12)}
    seeds = {
        int(chosen(logits[None], text(Rules(temperature=1.0, seed=s << 31))).tokens[0])
        for s in range(12)
    }
    assert min(len(places), len(seeds)) > 3


def test_penalties_and_bias_are_those_of_their_papers():
    rules = Rules(
        repetition_penalty=1.5,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={4: 7.0, 2: -1.0},
    )
    one = text(rules, prompt=[0, 1], written=[1, 2, 2])
    logits = np.linspace(-1, 2, SIZE)
    expected = logits.copy()
    for token in (0, 1, 2):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token, count in {1: 1, 2: 2}.items():
        expected[token] -= 0.3 + 0.2 * count
    expected[4] += 7
    expected[2] -= 1
    changes = changes_of(one)
    found = logits.copy()
    for token, (factor, less) in changes.items():
        was = found[token]
        found[token] = (was / factor if was > 0 else was * factor) - less
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert int(chosen(logits[None], one).tokens[0]) == int(expected.argmax()) == 4


def test_no_end_before_the_least_number_of_tokens():
    logits = np.zeros([1, SIZE])
    logits[0, 8], logits[0, 9] = 5, 4
    rules = Rules(min_tokens=2, ends=frozenset({8}))
    assert int(chosen(logits, text(rules)).tokens[0]) == 9
    assert int(chosen(logits, text(rules, written=[3])).tokens[0]) == 9
    assert int(chosen(logits, text(rules, written=[3, 3])).tokens[0]) == 8


def test_only_what_is_allowed_comes():
    class Only:
        done = False

        def __init__(self, *tokens):
            self.tokens = tokens

        def allowed(self):
            words = np.zeros(-(-SIZE // 32), np.uint32)
            for token in self.tokens:
                words[token // 32] |= np.uint32(1 << token % 32)
            return words.view(np.int32)

    logits = np.arange(SIZE, dtype=float)[None].repeat(3, 0)
    texts = [text(Rules()), text(Rules()), text(Rules(temperature=1.0))]
    texts[1].matcher, texts[2].matcher = Only(3, 31, 7), Only(35)
    assert chosen(logits, *texts).tokens.numpy().tolist() == [SIZE - 1, 31, 35]


def test_log_probabilities_are_the_models_own():
    logits = np.random.default_rng(3).normal(size=[2, SIZE])
    told = chosen(
        logits,
        text(Rules(logprobs=3, temperature=0.5, top_k=1, logit_bias={5: 100.0})),
        text(Rules()),
    )
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert int(told.tokens[0]) == 5
    np.testing.assert_allclose(told.logprobs[0], expected[0, 5], rtol=1e-5)
    order = np.argsort(-expected[0])[:20]
    assert told.likeliest[0].numpy().tolist() == order.tolist()
    np.testing.assert_allclose(told.likeliest_logprobs[0], expected[0, order], rtol=1e-5)
    assert chosen(logits, text(Rules()), text(Rules())).logprobs.shape == [0]
