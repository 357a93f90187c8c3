import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe import (
    MixtureOfExperts,
    MoEConfig,
    Router,
    max_violation,
    sequence_balance_loss,
    update_biases,
)

BASE = MoEConfig(
    hidden_size=8,
    moe_intermediate_size=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    initializer_range=1.0,
)


def made(**changes) -> Router:
    router = Router(MoEConfig(**(BASE.to_dict() | changes)))
    router.build((None, 8))
    return router


def test_each_bias_moves_by_gamma_towards_the_mean():
    router = made()
    router.e_score_correction_bias.assign(np.arange(8.0))
    load = np.array([9, 1, 4, 4, 4, 4, 6, 0], np.float32)  # mean 4

    update_biases([router], [tf.constant(load)], 0.01)
    np.testing.assert_allclose(
        router.e_score_correction_bias.numpy() - np.arange(8.0),
        [-0.01, 0.01, 0, 0, 0, 0, -0.01, 0.01],
        atol=1e-6,
    )


def test_one_step_on_summed_loads_is_not_two_steps():
    # Accumulation: two micro-batches pull expert 0 apart; their sum is balanced.
    once, twice = made(), made()
    first = tf.constant([8.0, 0, 4, 4, 4, 4, 4, 4])
    second = tf.constant([0.0, 8, 4, 4, 4, 4, 4, 4])

    update_biases([once], [first + second], 0.1)
    update_biases([twice], [first], 0.1)
    np.testing.assert_array_equal(once.e_score_correction_bias, np.zeros(8))
    assert np.abs(twice.e_score_correction_bias).max() == np.float32(0.1)


def test_routers_without_a_bias_are_passed_over():
    update_biases([made(scoring_func="softmax", topk_method="greedy")], [tf.zeros([8])], 0.1)


def test_replicas_sum_their_loads_and_stay_equal():
    strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    with strategy.scope():
        router = made()
    loads = tf.constant([[8.0, 0, 4, 4, 4, 4, 4, 4], [0, 6, 4, 4, 4, 4, 4, 6]])  # sums: mean 8

    @tf.function(autograph=False)
    def step():
        def on_replica():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            update_biases([router], [tf.gather(loads, replica)], 0.5)

        strategy.run(on_replica)

    step()
    copies = strategy.experimental_local_results(router.e_score_correction_bias.value)
    assert len(copies) == 2
    for copy in copies:
        np.testing.assert_array_equal(copy, [0, 0.5, 0, 0, 0, 0, 0, -0.5])


def test_recomputing_the_forward_pass_counts_no_token_twice():
    # Recompute runs the layer again in the backward pass; the load is a value, not a counter.
    layer = MixtureOfExperts(BASE)
    x = tf.random.stateless_normal([2, 8, 8], seed=[1, 2])
    layer(x)  # creates the weights, which a recomputed function may not
    runs, loads = [], []

    @tf.recompute_grad
    def recomputed(x):
        runs.append(1)
        y, routing = layer(x)
        return y, routing.load

    for run in (lambda x: (layer(x)[0], layer(x)[1].load), recomputed):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, load = run(x)
            loss = tf.reduce_sum(y**2)
        gradient = tape.gradient(loss, x)
        update_biases([layer.gate], [load], 0.25)
        loads.append((load.numpy(), gradient.numpy(), layer.gate.e_score_correction_bias.numpy()))
        layer.gate.e_score_correction_bias.assign(tf.zeros([8]))

    assert len(runs) == 2
    np.testing.assert_array_equal(loads[0][0], loads[1][0])
    np.testing.assert_allclose(loads[0][1], loads[1][1], rtol=1e-5)
    np.testing.assert_array_equal(loads[0][2], loads[1][2])
    assert float(tf.reduce_sum(loads[0][0])) == 2 * 8 * 2


def test_a_skewed_router_is_balanced_by_the_bias_alone():
    router = made()
    rng = np.random.default_rng(0)
    lean = rng.normal(size=8)  # every token leans the same way: a few experts get everything

    def batch():
        return tf.constant(rng.normal(size=(512, 8)) * 0.5 + lean, tf.float32)

    before = float(max_violation(router(batch()).load))
    for _ in range(300):
        update_biases([router], [router(batch()).load], 0.01)
    after = float(max_violation(router(batch()).load))

    assert before > 1.5
    assert after < 0.3


def test_sequence_loss_of_a_worked_example():
    # 2 tokens, 2 experts, top 1; both tokens go to expert 0. f = (2, 0); s' = (3/4, 1/4) twice.
    scores = tf.constant([[0.6, 0.2], [0.3, 0.1]])
    indices = tf.constant([[0], [0]])

    assert float(sequence_balance_loss(scores, indices, 1)) == pytest.approx(2 * 0.75)


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(1, 3), length=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_sequence_loss_is_the_papers_sums(batch, length, seed):
    rng = np.random.default_rng(seed)
    experts, per_token = 6, 2
    s = rng.uniform(0.01, 1, size=(batch, length, experts))
    chosen = np.argsort(-s, -1)[..., :per_token]

    total = 0.0
    for b in range(batch):
        for i in range(experts):
            f = experts / (per_token * length) * sum(i in chosen[b, t] for t in range(length))
            p = np.mean([s[b, t, i] / s[b, t].sum() for t in range(length)])
            total += f * p / batch
    ours = sequence_balance_loss(
        tf.constant(s.reshape(-1, experts), tf.float32),
        tf.constant(chosen.reshape(-1, per_token), tf.int32),
        batch,
    )
    assert float(ours) == pytest.approx(total, rel=1e-5)


def test_sequence_loss_is_one_when_all_is_even():
    scores = tf.fill([4, 4], 0.3)
    indices = tf.constant([[0, 1], [2, 3], [0, 2], [1, 3]])

    assert float(sequence_balance_loss(scores, indices, 1)) == pytest.approx(1.0)


def test_max_violation_is_the_excess_over_an_even_share():
    loads = tf.constant([[4.0, 4, 4, 4], [10, 2, 2, 2], [0, 0, 0, 0]])

    np.testing.assert_allclose(max_violation(loads), [0, 1.5, -1], rtol=1e-6)
