"""How many machines a service of V3's size takes, prefill and decode apart.

Section 3.4 of arXiv 2412.19437 and DeepSeek's overview of its inference system (open-source week,
day 6, February 2025) say how V3 is deployed: prefill in units of 4 nodes of 8 GPUs (each GPU has 9
routed experts of each layer, 32 of all being copies of the busiest), decode in units of 18 nodes (2
routed experts a GPU), the shared expert and attention on every GPU.

A phase's time for a token is what its products, its attention, its reads of memory and its
exchange of tokens take at the hardware's full speed, one after the other, over an *efficiency*.
Efficiencies are fitted to the SGLang team's published runs on 12 nodes of H100, one for each phase;
every other published figure is a check (`published`, `ds-serve capacity --check`).

Letters: D hidden_size, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_model import ModelConfig

__all__ = [
    "DECODE_UNIT",
    "DEVICES",
    "PREFILL_UNIT",
    "Demand",
    "Deployment",
    "Device",
    "Published",
    "Times",
    "Unit",
    "decode_speed",
    "decode_times",
    "deploy",
    "largest_batch",
    "prefill_speed",
    "prefill_times",
    "published",
]

GPUS = 8  # of a node
CACHE_BYTES = 2  # of a number in the latent cache
PREFILL_EFFICIENCY, DECODE_EFFICIENCY = 0.764, 0.718
ROOM = 0.9  # of a GPU's memory, for weights and cache


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: as it is known.
        flops: dense operations a second in FP8; half of that in BF16.
        bandwidth: of its memory [bytes/s].
        memory: [bytes].
        network: to other nodes, one way [bytes/s].
        price: of an hour [US dollars].
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    network: float
    price: float


DEVICES = {
    device.name: device
    for device in (
        Device("H800", 1979e12, 3.35e12, 80e9, 50e9, 2.0),
        Device("H100", 1979e12, 3.35e12, 80e9, 50e9, 2.0),
        Device("H200", 1979e12, 4.8e12, 141e9, 50e9, 2.5),
    )
}
"""GPUs by name, with figures from their data sheets."""


@dataclass(frozen=True)
class Unit:
    """Nodes that hold the experts together.

    Attributes:
        nodes: how many.
        copies: of the busiest experts, beside all of them.
    """

    nodes: int
    copies: int = 32


PREFILL_UNIT = Unit(4)
"""V3's: 32 GPUs."""
DECODE_UNIT = Unit(18)
"""V3's: 144 GPUs."""


@dataclass(frozen=True)
class Times:
    """Where the time of a phase goes, on one GPU at full speed [s].

    Attributes:
        products: with weights, or reading them where that takes longer.
        attention: with the cache, or reading it.
        exchange: of tokens with other nodes.
    """

    products: float
    attention: float
    exchange: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.products + self.attention + self.exchange


class _Sizes:
    """What a model's sizes come to."""

    def __init__(self, config: ModelConfig) -> None:
        from ds_model import parameter_counts  # noqa: PLC0415 - brings TensorFlow

        c = config
        self.c = c
        self.moe_layers = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers))
        self.expert = 3 * c.hidden_size * (c.moe_intermediate_size or 0)
        self.active = parameter_counts(c).active
        self.everywhere = self.active - self.moe_layers * (c.num_experts_per_tok or 0) * self.expert
        self.cache = c.attention.cache_width * CACHE_BYTES * c.num_hidden_layers


def prefill_times(config: ModelConfig, device: Device, unit: Unit, context: float) -> Times:
    """Return the time that one GPU takes for a token of a prompt.

    Args:
        config: the model.
        device: the GPU.
        unit: how experts are spread; tokens go to at most `topk_group` nodes.
        context: tokens that a token of the prompt sees, on average.
    """
    c, sizes = config, _Sizes(config)
    heads = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    nodes = min(c.topk_group or unit.nodes, unit.nodes) * (1 - 1 / unit.nodes)
    return Times(
        products=2 * sizes.active / device.flops,
        attention=2 * heads * context * c.num_hidden_layers / (device.flops / 2),
        # There in 8 bits, back in 16; once to each node, which hands it on inside.
        exchange=sizes.moe_layers * nodes * 3 * c.hidden_size / device.network,
    )


def decode_times(
    config: ModelConfig, device: Device, unit: Unit, context: float, batch: float
) -> Times:
    """Return the time that one GPU takes for a step of `batch` texts.

    Args:
        config: the model.
        device: the GPU.
        unit: how experts are spread; a token goes to each of its experts' GPUs directly.
        context: tokens that a text has, on average.
        batch: texts of one GPU.
    """
    c, sizes = config, _Sizes(config)
    gpus = unit.nodes * GPUS
    experts = sizes.moe_layers * ((c.n_routed_experts or 0) + unit.copies) / gpus * sizes.expert
    read = (sizes.everywhere + experts) / device.bandwidth  # a byte a weight
    heads = c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    scores = batch * context * 2 * heads * c.num_hidden_layers / (device.flops / 2)
    away = (c.num_experts_per_tok or 0) * (1 - GPUS / gpus) if unit.nodes > 1 else 0.0
    return Times(
        products=max(read, batch * 2 * sizes.active / device.flops),
        attention=max(scores, batch * context * sizes.cache / device.bandwidth),
        exchange=sizes.moe_layers * batch * away * 3 * c.hidden_size / device.network,
    )


def prefill_speed(
    config: ModelConfig, device: Device, unit: Unit, context: float, hits: float = 0.0
) -> float:
    """Return the tokens of prompts that a node takes in a second, those in the cache included."""
    times = prefill_times(config, device, unit, context)
    return GPUS * PREFILL_EFFICIENCY / times.total / (1 - hits)


