"""Random weights in the released layout, the same on every machine.

Everything is random: norms, biases and the router's correction too, for they start at 1
and 0, where a model that ignores them passes. The numbers come from the raw stream of a
counter-free generator (PCG64), whose bits NumPy promises not to change; its distributions
may change, so none is used.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from reference_cases import Case


def _attention_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value, latent = config["v_head_dim"], config["kv_lora_rank"]
    q_rank, bias = config["q_lora_rank"], config["attention_bias"]
    if q_rank is None:
        yield "q_proj.weight", (heads * (nope + rope), hidden)
    else:
        yield "q_a_proj.weight", (q_rank, hidden)
        if bias:
            yield "q_a_proj.bias", (q_rank,)
        yield "q_a_layernorm.weight", (q_rank,)
        yield "q_b_proj.weight", (heads * (nope + rope), q_rank)
    yield "kv_a_proj_with_mqa.weight", (latent + rope, hidden)
    if bias:
        yield "kv_a_proj_with_mqa.bias", (latent + rope,)
    yield "kv_a_layernorm.weight", (latent,)
    yield "kv_b_proj.weight", (heads * (nope + value), latent)
    yield "o_proj.weight", (hidden, heads * value)
    if bias:
        yield "o_proj.bias", (hidden,)


def _swiglu_shapes(hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "gate_proj.weight", (width, hidden)
    yield "up_proj.weight", (width, hidden)
    yield "down_proj.weight", (hidden, width)


def _block_shapes(config: dict[str, Any], *, dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    for name, shape in _attention_shapes(config):
        yield f"self_attn.{name}", shape
    if dense:
        for name, shape in _swiglu_shapes(hidden, config["intermediate_size"]):
            yield f"mlp.{name}", shape
        return
    yield "mlp.gate.weight", (config["n_routed_experts"], hidden)
    if config["model_type"] == "deepseek_v3":
        yield "mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)
    for expert in range(config["n_routed_experts"]):
        for name, shape in _swiglu_shapes(hidden, width):
            yield f"mlp.experts.{expert}.{name}", shape
    # With no shared experts transformers still writes the tensors, of size zero.
    for name, shape in _swiglu_shapes(hidden, width * config["n_shared_experts"]):
        yield f"mlp.shared_experts.{name}", shape


def released_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor name and shape of a released checkpoint of `config`, in order.

    MTP modules stand at the layer indices after the last block and repeat the embedding
    and the head, as the released checkpoint does.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    table = (config["vocab_size"], hidden)
    yield "model.embed_tokens.weight", table
    for index in range(layers):
        for name, shape in _block_shapes(config, dense=index < config["first_k_dense_replace"]):
            yield f"model.layers.{index}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", table
    for index in range(layers, layers + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{index}."
        for name, shape in _block_shapes(config, dense=False):
            yield prefix + name, shape
        yield prefix + "enorm.weight", (hidden,)
        yield prefix + "hnorm.weight", (hidden,)
        yield prefix + "eh_proj.weight", (hidden, 2 * hidden)
        yield prefix + "shared_head.norm.weight", (hidden,)
        yield prefix + "embed_tokens.weight", table
        yield prefix + "shared_head.head.weight", table


def trained_names(config: dict[str, Any]) -> list[str]:
    """Return the tensors that the main model's loss moves: no MTP module, no router bias."""
    modules = tuple(
        f"model.layers.{config['num_hidden_layers'] + k}."
        for k in range(config.get("num_nextn_predict_layers", 0))
    )
    return [
        name
        for name, _ in released_shapes(config)
        if not name.startswith(modules) and not name.endswith("e_score_correction_bias")
    ]


def uniform(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 numbers in [-1, 1), from the seed and the tensor's name alone."""
    stream = np.random.PCG64([seed, zlib.crc32(name.encode())])
    raw = stream.random_raw(max(math.prod(shape), 1))[: math.prod(shape)]
    # 24 bits: each value is a float32 exactly, on every machine.
    return ((raw >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - 1).reshape(shape)


def _scaled(uniform: np.ndarray, name: str, case: Case) -> np.ndarray:
    if name.endswith("e_score_correction_bias"):
        low, high = case.bias_range
        return (low + high) / 2 + (high - low) / 2 * uniform
    if "norm" in name:
        return 1 + 0.5 * uniform
    if name.endswith(".bias"):
        return 0.4 * uniform
    if name.endswith("embed_tokens.weight"):
        # A tied head scores the residual stream against the embeddings themselves: small
        # ones keep it from repeating the last token whatever the blocks say.
        return (0.2 if case.config["tie_word_embeddings"] else 1.0) * math.sqrt(3) * uniform
    # Unit variance in gives unit variance out, sharper for routers and for queries and
    # keys, so that which expert and which token matter.
    gain = 2.0 if ".gate.weight" in name or "q_proj" in name or "q_b_proj" in name else 1.0
    return gain * math.sqrt(3 / max(uniform.shape[-1], 1)) * uniform


def weights(case: Case) -> dict[str, np.ndarray]:
    """Return the case's checkpoint: released tensor name to float32 array."""
    tensors: dict[str, np.ndarray] = {}
    head = "model.embed_tokens" if case.config["tie_word_embeddings"] else "lm_head"
    for name, shape in released_shapes(case.config):
        if name.endswith("shared_head.head.weight"):
            tensors[name] = tensors[f"{head}.weight"].copy()
        elif name.startswith("model.layers") and name.endswith("embed_tokens.weight"):
            tensors[name] = tensors["model.embed_tokens.weight"].copy()
        else:
            numbers = uniform(case.seed, name, shape)
            tensors[name] = _scaled(numbers, name, case).astype(np.float32)
    return tensors


def write_checkpoint(case: Case, directory: Path) -> Path:
    """Write the case as a Hugging Face directory of one shard, and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
    save_file(weights(case), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
