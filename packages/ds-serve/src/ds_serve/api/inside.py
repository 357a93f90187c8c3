"""What the model is made of, for the page that shows it think."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_serve.api.served import Served


def describe(served: Served) -> dict[str, Any]:
    """Return the sizes of a model and its cache.

    `latent_bytes` and `mha_bytes` are what a token takes in the cache, all layers together: of
    latent attention, and of standard attention with the same heads (arXiv 2405.04434, table 1).
    """
    from ds_attention import memory_report  # noqa: PLC0415 - brings TensorFlow
    from ds_model import parameter_counts  # noqa: PLC0415 - the same

    model, engine = served.model, served.engine
    c = model.config
    held = memory_report(c.attention, batch=1, length=1, dtype=model.compute_dtype)
    counts = parameter_counts(c)
    return {
        "name": served.name,
        "parameters": counts.main,
        "active_parameters": counts.active,
        "precision": model.dtype_policy.name,
        "layers": c.num_hidden_layers,
        "first_expert_layer": min(c.first_k_dense_replace, c.num_hidden_layers),
        "experts": c.n_routed_experts or 0,
        "experts_per_token": c.num_experts_per_tok or 0,
        "shared_experts": c.n_shared_experts or 0,
        "context": served.context,
        "chat": served.tokenizer.chat_template is not None,
        "drafts": engine.steps.drafts,
        "latent_bytes": held.mla_bytes * c.num_hidden_layers,
        "mha_bytes": held.mha_bytes * c.num_hidden_layers,
        "cache_tokens": engine.cache_tokens,
        "block_size": engine.scheduler.block_size,
    }
