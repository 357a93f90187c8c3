"""What an attention layer is made of, under the names of the released `config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ds_attention.rope import YarnConfig


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of multi-head latent attention [V3's values in brackets].

    Attributes:
        hidden_size: width of the residual stream [7168].
        num_attention_heads: query heads [128].
        kv_lora_rank: width of the latent that keys and values share [512].
        qk_nope_head_dim: part of a head's query and key without rotation [128].
        qk_rope_head_dim: rotated part; its key is one for all heads [64].
        v_head_dim: a head's value [128].
        q_lora_rank: width of the query's latent [1536]; `None` projects directly (V2-Lite).
        attention_bias: biases on the projections that read or write the residual stream.
        rope_theta: RoPE's base [10000].
        rope_interleave: rotary pairs lie side by side [true].
        rope_scaling: YaRN, if the context was extended.
        initializer_range: standard deviation of fresh weights [0.006].
    """

    hidden_size: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    rope_scaling: YarnConfig | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", YarnConfig(**self.rope_scaling))
        for field in (
            "hidden_size",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        ):
            value = getattr(self, field)
            if not (isinstance(value, int) and value > 0):
                raise ValueError(f"{field} is {value!r}; it must be a positive integer")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}; it must be even, RoPE turns pairs"
            )
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(
                f"q_lora_rank is {self.q_lora_rank}; it must be positive, or None for no latent"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers that one token leaves in one layer's cache [576]."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def score_scale(self) -> float:
        """What the attention scores are multiplied by before the softmax."""
        scale = self.qk_head_dim**-0.5
        return scale if self.rope_scaling is None else scale * self.rope_scaling.score_scale

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which `AttentionConfig(**values)` is equal."""
        return asdict(self)
