"""The cases reach every branch, and none of them hangs on a tie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference_cases import CASES, NEW_TOKENS, ROUTING_MARGIN, Case
from reference_weights import weights

from parity import pairs, peer

V3 = tuple(case for case in CASES if case.config["model_type"] == "deepseek_v3")
V2 = tuple(case for case in CASES if case.config["model_type"] == "deepseek_v2")


def scaling(config: dict[str, Any]) -> dict[str, Any]:
    return config["rope_scaling"] or {}


def beyond(case: Case) -> bool:
    original = scaling(case.config).get("original_max_position_embeddings", 10**9)
    return max(case.lengths) > original


BRANCHES: dict[str, Callable[[Case], bool]] = {
    "q_lora": lambda c: c.config["q_lora_rank"] is not None,
    "no q_lora": lambda c: c.config["q_lora_rank"] is None,
    "YaRN with both mscales": lambda c: (
        {"mscale", "mscale_all_dim"} <= scaling(c.config).keys() and beyond(c)
    ),
    "YaRN without mscale": lambda c: (
        bool(c.config["rope_scaling"]) and "mscale" not in scaling(c.config) and beyond(c)
    ),
    "no YaRN": lambda c: c.config["rope_scaling"] is None,
    "interleaved RoPE": lambda c: c.config["rope_interleave"],
    "RoPE in halves": lambda c: not c.config["rope_interleave"],
    "1 group": lambda c: c.config["n_group"] == 1,
    "4 groups": lambda c: c.config["n_group"] == 4,
    "8 groups": lambda c: c.config["n_group"] == 8,
    "as many experts allowed as chosen": lambda c: (
        c.config["topk_group"] * c.config["n_routed_experts"]
        == c.config["n_group"] * c.config["num_experts_per_tok"]
    ),
    "router bias of both signs": lambda c: c.bias_range[0] < 0 < c.bias_range[1],
    "router bias all negative": lambda c: c.bias_range[1] < 0,
    "no shared expert": lambda c: c.config["n_shared_experts"] == 0,
    "1 shared expert": lambda c: c.config["n_shared_experts"] == 1,
    "2 shared experts": lambda c: c.config["n_shared_experts"] == 2,
    "all dense": lambda c: c.moe_layers == 0,
    "all MoE": lambda c: c.config["first_k_dense_replace"] == 0,
    "attention bias": lambda c: c.config["attention_bias"],
    "tied head": lambda c: c.config["tie_word_embeddings"],
    "no MTP module": lambda c: c.depth == 0,
    "1 MTP module": lambda c: c.depth == 1,
    "2 MTP modules": lambda c: c.depth == 2,
    "left padding": lambda c: len(set(c.lengths)) > 1,
}


def test_there_are_twelve_of_v3() -> None:
    assert len(V3) >= 12


@pytest.mark.parametrize("branch", BRANCHES)
def test_v3_branch_is_reached(branch: str) -> None:
    assert any(BRANCHES[branch](case) for case in V3)


def test_v2_branches_are_reached() -> None:
    assert {case.config["topk_method"] for case in V2} == {"greedy", "group_limited_greedy"}
    assert {case.config["q_lora_rank"] is None for case in V2} == {True, False}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_weight_is_random(case: Case) -> None:
    for name, array in weights(case).items():
        assert array.size < 2 or array.std() > 0.05, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_routing_decision_is_near_a_tie(case: Case) -> None:
    model, (_, mask) = pairs.peer_of(case), case.batch()
    margins = [pairs.peer_forward(case).margin]
    new = np.ones((len(mask), NEW_TOKENS), np.int32)
    continued = np.concatenate([mask, new], axis=1)
    margins.append(peer.forward(model, pairs.peer_greedy(case), continued).margin)
    if case.depth:
        margins.append(peer.mtp_logits(model, weights(case), case.batch()[0])[1])
    assert min(margins) > ROUTING_MARGIN
