"""Runs whose speed others have published, and how far the model of costs is from them.

The first is that of arXiv 2412.19437, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ds_model import ModelConfig
from ds_train.plan.cluster import CLUSTERS
from ds_train.plan.planner import Plan, make_plan
from ds_train.plan.recipe import Recipe

# 2.664M hours of an H800 for 14.8T tokens (arXiv 2412.19437, table 1).
_PAPER = 14.8e12 / (2.664e6 * 3600)
_AUTOMODEL = "NVIDIA NeMo AutoModel, performance summary (October 2025)"


@dataclass(frozen=True)
class PublishedRun:
    """One of them.

    Attributes:
        name: what it is called.
        config: the model.
        cluster: of `CLUSTERS`.
        recipe: as far as it is known.
        tokens_per_second: of a device.
        source: who says so.
        fitted: whether `KEPT` was chosen to meet it.
    """

    name: str
    config: ModelConfig
    cluster: str
    recipe: Recipe
    tokens_per_second: float
    source: str
    fitted: bool = False


class Comparison(NamedTuple):
    """A published run beside its plan.

    Attributes:
        run: as published.
        plan: as planned.
        error: of the planned speed; 0.1 is 10% too fast.
    """

    run: PublishedRun
    plan: Plan
    error: float


_V3 = ModelConfig.preset("v3-671b")
_PLAIN = _V3.replace(num_nextn_predict_layers=0)
# config.json of moonshotai/Kimi-K2-Base and of moonshotai/Moonlight-16B-A3B, what changes speed.
_KIMI_K2 = _PLAIN.replace(
    vocab_size=163840,
    num_attention_heads=64,
    n_routed_experts=384,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
_MOONLIGHT = _PLAIN.replace(
    vocab_size=163840,
    hidden_size=2048,
    intermediate_size=11264,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)

PUBLISHED: tuple[PublishedRun, ...] = (
    PublishedRun(
        "DeepSeek-V3, 2,048 H800, FP8",
        _V3,
        "h800",
        Recipe(2048, 15360, 4096, 16, 64, schedule="dualpipe", precision="fp8", recompute="parts"),
        _PAPER,
        "arXiv 2412.19437, table 1 and section 3.2",
        fitted=True,
    ),
    PublishedRun(
        "DeepSeek-V3, 256 H100, BF16",
        _PLAIN,
        "h100",
        Recipe(256, 512, 4096, 4, 64, chunks=8, recompute="parts"),
        1002,
        _AUTOMODEL,
    ),
    PublishedRun(
        "DeepSeek-V3, 1,024 H100, BF16",
        _PLAIN,
        "h100",
        Recipe(1024, 8192, 4096, 4, 64, chunks=8, recompute="parts"),
        865,
        _AUTOMODEL,
    ),
    PublishedRun(
        "Kimi K2, 256 H100, BF16",
        _KIMI_K2,
        "h100",
        Recipe(256, 512, 4096, 8, 32, chunks=4, recompute="parts"),
        924,
        _AUTOMODEL,
    ),
    PublishedRun(
        "Moonlight 16B, 8 H100, BF16",
        _MOONLIGHT,
        "h100",
        Recipe(8, 256, 4096, 1, 8, micro_batch=2, recompute="none"),
        22898,
        "NVIDIA NeMo AutoModel, announcement of large MoE training",
    ),
)
"""Runs by others, the fitted one first."""


def compare(runs: tuple[PublishedRun, ...] = PUBLISHED) -> list[Comparison]:
    """Plan each run and say how far the plan is from what was published."""
    found = []
    for run in runs:
        plan = make_plan(run.config, CLUSTERS[run.cluster], run.recipe)
        found.append(Comparison(run, plan, plan.tokens_per_second / run.tokens_per_second - 1))
    return found
