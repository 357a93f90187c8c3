"""What a token costs in closed form: multiplications and bytes, and the time that a limit allows.

Counted are the products of trained weights, which are the same for every system; attention scores,
norms and routing are left out, so shares of the limit are understated, most for long prompts.
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.tasks import Precision, Task
from ds_model import ModelConfig, parameter_counts

# 8 and 4 bits: 32 weights share a 16-bit scale, as in llama.cpp's Q8_0 and Q4_0.
WEIGHT_BYTES: dict[Precision, float] = {
    "float32": 4, "bfloat16": 2, "int8": 34 / 32, "int8_channel": 1, "int4": 18 / 32, "fp8": 1
}  # fmt: skip
CACHE_BYTES: dict[Precision, int] = {
    "float32": 4, "bfloat16": 2, "int8": 2, "int8_channel": 2, "int4": 2, "fp8": 2
}  # fmt: skip


def train_flops(config: ModelConfig) -> float:
    """Return multiplications and additions for a token of a step: 2 forward, 4 backward."""
    return 6 * parameter_counts(config).active


def prefill_flops(config: ModelConfig) -> float:
    """Return them for a token of a prompt; the head serves the last position only."""
    return 2 * (parameter_counts(config).active - head_size(config))


def decode_flops(config: ModelConfig) -> float:
    """Return them for a token that is written."""
    return 2 * parameter_counts(config).active


def head_size(config: ModelConfig) -> int:
    """Return how many weights map hidden states to logits."""
    return config.hidden_size * config.vocab_size


def expert_size(config: ModelConfig) -> int:
    """Return how many weights one routed expert has: gate, up, down."""
    return 3 * config.hidden_size * (config.moe_intermediate_size or 0)


def touched_weights(config: ModelConfig, batch: int) -> float:
    """Return how many weights a step of decoding reads for `batch` tokens.

    One token reads its active weights. Of an expert layer, `batch` tokens that choose evenly and
    independently touch `E * (1 - (1 - K/E) ** batch)` experts.
    """
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    active = parameter_counts(config).active
    if not experts:
        return active
    layers = sum(config.is_moe_layer(index) for index in range(config.num_hidden_layers))
    touched = experts * (1 - (1 - chosen / experts) ** batch)
    return active + layers * (touched - chosen) * expert_size(config)


def cache_bytes(config: ModelConfig, context: float, precision: Precision) -> float:
    """Return the bytes of latents and rotated keys that one token reads at a context."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    return config.num_hidden_layers * context * width * CACHE_BYTES[precision]


def decode_bytes(config: ModelConfig, task: Task) -> float:
    """Return the bytes that one step of decoding reads, for all rows together."""
    weights = touched_weights(config, task.batch) * WEIGHT_BYTES[task.precision]
    context = task.length + task.new / 2  # half-way through
    return weights + task.batch * cache_bytes(config, context, task.precision)


def limit_speed(config: ModelConfig, task: Task, limits: Mapping[str, float]) -> float | None:
    """Return the tokens a second that the machine's limits allow; `None` if not measured.

    Args:
        config: the model.
        task: what is done.
        limits: of `bench.limits`. Decoding is held to the slower of its reads from memory and its
            products; training and prefill to their products.
    """
    # There is no 8-bit product in the list: such weights are widened, to bfloat16 at best.
    products = limits.get("gemm_float32" if task.precision == "float32" else "gemm_bfloat16")
    reads = limits.get("read_1024mb")
    if not products or not reads:
        return None
    if task.kind != "decode":
        flops = train_flops(config) if task.kind == "train" else prefill_flops(config)
        return products * 1e9 / flops
    step = max(
        decode_bytes(config, task) / (reads * 1e9),
        task.batch * decode_flops(config) / (products * 1e9),
    )
    return task.batch / step
