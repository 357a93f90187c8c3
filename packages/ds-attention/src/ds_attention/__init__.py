"""Attention of DeepSeek-V3: latent attention, its cache, RoPE with YaRN, and the yardsticks."""

from ds_attention.cache import LatentCache, MemoryReport, causal_mask, memory_report
from ds_attention.config import AttentionConfig
from ds_attention.mask import CausalMask
from ds_attention.mha import MultiHeadAttention
from ds_attention.mla import MultiHeadLatentAttention
from ds_attention.pages import Pages, latent_pool
from ds_attention.rms_norm import RMSNorm
from ds_attention.rope import YarnConfig, apply_rope, rope_frequencies, rope_rotation
from ds_attention.weights import attention_weights

__all__ = [
    "AttentionConfig",
    "CausalMask",
    "LatentCache",
    "MemoryReport",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "Pages",
    "RMSNorm",
    "YarnConfig",
    "apply_rope",
    "attention_weights",
    "causal_mask",
    "latent_pool",
    "memory_report",
    "rope_frequencies",
    "rope_rotation",
]
