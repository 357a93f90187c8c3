import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import ds_moe.router
from ds_moe import MoEConfig, Router

V3 = MoEConfig(
    hidden_size=12,
    moe_intermediate_size=4,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    initializer_range=1.0,
)
V2 = MoEConfig(
    **(
        V3.to_dict()
        | {
            "scoring_func": "softmax",
            "topk_method": "group_limited_greedy",
            "norm_topk_prob": False,
        }
    )
)
LITE = MoEConfig(**(V2.to_dict() | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}))


def made(config: MoEConfig, bias_spread: float = 0.4) -> Router:
    router = Router(config)
    router.build((None, config.hidden_size))
    if router.e_score_correction_bias is not None:
        bias = np.random.default_rng(1).normal(size=config.n_routed_experts) * bias_spread
        router.e_score_correction_bias.assign(bias)
    return router


def by_the_equations(router: Router, h: np.ndarray) -> tuple[set[int], dict[int, float]]:
    """One token through eq. 12-16 of arXiv 2412.19437 (or V2's rule) in plain Python."""
    c = router.config
    logits = h.astype(np.float64) @ router.weight.numpy()
    if c.scoring_func == "sigmoid":
        s = 1 / (1 + np.exp(-logits))
    else:
        s = np.exp(logits) / np.exp(logits).sum()
    bias = np.zeros(c.n_routed_experts)
    if router.e_score_correction_bias is not None:
        bias = router.e_score_correction_bias.numpy()
    biased = {e: s[e] + bias[e] for e in range(c.n_routed_experts)}
    size = c.n_routed_experts // c.n_group
    members = {g: range(g * size, (g + 1) * size) for g in range(c.n_group)}
    best = 2 if c.topk_method == "noaux_tc" else 1

    def group_score(g: int) -> float:
        return sum(sorted((biased[e] for e in members[g]), reverse=True)[:best])

    groups = sorted(members, key=group_score, reverse=True)[: c.topk_group]
    reachable = [e for g in groups for e in members[g]]
    chosen = sorted(reachable, key=biased.get, reverse=True)[: c.num_experts_per_tok]
    total = sum(s[e] for e in chosen) if c.norm_topk_prob else 1.0
    return set(chosen), {e: s[e] / total * c.routed_scaling_factor for e in chosen}


