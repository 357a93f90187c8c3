"""Standard attention, the yardstick that latent attention is compared with.

Multi-head attention (arXiv 1706.03762), multi-query (1911.02150) and grouped-query (2305.13245)
are one layer with different numbers of key-value heads.

Shape letters: B batch, S sequence, H query heads, G key-value heads, Q head width.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from ds_attention.cache import causal_mask
from ds_attention.rope import apply_rope
from ds_attention.softmax import masked_softmax
from ds_precision import Linear, RestoresPolicy


@keras.saving.register_keras_serializable(package="ds_attention")
class MultiHeadAttention(RestoresPolicy, keras.layers.Layer):
    """Causal MHA, MQA (`num_key_value_heads=1`) or GQA (in between).

    Args:
        num_attention_heads: query heads.
        head_dim: width of one head's query, key and value.
        num_key_value_heads: key-value heads, a divisor of the query heads; as many as those
            if `None`.
        rope_theta: RoPE's base; `None` leaves positions out.
        initializer_range: standard deviation of fresh weights.
        **kwargs: of `keras.layers.Layer`.

    Raises:
        ValueError: the key-value heads do not divide the query heads.
    """

    def __init__(
        self,
        num_attention_heads: int,
        head_dim: int,
        num_key_value_heads: int | None = None,
        rope_theta: float | None = 10000.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        if num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; it must divide "
                f"num_attention_heads ({num_attention_heads})"
            )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the four projections."""
        hidden = input_shape[-1]
        if hidden is None:
            raise ValueError(f"input_shape is {input_shape}; its last axis must be known")
        query, key = self.num_attention_heads, self.num_key_value_heads

        def linear(name: str, inner: int, outer: int) -> Linear:
            layer = Linear(
                outer,
                initializer_range=self.initializer_range,
                dtype=self.dtype_policy,
                name=name,
            )
            layer.build((None, inner))
            return layer

        self.q_proj = linear("q_proj", hidden, query * self.head_dim)
        self.k_proj = linear("k_proj", hidden, key * self.head_dim)
        self.v_proj = linear("v_proj", hidden, key * self.head_dim)
        self.o_proj = linear("o_proj", query * self.head_dim, hidden)

    def call(
        self,
        x: tf.Tensor,
        positions: tf.Tensor | None = None,
        attention_mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Attend within one sequence.

        Args:
            x: `[B, S, hidden_size]`.
            positions: `[B, S]` or `[1, S]`; 0, 1, 2, ... if `None`.
            attention_mask: `[B or 1, S, S]` boolean; causal if `None`.

        Returns:
            `[B, S, hidden_size]`.
        """
        batch, length = tf.shape(x)[0], tf.shape(x)[1]
        steps = tf.range(length)[None]
        positions = steps if positions is None else positions
        allowed = causal_mask(steps, length) if attention_mask is None else attention_mask

        def heads(projected: tf.Tensor, count: int) -> tf.Tensor:
            return tf.reshape(projected, [batch, length, count, self.head_dim])

        q = heads(self.q_proj(x), self.num_attention_heads)
        k = heads(self.k_proj(x), self.num_key_value_heads)
        v = heads(self.v_proj(x), self.num_key_value_heads)
        if self.rope_theta is not None:
            q = apply_rope(q, positions, self.rope_theta, interleave=False)
            k = apply_rope(k, positions, self.rope_theta, interleave=False)
        shared_by = self.num_attention_heads // self.num_key_value_heads
        k, v = (tf.repeat(y, shared_by, axis=2) for y in (k, v))
        q, k, v = (tf.transpose(y, [0, 2, 1, 3]) for y in (q, k, v))
        scores = tf.matmul(q * self.head_dim**-0.5, k, transpose_b=True)
        out = tf.matmul(masked_softmax(scores, allowed[:, None]), v)
        width = self.num_attention_heads * self.head_dim
        return self.o_proj(tf.reshape(tf.transpose(out, [0, 2, 1, 3]), [batch, length, width]))

    @property
    def cache_width(self) -> int:
        """Numbers that one token leaves in this layer's key-value cache."""
        return 2 * self.num_key_value_heads * self.head_dim

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal layer."""
        return super().get_config() | {
            "num_attention_heads": self.num_attention_heads,
            "head_dim": self.head_dim,
            "num_key_value_heads": self.num_key_value_heads,
            "rope_theta": self.rope_theta,
            "initializer_range": self.initializer_range,
        }