def decode_speed(
    config: ModelConfig, device: Device, unit: Unit, context: float, batch: float
) -> tuple[float, float]:
    """Return the tokens that a node writes in a second, and that each text gets."""
    step = decode_times(config, device, unit, context, batch).total / DECODE_EFFICIENCY
    return GPUS * batch / step, 1 / step


def largest_batch(config: ModelConfig, device: Device, unit: Unit, context: float) -> int:
    """Return how many texts one GPU's memory holds beside its weights."""
    sizes = _Sizes(config)
    held = (config.n_routed_experts or 0) + unit.copies
    weights = sizes.everywhere + sizes.moe_layers * held / (unit.nodes * GPUS) * sizes.expert
    weights += 2 * config.vocab_size * config.hidden_size  # the embedding, in 16 bits
    return max(0, math.floor((ROOM * device.memory - weights) / (context * sizes.cache)))


@dataclass(frozen=True)
class Demand:
    """What is asked of a service.

    Attributes:
        tokens_in: of prompts, a second.
        tokens_out: written, a second.
        hits: share of prompts' tokens that are in the cache.
        context: tokens that a text has while it is written, on average.
        speed: tokens a second that each text is to get at least.
    """

    tokens_in: float
    tokens_out: float
    hits: float = 0.5
    context: float = 4000
    speed: float = 20.0


@dataclass(frozen=True)
class Deployment:
    """What serves a demand.

    Attributes:
        prefill_nodes: whole units.
        decode_nodes: whole units.
        batch: texts of a GPU that decodes.
        speed: tokens a second that each text gets.
        prefill_speed: tokens a second and node, those in the cache included.
        decode_speed: tokens a second and node.
        dollars_a_day: of all nodes.
        dollars_a_million: tokens written.
    """

    prefill_nodes: int
    decode_nodes: int
    batch: int
    speed: float
    prefill_speed: float
    decode_speed: float
    dollars_a_day: float
    dollars_a_million: float


def deploy(
    config: ModelConfig,
    device: Device,
    demand: Demand,
    prefill: Unit = PREFILL_UNIT,
    decode: Unit = DECODE_UNIT,
) -> Deployment:
    """Return the nodes that a demand takes, in whole units.

    The batch is the largest that the memory holds and at which each text is fast enough.

    Raises:
        ValueError: no batch is; says what bounds it.
    """
    fits = largest_batch(config, device, decode, demand.context)
    if fits < 1:
        raise ValueError(
            f"a GPU of {device.memory / 1e9:.0f} GB can't hold its weights and one text of "
            f"{demand.context:.0f} tokens; take more decode nodes than {decode.nodes}"
        )
    batch = fits
    while batch > 1 and decode_speed(config, device, decode, demand.context, batch)[1] < (
        demand.speed
    ):
        batch -= 1
    out, each = decode_speed(config, device, decode, demand.context, batch)
    if each < demand.speed:
        raise ValueError(
            f"one text alone gets {each:.1f} tokens/s of {demand.speed:g} asked for; ask for less, "
            "or take more decode nodes a unit"
        )
    taken = prefill_speed(config, device, prefill, demand.context / 2, demand.hits)
    nodes_in = prefill.nodes * math.ceil(demand.tokens_in / taken / prefill.nodes)
    nodes_out = decode.nodes * math.ceil(demand.tokens_out / out / decode.nodes)
    day = (nodes_in + nodes_out) * GPUS * 24 * device.price
    million = day / (demand.tokens_out * 86_400) * 1e6 if demand.tokens_out else math.inf
    return Deployment(nodes_in, nodes_out, batch, each, taken, out, day, million)


@dataclass(frozen=True)
class Published:
    """A figure that somebody published.

    Attributes:
        what: the run.
        source: where.
        value: tokens a second and node.
        planned: by this module.
        fitted: whether an efficiency was fitted to it.
    """

    what: str
    source: str
    value: float
    planned: float
    fitted: bool = False

    @property
    def error(self) -> float:
        """Of the plan, as a share of what was published."""
        return self.planned / self.value - 1


def published() -> Iterator[Published]:
    """Yield published figures beside what is planned."""
    from ds_model import ModelConfig  # noqa: PLC0415 - brings TensorFlow

    v3 = ModelConfig.preset("v3-671b")
    h800, h100 = DEVICES["H800"], DEVICES["H100"]
    sglang, deepseek = "SGLang, 5 May 2025", "DeepSeek, open-source week, day 6"
    yield Published(
        "prefill, 2,000 tokens, EP32", sglang, 52_300, prefill_speed(v3, h100, Unit(4), 1000), True
    )
    yield Published("prefill, 4,000 tokens, EP32", sglang, 50_302,
                    prefill_speed(v3, h100, Unit(4), 2000))  # fmt: skip
    yield Published("decode, 2,000 tokens, 256 texts a GPU, EP72", sglang, 22_300,
                    decode_speed(v3, h100, Unit(9), 2050, 256)[0], True)  # fmt: skip
    # 20 to 22 tokens a second and text: that is the batch.
    batch = 14_800 / GPUS / 21
    yield Published("decode, a day's mean, 4,989 tokens, EP144", deepseek, 14_800,
                    decode_speed(v3, h800, DECODE_UNIT, 4989, batch)[0])  # fmt: skip
    yield Published("prefill, a day's mean, 56.3% in the cache, EP32", deepseek, 73_700,
                    prefill_speed(v3, h800, PREFILL_UNIT, 4989 / 2, 342 / 608))  # fmt: skip