@pytest.mark.parametrize("config", [V3, V2, LITE], ids=["v3", "v2", "v2-lite"])
def test_equals_the_papers_equations(config):
    router = made(config)
    h = np.random.default_rng(2).normal(size=(200, 12)).astype(np.float32)
    routing = router(h)

    for t in range(200):
        chosen, gates = by_the_equations(router, h[t])
        assert set(routing.indices[t].numpy()) == chosen
        for e, gate in zip(routing.indices[t].numpy(), routing.gates[t].numpy(), strict=True):
            assert gate == pytest.approx(gates[e], rel=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    groups=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_what_always_holds(groups, data, seed):
    kept = data.draw(st.integers(1, groups))
    most = kept * (16 // groups)
    per_token = data.draw(st.integers(1, most))
    config = MoEConfig(
        **(V3.to_dict() | {"n_group": groups, "topk_group": kept, "num_experts_per_tok": per_token})
    )
    router = made(config)
    h = np.random.default_rng(seed).normal(size=(9, 12)).astype(np.float32)
    indices, gates, scores, load = (x.numpy() for x in router(h))

    assert all(len(set(row)) == per_token for row in indices)
    assert all(len(set(row // (16 // groups))) <= kept for row in indices)
    np.testing.assert_allclose(gates.sum(-1), 2.5, rtol=1e-5)
    np.testing.assert_array_equal(load, np.bincount(indices.ravel(), minlength=16))
    ratio = gates / np.take_along_axis(scores, indices, 1)
    np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones_like(ratio), rtol=1e-4)


def test_the_bias_moves_the_choice_and_never_the_gate():
    router = made(V3, bias_spread=0.0)
    h = tf.random.stateless_normal([64, 12], seed=[3, 4])
    before = router(h)
    bias = np.zeros(16)
    bias[5] = -10.0  # out of reach
    router.e_score_correction_bias.assign(bias)
    after = router(h)

    assert (before.indices.numpy() == 5).any()
    assert not (after.indices.numpy() == 5).any()
    np.testing.assert_array_equal(after.scores, before.scores)
    router.e_score_correction_bias.assign(np.full(16, 3.0))  # for all alike: nothing changes
    same = router(h)
    np.testing.assert_allclose(np.sort(same.gates, -1), np.sort(before.gates, -1), rtol=1e-6)


def test_no_gradient_reaches_the_bias_and_the_scores_have_one():
    router = made(V3)
    h = tf.random.stateless_normal([8, 12], seed=[5, 6])
    with tf.GradientTape() as tape:
        gates = router(h).gates
        loss = tf.reduce_sum(gates * tf.random.stateless_normal(gates.shape, seed=[1, 1]))

    assert [w.name for w in router.trainable_weights] == ["weight"]
    assert np.abs(tape.gradient(loss, router.weight.value)).max() > 1e-3


def test_float32_whatever_the_policy():
    router = Router(V3, dtype="mixed_bfloat16")
    exact = made(V3)
    router.build((None, 12))
    router.set_weights(exact.get_weights())
    h = tf.cast(tf.random.stateless_normal([300, 12], seed=[7, 8]), tf.bfloat16)

    low, high = router(h), exact(tf.cast(h, tf.float32))
    assert low.gates.dtype == tf.float32
    for mine, other in zip(low, high, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_padding_is_routed_but_not_counted():
    router = made(V3)
    h = tf.random.stateless_normal([6, 12], seed=[9, 10])
    mask = tf.constant([1, 0, 1, 1, 0, 1])

    counted = router(h, mask)
    np.testing.assert_array_equal(counted.load, router(tf.boolean_mask(h, mask)).load)
    np.testing.assert_array_equal(counted.indices, router(h).indices)


def test_comes_back_from_its_config():
    router = made(V3)
    again = Router.from_config(router.get_config())
    again.build((None, 12))
    again.set_weights(router.get_weights())

    h = tf.random.stateless_normal([5, 12], seed=[11, 12])
    np.testing.assert_array_equal(router(h).gates, again(h).gates)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_routed_experts": 0}, "n_routed_experts is 0"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1"),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        ({"topk_method": "best"}, "topk_method is 'best'"),
        ({"n_group": 3}, r"n_group is 3; it must divide n_routed_experts \(16\)"),
        ({"topk_group": 5}, r"topk_group is 5; it must be at most n_group \(4\)"),
        ({"num_experts_per_tok": 9}, "a token can reach only 8 experts"),
        ({"n_group": 16, "topk_group": 8}, "a group needs at least 2"),
    ],
)
def test_bad_rules_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        MoEConfig(**(V3.to_dict() | change))


@pytest.mark.parametrize("config", [V3, V2, LITE], ids=["V3", "V2", "Lite"])
def test_one_operation_routes_as_the_steps_do(config, monkeypatch):
    router = made(config)
    x = tf.constant(np.random.default_rng(6).normal(size=(300, 12)), tf.float32)
    slope = tf.constant(np.random.default_rng(7).normal(size=(300, 16)), tf.float32)

    def spread() -> tuple[np.ndarray, list[tf.Tensor]]:
        """Gates laid out over the experts, so that the order of a choice does not matter."""
        with tf.GradientTape() as tape:
            tape.watch(x)
            routing = router(x)
            chosen = tf.one_hot(routing.indices, config.n_routed_experts)
            gates = tf.einsum("tk,tke->te", routing.gates, chosen)
            value = tf.reduce_sum(gates * slope)
        return gates.numpy(), tape.gradient(value, [x, router.weight.value])

    gates, slopes = spread()
    monkeypatch.setattr(ds_moe.router, "use_kernels", lambda *_: False)
    expected, expected_slopes = spread()
    np.testing.assert_allclose(gates, expected, atol=1e-6)
    for mine, other in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_of_equal_experts_the_first_are_chosen(monkeypatch):
    router = made(V3, bias_spread=0.0)
    router.weight.assign(tf.zeros_like(router.weight))
    x = tf.ones([3, 12])
    by_one_operation = np.sort(router(x).indices, axis=1)
    monkeypatch.setattr(ds_moe.router, "use_kernels", lambda *_: False)

    np.testing.assert_array_equal(by_one_operation, [[0, 1, 2, 3]] * 3)
    np.testing.assert_array_equal(np.sort(router(x).indices, axis=1), by_one_operation)
