"""What training holds at its peak, in closed form: weights, gradients, moments, activations.

Counted are the tensors that differentiation needs again, in float32, each once: inputs of products
and of norms, and what the experts' products give. Attention holds no `sequence x sequence` tensor.
"""

from __future__ import annotations

from ds_model import ModelConfig, parameter_counts

FLOAT32 = 4  # bytes
COPIES = 4  # of a parameter: itself, its gradient, two moments


def training_bytes(config: ModelConfig, tokens: int, *, recompute: bool = False) -> int:
    """Return the peak of a training step in float32.

    Args:
        config: the model.
        tokens: of the step.
        recompute: blocks keep their input only, and one at a time is computed again.
    """
    blocks = [
        block_values(config, moe=config.is_moe_layer(index))
        for index in range(config.num_hidden_layers)
    ]
    kept = len(blocks) * config.hidden_size + max(blocks) if recompute else sum(blocks)
    # Logits and their gradient; the normed hidden states and those before.
    ends = 2 * config.vocab_size + 2 * config.hidden_size
    values = COPIES * parameter_counts(config).main + tokens * (kept + ends)
    return FLOAT32 * values


def block_values(config: ModelConfig, *, moe: bool) -> int:
    """Return how many values of a token one block keeps for its gradient."""
    feed_forward = expert_values(config) if moe else swiglu_values(config.intermediate_size)
    # Both residual additions and both norms keep what comes in and what goes out.
    return 4 * config.hidden_size + attention_values(config) + feed_forward


def attention_values(config: ModelConfig) -> int:
    """Return those of attention: latents before and after their norm, heads, their output."""
    heads = config.num_attention_heads
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    query = 2 * (config.q_lora_rank or 0) + 2 * heads * key  # before and after RoPE
    latent = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim) + heads * key
    return query + latent + expanded + heads * config.v_head_dim


def swiglu_values(width: int) -> int:
    """Return those of a SwiGLU: gate and up, and their product."""
    return 3 * width


def expert_values(config: ModelConfig) -> int:
    """Return those of experts: scores, each chosen expert's input, inner values and output."""
    width, chosen = config.moe_intermediate_size or 0, config.num_experts_per_tok or 0
    routed = chosen * (2 * config.hidden_size + swiglu_values(width))
    shared = swiglu_values(width * (config.n_shared_experts or 0))
    return (config.n_routed_experts or 0) + routed + shared
