"""One block of the decoder, and the MTP module: one block with a way in.

Pre-norm residual blocks (arXiv 2412.19437, section 2.1); MTP: section 2.2, eq. 21-23.

Shape letters: B batch, S tokens, L cache slots, D hidden_size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from ds_attention import CausalMask, LatentCache, MultiHeadLatentAttention, Pages, RMSNorm
from ds_model.config import ModelConfig
from ds_moe import MixtureOfExperts, Routing, SwiGLU
from ds_precision import Linear, RestoresPolicy, without_fp8


class Window(NamedTuple):
    """Where the tokens of one call lie.

    Attributes:
        positions: `[B or 1, S]`: what RoPE sees.
        attention_mask: who sees whom: a `CausalMask`, or boolean `[B or 1, S, S]`, with a cache
            `[B or 1, S, L]`.
        token_mask: `[B, S]`, nonzero for real tokens, or `None` if all are.
        slots: `[B or 1, S]`: where the tokens go in the cache; `None` without one.
    """

    positions: tf.Tensor
    attention_mask: tf.Tensor | CausalMask
    token_mask: tf.Tensor | None = None
    slots: tf.Tensor | None = None


@keras.saving.register_keras_serializable(package="ds_model")
class DecoderBlock(RestoresPolicy, keras.layers.Layer):
    """`h += MLA(norm(h))`, then `h += FFN(norm(h))`.

    Args:
        config: of the model; the mapping that `to_dict` returns is accepted too.
        moe: whether the feed-forward has experts.
        **kwargs: of `keras.layers.Layer`.
    """

    def __init__(self, config: ModelConfig | dict[str, Any], moe: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config if isinstance(config, ModelConfig) else ModelConfig.from_dict(config)
        self.moe = moe
        c, policy = self.config, self.dtype_policy
        self.input_layernorm = RMSNorm(c.rms_norm_eps, dtype=policy, name="input_layernorm")
        self.self_attn = MultiHeadLatentAttention(c.attention, dtype=policy, name="self_attn")
        self.post_attention_layernorm = RMSNorm(
            c.rms_norm_eps, dtype=policy, name="post_attention_layernorm"
        )
        experts = c.moe if moe else None
        if experts:
            self.mlp = MixtureOfExperts(experts, dtype=policy, name="mlp")
        else:
            self.mlp = SwiGLU(
                c.hidden_size, c.intermediate_size, c.initializer_range, dtype=policy, name="mlp"
            )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the weights of all parts."""
        shape = (None, None, input_shape[-1])
        for part in (
            self.input_layernorm,
            self.self_attn,
            self.post_attention_layernorm,
            self.mlp,
        ):
            part.build(shape)

    def call(
        self, h: tf.Tensor, window: Window, recompute: bool = False
    ) -> tuple[tf.Tensor, Routing | None]:
        """Map `[B, S, D]` to the same shape; the routing is `None` for a dense block.

        Args:
            h: `[B, S, D]`.
            window: where the tokens lie.
            recompute: make norms and parts of attention again in the backward pass; see
                `MultiHeadLatentAttention.recomputed` and `MixtureOfExperts.recomputed`.
        """
        norm, mask = self.input_layernorm, window.attention_mask
        if recompute and isinstance(mask, CausalMask):
            attended = self.self_attn.recomputed(h, norm, window.positions, mask)
        else:
            attended = self.self_attn(norm(h), window.positions, mask)
        return self._feed_forward(h + attended, window, recompute)

    def step(
        self, h: tf.Tensor, window: Window, cache: LatentCache, absorb: bool
    ) -> tuple[tf.Tensor, LatentCache]:
        """Do as `call` for new tokens that follow what `cache` holds."""
        normed, attention = self.input_layernorm(h), self.self_attn
        positions, mask = window.positions, window.attention_mask
        if absorb and isinstance(mask, CausalMask):
            attended, cache = attention.decode(normed, cache, positions, mask)
        else:
            attended, cache = attention.attend(normed, cache, window.slots, positions, mask, absorb)
        return self._feed_forward(h + attended, window)[0], cache

    def paged(
        self, h: tf.Tensor, pages: Pages, pool: tf.Variable
    ) -> tuple[tf.Tensor, Routing | None]:
        """Do as `call` for new tokens `[1, T, D]` of sequences whose past lies in `pool`."""
        attended = self.self_attn.paged(self.input_layernorm(h), pool, pages)
        return self._feed_forward(h + attended, Window(pages.slots, pages.slots))

    def _feed_forward(
        self, h: tf.Tensor, window: Window, recompute: bool = False
    ) -> tuple[tf.Tensor, Routing | None]:
        norm = self.post_attention_layernorm
        if recompute and not self.moe:
            return h + self.mlp.recomputed(h, norm), None
        if recompute:
            y, routing = self.mlp.recomputed(h, norm, window.token_mask)
            return h + y, routing
        normed = norm(h)
        if not self.moe:
            return h + self.mlp(normed), None
        y, routing = self.mlp(normed, window.token_mask)
        return h + y, routing

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal layer."""
        return super().get_config() | {"config": self.config.to_dict(), "moe": self.moe}


@keras.saving.register_keras_serializable(package="ds_model")
class MTPModule(RestoresPolicy, keras.layers.Layer):
    """Module k of multi-token prediction: from depth k-1 to depth k.

    `h^k = block(M_k [enorm(Emb(t_{i+k})) ; hnorm(h^{k-1}_i)])`. The released weights put the
    embedding first; the paper's formula has the other order. What leaves the module has passed
    its norm, and that is what the next depth receives, as in the released layout
    (`shared_head.norm`).

    Args:
        config: of the model; the mapping that `to_dict` returns is accepted too.
        **kwargs: of `keras.layers.Layer`.
    """

    def __init__(self, config: ModelConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config if isinstance(config, ModelConfig) else ModelConfig.from_dict(config)
        c, policy = self.config, self.dtype_policy
        self.enorm = RMSNorm(c.rms_norm_eps, dtype=policy, name="enorm")
        self.hnorm = RMSNorm(c.rms_norm_eps, dtype=policy, name="hnorm")
        self.eh_proj = Linear(  # not in FP8, as in the released files
            c.hidden_size,
            initializer_range=c.initializer_range,
            dtype=without_fp8(policy),
            name="eh_proj",
        )
        moe = c.is_moe_layer(c.num_hidden_layers)
        self.block = DecoderBlock(c, moe, dtype=policy, name="block")
        self.norm = RMSNorm(c.rms_norm_eps, dtype=policy, name="norm")

    def build(self, input_shape: tuple[int | None, ...]) -> None:  # noqa: ARG002 - the config's
        """Create the weights of all parts."""
        width = self.config.hidden_size
        for part in (self.enorm, self.hnorm, self.block, self.norm):
            part.build((None, None, width))
        self.eh_proj.build((None, None, 2 * width))

    def call(
        self, h: tf.Tensor, embedded: tf.Tensor, window: Window, recompute: bool = False
    ) -> tuple[tf.Tensor, Routing | None]:
        """Return the next depth's normed hidden state `[B, S, D]` and the routing.

        Args:
            h: `[B, S, D]`: the previous depth's normed hidden state at position i.
            embedded: `[B, S, D]`: the embedding of token i + k.
            window: of the positions i.
            recompute: as for the block.
        """
        out, routing = self.block(self._join(h, embedded), window, recompute=recompute)
        return self.norm(out), routing

    def step(
        self,
        h: tf.Tensor,
        embedded: tf.Tensor,
        window: Window,
        cache: LatentCache,
        absorb: bool,
    ) -> tuple[tf.Tensor, LatentCache]:
        """Do as `call` for new positions that follow what `cache` holds."""
        out, cache = self.block.step(self._join(h, embedded), window, cache, absorb)
        return self.norm(out), cache

    def paged(
        self, h: tf.Tensor, embedded: tf.Tensor, pages: Pages, pool: tf.Variable
    ) -> tuple[tf.Tensor, Routing | None]:
        """Do as `call` for positions `[1, T, D]` of sequences whose past lies in `pool`."""
        out, routing = self.block.paged(self._join(h, embedded), pages, pool)
        return self.norm(out), routing

    def _join(self, h: tf.Tensor, embedded: tf.Tensor) -> tf.Tensor:
        return self.eh_proj(tf.concat([self.enorm(embedded), self.hnorm(h)], axis=-1))

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal layer."""
        return super().get_config() | {"config": self.config.to_dict()}
