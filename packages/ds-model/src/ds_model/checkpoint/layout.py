"""The released tensor layout as data: which of our variables is made of which tensors on disk.

Released names and shapes are those of DeepSeek-V3 (arXiv 2412.19437) and of `transformers`,
which stores a linear map as `weight [out, in]` and every expert apart. Ours are `kernel [in, out]`,
gate and up projections side by side, experts stacked. Nothing here reads a file or a model.

Shape letters: `D` hidden_size, `I` an intermediate size, `E` routed experts, `V` vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Literal

from ds_model.config import ModelConfig
from ds_model.errors import CheckpointError

Shape = tuple[int, ...]
Part = Literal["main", "router_bias", "mtp"]
_MOST_EXPERTS = 1_000_000  # V3 has 15,872 with its MTP module


class Transform(Enum):
    """How the tensors on disk become one variable. Loading and saving are each other's inverse."""

    COPY = "copy"
    """One tensor, as it is."""
    TRANSPOSE = "transpose"
    """One `[out, in]` tensor, to `[in, out]`."""
    GATE_UP = "gate_up"
    """`gate [I, D]` and `up [I, D]`, to `[D, 2I]`, gate first."""
    EXPERTS = "experts"
    """`E` tensors `[out, in]`, to `[E, in, out]`."""
    EXPERTS_GATE_UP = "experts_gate_up"
    """`2E` tensors `[I, D]`, gate and up of each expert in turn, to `[E, D, 2I]`."""


@dataclass(frozen=True)
class Tensor:
    """A tensor on disk, by its released name and shape."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Entry:
    """One of our variables and the tensors that it is made of.

    Attributes:
        path: attribute path from the model, such as `blocks.3.mlp.gate.weight`.
        shape: the variable's shape.
        transform: how `sources` become the variable.
        sources: the tensors on disk, all of one shape.
        copies: tensors that the released layout repeats; legal to leave out, and equal if there.
        part: what the variable counts as.
    """

    path: str
    shape: Shape
    transform: Transform
    sources: tuple[Tensor, ...]
    copies: tuple[Tensor, ...] = ()
    part: Part = "main"

    @property
    def size(self) -> int:
        """Number of values in the variable."""
        return prod(self.shape)


def layout(config: ModelConfig) -> Iterator[Entry]:
    """Every variable of the model that `config` describes: embedding, head, blocks, MTP modules.

    Raises:
        CheckpointError: more experts in all than any model has; a broken config.json must not
            fill memory with names.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    if layers * (config.n_routed_experts or 1) > _MOST_EXPERTS:
        message = (
            f"config.json describes {layers:,} layers of {config.n_routed_experts or 0:,} experts; "
            f"at most {_MOST_EXPERTS:,} experts in all are read"
        )
        raise CheckpointError(message)
    yield from _embedding_and_head(config)
    for index in range(config.num_hidden_layers):
        yield from _block(config, f"blocks.{index}", index)
    for depth in range(config.num_nextn_predict_layers):
        yield from _mtp_module(config, depth)


