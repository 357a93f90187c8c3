"""What attention looks at: the weights themselves, for study.

Layers never hold them for a whole sequence; here they are computed on their own, from the layer's
projections, with stock operations.

Shape letters: B batch, S sequence, H heads.
"""

from __future__ import annotations

import tensorflow as tf

from ds_attention.cache import causal_mask
from ds_attention.mla import MultiHeadLatentAttention
from ds_attention.rope import apply_rope
from ds_attention.softmax import masked_softmax


def attention_weights(
    layer: MultiHeadLatentAttention, x: tf.Tensor, positions: tf.Tensor | None = None
) -> tf.Tensor:
    """Return the share of each key in each query's output (arXiv 2412.19437, eq. 10).

    Args:
        layer: Built.
        x: `[B, S, hidden_size]`: the layer's input.
        positions: `[B, S]` or `[1, S]`, integer; 0, 1, 2, ... if `None`.

    Returns:
        `[B, H, S, S]` float32, queries before keys; rows sum to 1 and are zero after the diagonal.
    """
    c = layer.config
    steps = tf.range(tf.shape(x)[1])[None]
    positions = steps if positions is None else positions

    def rotated(part: tf.Tensor) -> tf.Tensor:
        return apply_rope(part, positions, c.rope_theta, c.rope_scaling, c.rope_interleave)

    def heads(flat: tf.Tensor, width: int) -> tf.Tensor:
        return tf.reshape(flat, [*tf.unstack(tf.shape(flat)[:2]), c.num_attention_heads, width])

    if c.q_lora_rank is None:
        q = layer.q_proj(x)
    else:
        q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x)))
    q = heads(q, c.qk_head_dim)
    q_nope, q_rope = tf.split(q, [c.qk_nope_head_dim, c.qk_rope_head_dim], axis=-1)
    latent, k_rope = tf.split(
        layer.kv_a_proj_with_mqa(x), [c.kv_lora_rank, c.qk_rope_head_dim], axis=-1
    )
    kv = heads(layer.kv_b_proj(layer.kv_a_layernorm(latent)), c.qk_nope_head_dim + c.v_head_dim)
    k_nope = kv[..., : c.qk_nope_head_dim]
    scores = tf.einsum("bshn,blhn->bhsl", q_nope, k_nope)
    scores += tf.einsum("bshr,blr->bhsl", rotated(q_rope), rotated(k_rope))
    scores = tf.cast(scores, tf.float32) * c.score_scale
    return masked_softmax(scores, causal_mask(steps, tf.shape(x)[1])[:, None])
