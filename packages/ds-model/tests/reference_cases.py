"""Tiny configurations that together reach every branch of DeepSeek-V2 and V3.

A case is a `config.json` in the released vocabulary, a seed for its weights and its
token ids, and the shape of its batch. Nothing here needs torch or TensorFlow: the parity
suite feeds the cases to `transformers` and to this project, and the packages' own tests
compare with the numbers that `transformers` gave (`tests/reference/`).

Seeds are chosen so that no routing decision in the batch, or in the greedy continuation,
lies within `ROUTING_MARGIN` of the other outcome; the parity suite asserts it. Rounding
differs by about 1e-6 between two float32 implementations, so a chosen expert that differs
is an error and never bad luck.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

ROUTING_MARGIN = 1e-4
"""Least distance, in router scores, between the last chosen and the first refused."""

NEW_TOKENS = 64
"""Tokens that each case continues greedily."""

_BASE_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "float32",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_interleave": True,
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

_BASE_V2: dict[str, Any] = {
    **{k: v for k, v in _BASE_V3.items() if k != "rope_interleave"},
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
del _BASE_V2["num_nextn_predict_layers"]


def yarn(factor: float, original: int, **more: float) -> dict[str, Any]:
    """Return a `rope_scaling` entry as released checkpoints write it."""
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": 32,
        "beta_slow": 1,
        **more,
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One tiny model and one batch.

    Attributes:
        name: identifies the case in test ids and file names.
        config: the content of `config.json`, in the released vocabulary.
        seed: of the weights and the token ids.
        lengths: real tokens of each row; shorter rows are padded on the left.
        bias_range: the router's `e_score_correction_bias` is uniform between the two.
        committed: whether `tests/reference/` holds this case's numbers.
    """

    name: str
    config: dict[str, Any]
    seed: int
    lengths: tuple[int, ...] = (24, 24)
    bias_range: tuple[float, float] = (-0.6, 0.4)
    committed: bool = False

    @property
    def depth(self) -> int:
        """Number of multi-token-prediction modules in the checkpoint."""
        return self.config.get("num_nextn_predict_layers", 0)

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts in the main model."""
        return self.config["num_hidden_layers"] - self.config["first_k_dense_replace"]

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and mask, `[batch, sequence]` int32 each, padded on the left.

        Ids start at 3, so that no real token is the padding, first or last token.
        """
        longest = max(self.lengths)
        vocab = self.config["vocab_size"]
        raw = np.random.PCG64(self.seed).random_raw(len(self.lengths) * longest)
        ids = (raw % np.uint64(vocab - 3)).astype(np.int32).reshape(len(self.lengths), longest) + 3
        slot = np.arange(longest)[None, :]
        mask = (slot >= longest - np.array(self.lengths)[:, None]).astype(np.int32)
        pad = self.config["pad_token_id"] or 0
        return np.where(mask == 1, ids, pad).astype(np.int32), mask


def _v3(name: str, seed: int, *, batch: dict[str, Any] | None = None, **changes: Any) -> Case:
    unknown = changes.keys() - _BASE_V3.keys()
    if unknown:
        raise KeyError(f"{name}: {sorted(unknown)} not in a released config.json")
    return Case(name, {**_BASE_V3, **changes}, seed, **(batch or {}))


def _v2(name: str, seed: int, *, batch: dict[str, Any] | None = None, **changes: Any) -> Case:
    return Case(name, {**_BASE_V2, **changes}, seed, **(batch or {}))


