import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe.experts import blocked_experts, run_experts, sorted_experts, swiglu

PROGRAMS = {"sorted": sorted_experts, "blocked": blocked_experts}


def problem(tokens: int, experts: int, per_token: int, seed: int, skew: float = 0.0):
    rng = np.random.default_rng(seed)
    weights = np.exp(-skew * np.arange(experts))
    indices = np.stack(
        [
            rng.choice(experts, per_token, replace=False, p=weights / weights.sum())
            for _ in range(tokens)
        ]
    )
    return (
        rng.normal(size=(tokens, 6)),
        indices.astype(np.int32),
        rng.uniform(size=(tokens, per_token)),
        rng.normal(size=(experts, 6, 8)),
        rng.normal(size=(experts, 4, 6)),
    )


def one_by_one(x, indices, gates, gate_up, down):
    """The sum as the paper writes it, token by token."""
    out = np.zeros_like(x)
    for t, row in enumerate(indices):
        for k, e in enumerate(row):
            gate, up = np.split(x[t] @ gate_up[e], 2)
            out[t] += gates[t, k] * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    return out


@pytest.mark.parametrize("run", PROGRAMS.values(), ids=PROGRAMS)
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    data=st.data(),
    seed=st.integers(0, 2**31),
    skew=st.sampled_from([0.0, 0.5, 3.0]),
)
def test_equals_the_sum_of_the_paper_and_drops_nothing(run, tokens, experts, data, seed, skew):
    per_token = data.draw(st.integers(1, experts))
    args = problem(tokens, experts, per_token, seed, skew)

    np.testing.assert_allclose(run(*map(tf.constant, args)), one_by_one(*args), atol=1e-10)


@pytest.mark.parametrize("skew", [0.0, 4.0])
def test_gradients_of_both_programs_agree(skew):
    x, indices, gates, gate_up, down = map(tf.constant, problem(50, 5, 2, 3, skew))
    found = []
    for run in PROGRAMS.values():
        with tf.GradientTape() as tape:
            tape.watch([x, gates, gate_up, down])
            loss = tf.reduce_sum(run(x, indices, gates, gate_up, down) ** 2)
        found.append(
            [tf.convert_to_tensor(g) for g in tape.gradient(loss, [x, gates, gate_up, down])]
        )
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_an_expert_without_tokens_has_gradient_zero():
    x, _, gates, gate_up, down = map(tf.constant, problem(4, 3, 1, 5))
    with tf.GradientTape() as tape:
        tape.watch(gate_up)
        out = sorted_experts(x, tf.zeros([4, 1], tf.int32), gates, gate_up, down)
    gradient = tape.gradient(out, gate_up)

    assert np.abs(gradient[0]).max() > 0
    np.testing.assert_array_equal(gradient[1:], np.zeros_like(gradient[1:]))


def test_what_is_traced_for_xla_compiles_and_agrees_with_the_graph():
    args = [
        tf.cast(a, tf.float32) if a.dtype != np.int32 else tf.constant(a)
        for a in problem(33, 8, 3, 7)
    ]
    compiled = tf.function(run_experts, jit_compile=True)
    nested = tf.function(tf.function(run_experts), jit_compile=True)

    expected = tf.function(run_experts)(*args)
    np.testing.assert_allclose(compiled(*args), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(nested(*args), expected, rtol=1e-5, atol=1e-5)


def test_graph_mode_takes_any_number_of_tokens_in_one_trace():
    traced = tf.function(
        run_experts,
        input_signature=[
            tf.TensorSpec([None, 6], tf.float64),
            tf.TensorSpec([None, 2], tf.int32),
            tf.TensorSpec([None, 2], tf.float64),
            tf.TensorSpec([4, 6, 8], tf.float64),
            tf.TensorSpec([4, 4, 6], tf.float64),
        ],
    )
    for tokens in (1, 5, 17):
        args = problem(tokens, 4, 2, tokens)
        np.testing.assert_allclose(traced(*map(tf.constant, args)), one_by_one(*args), atol=1e-10)


def test_swiglu_gates_with_the_first_half():
    np.testing.assert_allclose(
        swiglu(tf.constant([[0.0, 2.0, 5.0, 3.0]])), [[0.0, 3 * 2 / (1 + np.exp(-2))]], rtol=1e-6
    )
