"""Configurations drawn at random: what nobody thought of when the cases were made."""

from __future__ import annotations

import dataclasses
import random

import pytest
import reference_ours as ours
from reference_cases import BY_NAME, ROUTING_MARGIN, Case, yarn
from reference_weights import trained_names

from parity import pairs, peer
from parity.measure import GRADIENTS, LOGITS, relative, same_experts


def drawn(number: int) -> Case:
    """Draw a configuration and the first seed of weights that leaves routing no near tie."""
    pick = random.Random(number)  # noqa: S311 - a test's dice
    old = pick.random() < 0.3
    base = BY_NAME["v2-group-limited" if old else "plain"].config
    group, groups = pick.choice([2, 3, 4]), pick.choice([1, 2, 4, 8])
    kept = pick.randint(1, groups)
    heads, layers = pick.choice([1, 2, 3, 5]), pick.randint(1, 3)
    both = {"mscale": pick.uniform(0.4, 1.4), "mscale_all_dim": pick.uniform(0.4, 1.4)}
    chosen = {name: value for name, value in both.items() if pick.random() < 0.6}
    scaled = yarn(pick.choice([2.0, 5.0, 40.0]), pick.choice([8, 16, 64]), **chosen)
    config = {
        **base,
        "vocab_size": pick.choice([64, 101]),
        "hidden_size": heads * pick.choice([8, 14]),
        "intermediate_size": pick.choice([20, 37]),
        "moe_intermediate_size": pick.choice([6, 11]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_shared_experts": pick.choice([0, 1, 2]),
        "n_routed_experts": group * groups,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": pick.randint(1, kept * group),
        "routed_scaling_factor": pick.choice([1.0, 1.3, 2.5]),
        # Even: the V2 of transformers views these as complex numbers.
        "kv_lora_rank": pick.choice([6, 14]),
        "q_lora_rank": pick.choice([None, 9]),
        "qk_rope_head_dim": pick.choice([2, 6, 16]),
        "qk_nope_head_dim": pick.choice([4, 10]),
        "v_head_dim": pick.choice([5, 8]),
        "first_k_dense_replace": pick.randint(0, layers),
        "rms_norm_eps": pick.choice([1e-6, 1e-3]),
        "tie_word_embeddings": pick.random() < 0.3,
        "rope_theta": pick.choice([1e2, 1e4, 1e6]),
        "rope_scaling": scaled if pick.random() < 0.6 else None,
        "attention_bias": pick.random() < 0.5,
    }
    if old:
        config["topk_method"] = pick.choice(["greedy", "group_limited_greedy"])
    else:
        config["norm_topk_prob"] = pick.random() < 0.6
        config["rope_interleave"] = pick.random() < 0.6
        config["num_nextn_predict_layers"] = pick.choice([0, 1])
    if config["norm_topk_prob"]:
        # The gate of a single expert is 1 whatever the router says: no gradient to compare.
        config["num_experts_per_tok"] = max(config["num_experts_per_tok"], 2)
    lengths = tuple(pick.randint(2, 30) for _ in range(3))
    case = Case(f"random-{number}", config, 1000 * number, lengths)
    while pairs.peer_forward(case).margin < ROUTING_MARGIN:
        case = dataclasses.replace(case, name=f"{case.name}-again", seed=case.seed + 1)
    return case


@pytest.mark.parametrize("number", range(6))
def test_logits_experts_and_gradients(number: int) -> None:
    case = drawn(number)
    ids, mask = case.batch()
    real, model = mask == 1, pairs.ours_of(case)
    expected = pairs.peer_forward(case)
    assert relative(model(ids, mask).numpy()[real], expected.logits[real]) < LOGITS
    for mine, theirs in zip(ours.experts(model, ids, mask), expected.experts, strict=True):
        assert same_experts(mine[real.ravel()], theirs[real.ravel()])
    slopes = peer.gradients(pairs.peer_of(case), ids, mask)
    mine = ours.gradients(model, ids, mask)
    for name in trained_names(case.config):
        assert relative(mine[name], slopes[name]) < GRADIENTS, name