CASES: tuple[Case, ...] = (
    # The released shape in small: eight groups, exactly as many experts allowed as chosen.
    _v3(
        "released",
        11,
        n_group=8,
        topk_group=2,
        rope_scaling=yarn(4.0, 16, mscale=1.0, mscale_all_dim=1.0),
        num_nextn_predict_layers=1,
        batch={"lengths": (40, 40), "committed": True},
    ),
    _v3("plain", 12, rope_interleave=False, n_shared_experts=2, batch={"committed": True}),
    # Without mscale, cosine and sine carry 0.1 ln s + 1 and the scores nothing.
    _v3(
        "yarn-without-mscale",
        1113,
        q_lora_rank=None,
        rope_scaling=yarn(4.0, 16),
        batch={"lengths": (40, 40)},
    ),
    # The two mscales differ: cosine and sine carry their ratio, the scores the square.
    _v3(
        "yarn-two-mscales",
        514,
        q_lora_rank=None,
        rope_interleave=False,
        rope_scaling=yarn(8.0, 8, mscale=0.707, mscale_all_dim=1.3),
        batch={"lengths": (40, 33), "committed": True},
    ),
    _v3(
        "yarn-only-all-dim",
        115,
        rope_scaling=yarn(16.0, 8, mscale_all_dim=0.8),
        rope_theta=500.0,
        batch={"lengths": (48, 48)},
    ),
    _v3(
        "yarn-narrow-ramp",
        16,
        qk_rope_head_dim=16,
        rope_scaling=yarn(40.0, 32, mscale=0.5)
        | {"beta_fast": 8, "beta_slow": 2, "truncate": False},
        rope_theta=1e5,
        batch={"lengths": (48,)},
    ),
    _v3(
        "all-dense",
        17,
        first_k_dense_replace=3,
        attention_bias=True,
        tie_word_embeddings=True,
        q_lora_rank=None,
        batch={"lengths": (24, 17)},
    ),
    # Every bias below zero: an implementation that masks with 0 takes refused experts.
    _v3(
        "all-moe-negative-bias",
        18,
        first_k_dense_replace=0,
        num_hidden_layers=2,
        n_shared_experts=0,
        n_group=4,
        topk_group=1,
        n_routed_experts=16,
        num_experts_per_tok=3,
        batch={"bias_range": (-2.0, -1.0), "committed": True},
    ),
    _v3(
        "one-group",
        19,
        n_group=1,
        topk_group=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        hidden_size=48,
        v_head_dim=24,
        qk_nope_head_dim=8,
        batch={"bias_range": (-1.0, 1.0)},
    ),
    _v3(
        "two-mtp-modules",
        20,
        attention_bias=True,
        num_nextn_predict_layers=2,
        n_routed_experts=12,
        num_experts_per_tok=5,
        topk_group=3,
        num_hidden_layers=2,
        batch={"committed": True},
    ),
    _v3(
        "tied-head-mtp",
        121,
        tie_word_embeddings=True,
        num_nextn_predict_layers=1,
        num_hidden_layers=2,
        n_shared_experts=2,
        q_lora_rank=None,
    ),
    # The latents' norms keep 1e-6 whatever rms_norm_eps says; gates are not normalised.
    _v3(
        "coarse-epsilon",
        222,
        rms_norm_eps=0.05,
        norm_topk_prob=False,
        routed_scaling_factor=0.7,
        num_attention_heads=2,
        num_key_value_heads=2,
        batch={"committed": True},
    ),
    _v3(
        "left-padded",
        2223,
        pad_token_id=2,
        n_group=8,
        topk_group=3,
        n_routed_experts=24,
        num_experts_per_tok=6,
        rope_scaling=yarn(4.0, 16, mscale=1.0, mscale_all_dim=1.0),
        batch={"lengths": (36, 21, 5), "committed": True},
    ),
    _v3(
        "one-expert-one-head",
        724,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_experts_per_tok=1,
        topk_group=1,
        norm_topk_prob=False,
        first_k_dense_replace=0,
        num_hidden_layers=2,
        batch={"lengths": (9, 24, 13)},
    ),
    _v2(
        "v2-lite",
        1131,
        n_routed_experts=12,
        num_experts_per_tok=3,
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        n_shared_experts=2,
        rope_scaling=yarn(4.0, 16, mscale=0.707, mscale_all_dim=0.707),
        batch={"lengths": (40, 30), "committed": True},
    ),
    _v2(
        "v2-group-limited",
        1332,
        topk_method="group_limited_greedy",
        routed_scaling_factor=4.0,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        batch={"committed": True},
    ),
    _v2(
        "v2-tight-groups",
        33,
        topk_method="group_limited_greedy",
        routed_scaling_factor=2.0,
        n_group=8,
        topk_group=2,
        num_experts_per_tok=4,
        attention_bias=True,
        n_shared_experts=1,
        first_k_dense_replace=0,
        num_hidden_layers=2,
        rope_scaling=yarn(4.0, 16, mscale=1.0, mscale_all_dim=0.5),
        batch={"lengths": (40, 12)},
    ),
)
"""Every case, DeepSeek-V3's first."""

BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
COMMITTED: tuple[Case, ...] = tuple(case for case in CASES if case.committed)
