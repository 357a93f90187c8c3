"""The published config.json of each model of the family: what loads, and how large it is."""

import json
from math import prod
from pathlib import Path

import pytest

from ds_model import ConfigError, ModelConfig, parameter_counts
from ds_model.checkpoint.fp8 import is_quantized
from ds_model.checkpoint.layout import layout

FAMILIES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parent / "families").glob("*.json"))
}
BILLION = 10**9
ACTIVE = {  # as the papers and model cards count them
    "deepseek-v3": 36.6,  # README_WEIGHTS: with the head, without the embedding
    "deepseek-v2": 21,
    "deepseek-v2-lite": 2.4,
    "moonlight-16b-a3b": 2.24 + 0.34,  # without both embeddings; 0.34 is the head
    "kimi-k2": 32,
}


def test_all_families_are_there():
    assert len(FAMILIES) == 8


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_of_the_checkpoint_is_counted(name):
    found = parameter_counts(ModelConfig.from_dict(FAMILIES[name]["config"]))
    assert found.main + found.router_bias == FAMILIES[name]["parameters"]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_those_of_the_paper(name):
    found = parameter_counts(ModelConfig.from_dict(FAMILIES[name]["config"]))
    assert found.active / BILLION == pytest.approx(ACTIVE[name], rel=0.04)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_survives_being_written(name):
    config = ModelConfig.from_dict(FAMILIES[name]["config"])
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["model_type"] == FAMILIES[name]["config"]["model_type"]


def test_v3s_stored_numbers_are_those_of_its_published_checkpoint():
    """The checkpoint's metadata: so many numbers of each dtype, MTP copies and scales included."""
    config = ModelConfig.from_dict(FAMILIES["deepseek-v3"]["config"])
    counts = dict.fromkeys(("F8_E4M3", "BF16", "F32"), 0)
    tensors = {source.name: source for entry in layout(config) for source in entry.sources}
    for name, tensor in tensors.items():
        if is_quantized(name):
            counts["F8_E4M3"] += prod(tensor.shape)
            counts["F32"] += prod(-(-size // 128) for size in tensor.shape)
        else:
            kind = "F32" if name.endswith("e_score_correction_bias") else "BF16"
            counts[kind] += prod(tensor.shape)
    copies = (
        2 * config.vocab_size * config.hidden_size
    )  # of embedding and head, with the MTP module
    if not any(name.startswith("model.layers.61.embed_tokens") for name in tensors):
        counts["BF16"] += copies
    assert counts == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
    assert sum(counts.values()) == 684_531_386_000


def test_what_a_relative_needs_beyond_ours_is_refused_by_its_field():
    known = FAMILIES["kimi-k2"]["config"]
    for field, value in (
        ("model_type", "kimi_k3"),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", 2),
        ("rope_scaling", {"type": "longrope", "factor": 4}),
        ("num_key_value_heads", 8),
    ):
        with pytest.raises(ConfigError, match=field):
            ModelConfig.from_dict(known | {field: value})
