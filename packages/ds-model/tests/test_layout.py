"""The checkpoint map against the released layout as written down by the parity suite."""

from math import prod

import pytest
from reference_cases import CASES
from reference_weights import released_shapes

from ds_model.checkpoint.layout import empty_tensors, layout
from ds_model.config import ModelConfig

V3 = ModelConfig.preset("v3-671b")
V2_LITE = ModelConfig.preset("v2-lite")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_names_and_shapes_are_the_released_ones(case):
    config = ModelConfig.from_dict(case.config)
    tensors = [tensor for entry in layout(config) for tensor in (*entry.sources, *entry.copies)]
    tensors += empty_tensors(config)
    found = {tensor.name: tensor.shape for tensor in tensors}
    if config.tie_word_embeddings:
        assert found.pop("lm_head.weight") == (config.vocab_size, config.hidden_size)
    assert found == dict(released_shapes(case.config))
    assert len(tensors) == len(found) + config.tie_word_embeddings


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_variable_holds_as_many_values_as_its_tensors(case):
    for entry in layout(ModelConfig.from_dict(case.config)):
        assert entry.size == sum(prod(source.shape) for source in entry.sources), entry.path


def test_v3_sums_to_the_published_counts():
    sizes = {"main": 0, "router_bias": 0, "mtp": 0}
    for entry in layout(V3):
        sizes[entry.part] += sum(prod(source.shape) for source in entry.sources)
    assert sizes["main"] == 671_026_404_352
    assert sizes["router_bias"] == 14_848
    # The released notes on the weights: 11.5B unique in the MTP module, which rounds down.
    assert 11.5e9 < sizes["mtp"] < 11.7e9


def test_v3_has_the_released_names():
    names = {tensor.name for entry in layout(V3) for tensor in (*entry.sources, *entry.copies)}
    assert {
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.60.mlp.experts.255.down_proj.weight",
        "model.layers.61.eh_proj.weight",
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
        "model.layers.61.shared_head.norm.weight",
    } <= names
    assert "model.layers.2.mlp.gate.weight" not in names
    experts = (58 + 1) * 256 * 3
    shared_and_router = (58 + 1) * (3 + 2)
    per_layer = 2 + 7  # two norms; attention's five products and two norms
    assert len(names) == 3 + 62 * per_layer + 3 * 3 + experts + shared_and_router + 6


def test_v2_lite_has_one_query_projection_and_no_router_bias():
    names = {tensor.name for entry in layout(V2_LITE) for tensor in entry.sources}
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not any("q_a_proj" in name or "e_score_correction_bias" in name for name in names)