def empty_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Tensors without values that `transformers` stores where `n_shared_experts` is 0.

    They carry nothing, so a checkpoint may leave them out; we write them because it asks for them.
    """
    if config.n_shared_experts != 0:
        return
    for index in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        if _is_moe(config, index):
            stem, hidden = f"model.layers.{index}.mlp.shared_experts", config.hidden_size
            yield Tensor(f"{stem}.gate_proj.weight", (0, hidden))
            yield Tensor(f"{stem}.up_proj.weight", (0, hidden))
            yield Tensor(f"{stem}.down_proj.weight", (hidden, 0))


def _is_moe(config: ModelConfig, index: int) -> bool:
    # All MTP modules are alike: each as the first layer after the main model would be.
    return config.is_moe_layer(min(index, config.num_hidden_layers))


def _embedding_and_head(config: ModelConfig) -> Iterator[Entry]:
    table = (config.vocab_size, config.hidden_size)
    depths = range(config.num_nextn_predict_layers)
    mtp = [f"model.layers.{config.num_hidden_layers + depth}" for depth in depths]
    embedding_copies = [Tensor(f"{stem}.embed_tokens.weight", table) for stem in mtp]
    head_copies = [Tensor(f"{stem}.shared_head.head.weight", table) for stem in mtp]
    if config.tie_word_embeddings:
        embedding_copies += [*head_copies, Tensor("lm_head.weight", table)]
    yield Entry(
        "embed_tokens.embeddings",
        table,
        Transform.COPY,
        (Tensor("model.embed_tokens.weight", table),),
        tuple(embedding_copies),
    )
    yield _norm(config, "norm", "model.norm", "main")
    if not config.tie_word_embeddings:
        yield Entry(
            "lm_head.kernel",
            table[::-1],
            Transform.TRANSPOSE,
            (Tensor("lm_head.weight", table),),
            tuple(head_copies),
        )


def _mtp_module(config: ModelConfig, depth: int) -> Iterator[Entry]:
    index = config.num_hidden_layers + depth
    path, stem, hidden = f"mtp.{depth}", f"model.layers.{index}", config.hidden_size
    yield _norm(config, f"{path}.enorm", f"{stem}.enorm", "mtp")
    yield _norm(config, f"{path}.hnorm", f"{stem}.hnorm", "mtp")
    yield _linear(f"{path}.eh_proj", f"{stem}.eh_proj", 2 * hidden, hidden, "mtp")
    yield from _block(config, f"{path}.block", index)
    yield _norm(config, f"{path}.norm", f"{stem}.shared_head.norm", "mtp")


def _block(config: ModelConfig, path: str, index: int) -> Iterator[Entry]:
    part: Part = "main" if index < config.num_hidden_layers else "mtp"
    stem = f"model.layers.{index}"
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _norm(config, f"{path}.{name}", f"{stem}.{name}", part)
    yield from _attention(config, f"{path}.self_attn", f"{stem}.self_attn", part)
    if _is_moe(config, index):
        yield from _mixture(config, f"{path}.mlp", f"{stem}.mlp", part)
    else:
        width = config.intermediate_size
        yield from _swiglu(config, f"{path}.mlp", f"{stem}.mlp", width, part)


def _attention(config: ModelConfig, path: str, stem: str, part: Part) -> Iterator[Entry]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    bias = config.attention_bias
    if config.q_lora_rank is None:
        yield _linear(f"{path}.q_proj", f"{stem}.q_proj", hidden, query, part)
    else:
        rank = config.q_lora_rank
        yield from _linear_with(bias, f"{path}.q_a_proj", f"{stem}.q_a_proj", hidden, rank, part)
        yield _vector(f"{path}.q_a_layernorm.weight", f"{stem}.q_a_layernorm.weight", rank, part)
        yield _linear(f"{path}.q_b_proj", f"{stem}.q_b_proj", rank, query, part)
    name = "kv_a_proj_with_mqa"
    cached = latent + config.qk_rope_head_dim
    yield from _linear_with(bias, f"{path}.{name}", f"{stem}.{name}", hidden, cached, part)
    yield _vector(f"{path}.kv_a_layernorm.weight", f"{stem}.kv_a_layernorm.weight", latent, part)
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield _linear(f"{path}.kv_b_proj", f"{stem}.kv_b_proj", latent, expanded, part)
    values = heads * config.v_head_dim
    yield from _linear_with(bias, f"{path}.o_proj", f"{stem}.o_proj", values, hidden, part)


def _swiglu(config: ModelConfig, path: str, stem: str, width: int, part: Part) -> Iterator[Entry]:
    gate_up = tuple(
        Tensor(f"{stem}.{name}_proj.weight", (width, config.hidden_size)) for name in ("gate", "up")
    )
    shape = (config.hidden_size, 2 * width)
    yield Entry(f"{path}.gate_up_proj.kernel", shape, Transform.GATE_UP, gate_up, part=part)
    yield _linear(f"{path}.down_proj", f"{stem}.down_proj", width, config.hidden_size, part)


def _mixture(config: ModelConfig, path: str, stem: str, part: Part) -> Iterator[Entry]:
    experts, hidden = config.n_routed_experts or 0, config.hidden_size
    width = config.moe_intermediate_size or 0
    router = Tensor(f"{stem}.gate.weight", (experts, hidden))
    gate = (hidden, experts)
    yield Entry(f"{path}.gate.weight", gate, Transform.TRANSPOSE, (router,), part=part)
    if config.moe is not None and config.moe.has_router_bias:
        name = "gate.e_score_correction_bias"
        bias_part: Part = "router_bias" if part == "main" else part
        yield _vector(f"{path}.{name}", f"{stem}.{name}", experts, bias_part)
    gate_up = tuple(
        Tensor(f"{stem}.experts.{expert}.{name}_proj.weight", (width, hidden))
        for expert in range(experts)
        for name in ("gate", "up")
    )
    shape = (experts, hidden, 2 * width)
    yield Entry(f"{path}.gate_up_proj", shape, Transform.EXPERTS_GATE_UP, gate_up, part=part)
    down = tuple(
        Tensor(f"{stem}.experts.{expert}.down_proj.weight", (hidden, width))
        for expert in range(experts)
    )
    shape = (experts, width, hidden)
    yield Entry(f"{path}.down_proj", shape, Transform.EXPERTS, down, part=part)
    if config.n_shared_experts:
        shared, width = "shared_experts", width * config.n_shared_experts
        yield from _swiglu(config, f"{path}.{shared}", f"{stem}.{shared}", width, part)


def _norm(config: ModelConfig, path: str, stem: str, part: Part) -> Entry:
    return _vector(f"{path}.weight", f"{stem}.weight", config.hidden_size, part)


def _vector(path: str, name: str, size: int, part: Part) -> Entry:
    return Entry(path, (size,), Transform.COPY, (Tensor(name, (size,)),), part=part)


def _linear(path: str, stem: str, inputs: int, outputs: int, part: Part) -> Entry:
    source = Tensor(f"{stem}.weight", (outputs, inputs))
    shape = (inputs, outputs)
    return Entry(f"{path}.kernel", shape, Transform.TRANSPOSE, (source,), part=part)


def _linear_with(
    bias: bool, path: str, stem: str, inputs: int, outputs: int, part: Part
) -> Iterator[Entry]:
    yield _linear(path, stem, inputs, outputs, part)
    if bias:
        yield _vector(f"{path}.bias", f"{stem}.bias", outputs, part)
