"""The 671 billion parameters, counted without allocating one."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from reference_cases import CASES, Case
from reference_weights import released_shapes

from ds_model import ModelConfig, parameter_counts
from parity import pairs


def on_meta(config: ModelConfig) -> torch.nn.Module:
    values = config.to_dict()
    kind = getattr(transformers, values["architectures"][0])
    with torch.device("meta"):
        return kind(kind.config_class.from_dict(values))


@pytest.mark.parametrize("preset", ["tiny", "mini", "bench", "v2-lite", "v3-671b"])
def test_presets(preset: str) -> None:
    config = ModelConfig.preset(preset)
    model, counts = on_meta(config), parameter_counts(config)
    buffers = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert counts.main == sum(p.numel() for p in model.parameters())
    assert counts.router_bias == sum(b.numel() for b in buffers)


def test_v3_is_671_billion() -> None:
    counts = parameter_counts(ModelConfig.preset("v3-671b"))
    assert (counts.main, counts.router_bias) == (671_026_404_352, 14_848)


@pytest.mark.parametrize("preset", ["tiny", "mini", "bench", "v2-lite", "v3-671b"])
def test_sum_over_the_released_layout(preset: str) -> None:
    config = ModelConfig.preset(preset)
    modules = tuple(
        f"model.layers.{config.num_hidden_layers + k}."
        for k in range(config.num_nextn_predict_layers)
    )
    main = bias = mtp = 0
    for name, shape in released_shapes(config.to_dict()):
        if name.startswith(modules):
            shared = name.endswith(("embed_tokens.weight", "shared_head.head.weight"))
            mtp += 0 if shared else math.prod(shape)
        elif name.endswith("e_score_correction_bias"):
            bias += math.prod(shape)
        else:
            main += math.prod(shape)
    counts = parameter_counts(config)
    assert (counts.main, counts.router_bias, counts.mtp) == (main, bias, mtp)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_counts_are_the_variables(case: Case) -> None:
    model = pairs.ours_of(case)
    counts = parameter_counts(model.config)
    assert counts.main + counts.router_bias + counts.mtp == model.count_params()
    assert counts.main == sum(p.numel() for p in pairs.peer_of(case).parameters())
