"""Counts against published figures, and against built and counted variables."""

import pytest

from ds_model import CausalLM, ModelConfig, parameter_counts

V3 = ModelConfig.preset("v3-671b")


def test_v3_main_model_and_router_bias():
    counts = parameter_counts(V3)
    assert counts.main == 671_026_404_352
    assert counts.router_bias == 14_848


# What the papers' abstracts print: 37B of 671B (2412.19437), 2.4B of 15.7B (2405.04434, appendix
# B), and 26.2M of 107.5M for the benchmark's preset.
@pytest.mark.parametrize(
    ("preset", "unit", "total", "active"),
    [("v3-671b", 1e9, 671, 37), ("v2-lite", 1e9, 15.7, 2.4), ("bench", 1e6, 107.5, 26.2)],
)
def test_published_totals(preset, unit, total, active):
    counts = parameter_counts(ModelConfig.preset(preset))
    digits = 0 if isinstance(total, int) else 1
    assert round(counts.main / unit, digits) == total
    assert abs(counts.active / unit - active) <= (0.5 if digits == 0 else 0.06)


def test_v2_as_published():
    """236B of which 21B are active (arXiv 2405.04434, abstract), from the released config."""
    v2 = V3.replace(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_shared_experts=2,
        topk_group=3,
        first_k_dense_replace=1,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        num_nextn_predict_layers=0,
    )
    counts = parameter_counts(v2)
    assert round(counts.main / 1e9) == 236
    assert round(counts.active / 1e9) == 21
    assert counts.router_bias == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "q_lora_rank": None, "n_shared_experts": 0},
        {"n_routed_experts": None, "num_nextn_predict_layers": 2},
        {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
    ],
)
def test_closed_form_is_the_sum_over_built_variables(changes):
    config = ModelConfig.preset("tiny").replace(**changes)
    model = CausalLM(config)
    counts = parameter_counts(config)
    mtp = sum(module.count_params() for module in model.mtp)
    assert counts.mtp == mtp
    assert counts.main + counts.router_bias + counts.mtp == model.count_params()


def test_a_dense_model_uses_all_but_its_embedding():
    config = ModelConfig.preset("tiny").replace(n_routed_experts=None, num_nextn_predict_layers=0)
    counts = parameter_counts(config)
    assert counts.active == counts.main - config.vocab_size * config.hidden_size
    tied = parameter_counts(config.replace(tie_word_embeddings=True))
    assert tied.active == tied.main
