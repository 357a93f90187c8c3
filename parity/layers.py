"""Single layers of `transformers` on random input, for the tests of ds-attention and ds-moe.

Each file holds the layer's configuration, weights under their released names, input, output
and the gradient that reaches the input: the packages' tests need nothing else.

Shapes: B batch, S sequence, T = B*S tokens, D hidden_size, K experts a token.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_cases import yarn
from reference_weights import uniform
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

PACKAGES = Path(__file__).parents[1] / "packages"

_ATTENTION: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "attention_bias": False,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "rope_scaling": None,
}
_MOE: dict[str, Any] = {
    "hidden_size": 24,
    "moe_intermediate_size": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer and its input.

    Attributes:
        name: of the file.
        package: whose tests read it, "ds-attention" or "ds-moe".
        config: fields of `AttentionConfig` or `MoEConfig`; `rope_scaling` as released.
        bias_range: of the router's correction bias.
    """

    name: str
    package: str
    config: dict[str, Any]
    bias_range: tuple[float, float] = (-0.6, 0.4)

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return PACKAGES / self.package / "tests" / "reference" / f"{self.name}.npz"


def _attention(name: str, **changes: Any) -> Layer:
    return Layer(name, "ds-attention", {**_ATTENTION, **changes})


def _moe(name: str, bias_range: tuple[float, float] = (-0.6, 0.4), **changes: Any) -> Layer:
    return Layer(name, "ds-moe", {**_MOE, **changes}, bias_range)


LAYERS: tuple[Layer, ...] = (
    _attention(
        "released", rope_scaling=yarn(4.0, 16, mscale=1.0, mscale_all_dim=1.0), attention_bias=True
    ),
    _attention("halves", q_lora_rank=None, rope_interleave=False),
    _attention(
        "two-mscales", rope_scaling=yarn(8.0, 8, mscale=0.707, mscale_all_dim=1.3), rope_theta=500.0
    ),
    _attention("without-mscale", q_lora_rank=None, rope_scaling=yarn(16.0, 8)),
    _moe("released", n_group=8, topk_group=2),
    _moe("negative-bias", (-2.0, -1.0), topk_group=1, num_experts_per_tok=3, n_shared_experts=0),
    _moe("not-normalised", norm_topk_prob=False, n_shared_experts=2, routed_scaling_factor=0.7),
    _moe("greedy", **_SOFTMAX, topk_method="greedy", n_group=1, topk_group=1),
    _moe("group-limited", **_SOFTMAX, topk_method="group_limited_greedy"),
)
"""Every layer, attention first."""


def _randomise(module: torch.nn.Module, layer: Layer) -> dict[str, np.ndarray]:
    """Fill the module with random weights and return them by name."""
    low, high = layer.bias_range
    weights: dict[str, np.ndarray] = {}
    for name, tensor in module.state_dict().items():
        numbers = uniform(7, f"{layer.name}.{name}", tuple(tensor.shape))
        if name.endswith("e_score_correction_bias"):
            numbers = (low + high) / 2 + (high - low) / 2 * numbers
        elif "norm" in name:
            numbers = 1 + 0.5 * numbers
        elif not name.endswith("bias"):
            numbers = numbers * 2 * np.sqrt(3 / max(tensor.shape[-1], 1))
        weights[name] = numbers.astype(np.float32)
        tensor.copy_(torch.tensor(weights[name]))
    return weights


def _input(layer: Layer, batch: int, length: int) -> torch.Tensor:
    shape = (batch, length, layer.config["hidden_size"])
    return torch.tensor(1.7 * uniform(8, layer.name, shape), requires_grad=True)


def _slope(layer: Layer, x: torch.Tensor, out: torch.Tensor) -> dict[str, np.ndarray]:
    """Send a random gradient into the output and return it with what reaches the input."""
    towards = uniform(9, layer.name, tuple(out.shape))
    out.backward(torch.tensor(towards))
    return {"out_slope": towards, "x_slope": x.grad.numpy()}


def _run_attention(layer: Layer) -> dict[str, np.ndarray]:
    config = DeepseekV3Config(
        **layer.config, num_key_value_heads=layer.config["num_attention_heads"]
    )
    config._attn_implementation = "eager"
    module = v3.DeepseekV3Attention(config, 0)
    with torch.no_grad():
        weights = _randomise(module, layer)
    x = _input(layer, 2, 30)
    padding = np.array([0, 7])  # on the left of each row
    slots = np.arange(30)
    valid = slots[None] >= padding[:, None]
    positions = np.maximum(slots[None] - padding[:, None], 0)
    seen = (slots[:, None] >= slots[None, :])[None] & valid[:, None, :]
    mask = torch.tensor(np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32))[:, None]
    rope = v3.DeepseekV3RotaryEmbedding(config)(x, torch.tensor(positions))
    out, _ = module(x, rope, mask)
    # What padding gives is nobody's business, and must not flow back either.
    kept = out * torch.tensor(valid[..., None], dtype=torch.float32)
    return {
        **{f"weights.{name}": array for name, array in weights.items()},
        "x": x.detach().numpy(),
        "valid": valid,
        "positions": positions.astype(np.int32),
        "out": kept.detach().numpy(),
        **_slope(layer, x, kept),
    }


def _run_moe(layer: Layer) -> dict[str, np.ndarray]:
    fields = {k: v for k, v in layer.config.items() if k != "scoring_func"}
    if layer.config["scoring_func"] == "softmax":
        module = v2.DeepseekV2Moe(DeepseekV2Config(**fields, num_attention_heads=1))
    else:
        module = v3.DeepseekV3MoE(DeepseekV3Config(**fields))
    with torch.no_grad():
        weights = _randomise(module, layer)
    x = _input(layer, 2, 24)
    out = module(x)
    with torch.no_grad():
        _, gates, experts = module.gate(x)
    return {
        **{f"weights.{name}": array for name, array in weights.items()},
        "x": x.detach().numpy(),
        "experts": experts.numpy().astype(np.int32),
        "gates": gates.numpy(),
        "out": out.detach().numpy(),
        **_slope(layer, x, out),
    }


def numbers(layer: Layer) -> dict[str, np.ndarray]:
    """Return the content of the layer's reference file."""
    run = _run_attention if layer.package == "ds-attention" else _run_moe
    return {"config": np.array(json.dumps(layer.config)), **run(layer)}


def write(layer: Layer) -> None:
    """Write the layer's reference file."""
    layer.path.parent.mkdir(exist_ok=True)
    np.savez_compressed(layer.path, **numbers(layer))
