"""Multi-head latent attention (arXiv 2405.04434, section 2.1; 2412.19437, eq. 1-11).

Departures from the paper's notation: `c_kv` and the shared rotated key are made by one
product (`kv_a_proj_with_mqa`), keys and values by another (`kv_b_proj`), as in the released
weights.

Shape letters: B batch, S new tokens, L cached tokens, D hidden_size, H heads,
N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, C kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from ds_attention.cache import LatentCache
from ds_attention.config import AttentionConfig
from ds_attention.mask import CausalMask
from ds_attention.pages import Pages, write_pages
from ds_attention.rms_norm import RMSNorm
from ds_attention.rope import apply_rope, rope_rotation
from ds_attention.softmax import masked_softmax
from ds_precision import (
    AttentionDone,
    Linear,
    RestoresPolicy,
    attention_done,
    fused_attention,
    fused_latent_attention,
    fused_paged_attention,
    use_kernels,
)


@keras.saving.register_keras_serializable(package="ds_attention")
class MultiHeadLatentAttention(RestoresPolicy, keras.layers.Layer):
    """Attention whose keys and values are made of one small latent per token.

    `call` is for training and scoring: keys and values are expanded from the latent.
    `attend` is for generation: it keeps the latent in a `LatentCache`, and for few new tokens
    it moves the expansion into query and output ("absorbed"), so that K and V never exist.
    Both give the same numbers up to rounding.

    Args:
        config: sizes; a mapping of `AttentionConfig`'s fields is accepted too.
        **kwargs: of `keras.layers.Layer`.
    """

    # Queries that attend at a time where attention is not one compiled operation.
    QUERY_BLOCK = 256
    # The latents' norms use this epsilon in the reference whatever `rms_norm_eps` says.
    LATENT_EPSILON = 1e-6
    # New tokens of a sequence up to which `paged` attends in the latent space.
    FEW = 8

    def __init__(self, config: AttentionConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config if isinstance(config, AttentionConfig) else AttentionConfig(**config)
        c = self.config

        def linear(name: str, units: int, use_bias: bool = False, fp8: str = "E4M3") -> Linear:
            return Linear(
                units,
                use_bias=use_bias,
                initializer_range=c.initializer_range,
                fp8_input_format=fp8,
                dtype=self.dtype_policy,
                name=name,
            )

        def norm(name: str) -> RMSNorm:
            return RMSNorm(self.LATENT_EPSILON, dtype=self.dtype_policy, name=name)

        query_width = c.num_attention_heads * c.qk_head_dim
        if c.q_lora_rank is None:
            self.q_proj = linear("q_proj", query_width)
        else:
            self.q_a_proj = linear("q_a_proj", c.q_lora_rank, c.attention_bias)
            self.q_a_layernorm = norm("q_a_layernorm")
            self.q_b_proj = linear("q_b_proj", query_width)
        self.kv_a_proj_with_mqa = linear("kv_a_proj_with_mqa", c.cache_width, c.attention_bias)
        self.kv_a_layernorm = norm("kv_a_layernorm")
        self.kv_b_proj = linear(
            "kv_b_proj", c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        )
        # Its input is also what attention's backward pass starts from (section 3.3.3).
        self.o_proj = linear("o_proj", c.hidden_size, c.attention_bias, fp8="E5M6")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the weights of all projections."""
        c = self.config
        if input_shape[-1] != c.hidden_size:
            raise ValueError(
                f"input has {input_shape[-1]} features; hidden_size is {c.hidden_size}"
            )
        if c.q_lora_rank is None:
            self.q_proj.build((None, c.hidden_size))
        else:
            self.q_a_proj.build((None, c.hidden_size))
            self.q_a_layernorm.build((None, c.q_lora_rank))
            self.q_b_proj.build((None, c.q_lora_rank))
        self.kv_a_proj_with_mqa.build((None, c.hidden_size))
        self.kv_a_layernorm.build((None, c.kv_lora_rank))
        self.kv_b_proj.build((None, c.kv_lora_rank))
        self.o_proj.build((None, c.num_attention_heads * c.v_head_dim))

    def call(
        self,
        x: tf.Tensor,
        positions: tf.Tensor | None = None,
        attention_mask: tf.Tensor | CausalMask | None = None,
    ) -> tf.Tensor:
        """Attend within one sequence.

        Args:
            x: `[B, S, hidden_size]`.
            positions: `[B, S]` or `[1, S]`, integer; 0, 1, 2, ... if `None`.
            attention_mask: a `CausalMask`, with which no tensor of queries by keys is held; or
                `[B or 1, S, S]` boolean, true where query i may see key j. Causal if `None`.

        Returns:
            `[B, S, hidden_size]` in the compute type.
        """
        steps = tf.range(tf.shape(x)[1])[None]
        positions = steps if positions is None else positions
        if attention_mask is None:
            attention_mask = CausalMask(steps, tf.shape(x)[1])
        entries = self._compress(x, positions)
        return self._attend_expanded(self._raw_queries(x), positions, entries, attention_mask)

    def recomputed(
        self, h: tf.Tensor, norm: RMSNorm, positions: tf.Tensor, attention_mask: CausalMask
    ) -> tf.Tensor:
        """Return `self(norm(h), positions, attention_mask)`, and hold less until the backward pass.

        What the norms and the products that expand the latents give is made again there
        (arXiv 2412.19437, section 3.2.3); kept are `h`, the latents as they leave their products,
        and what the core gave. Without compiled operations the core is made again as well.

        Args:
            h: `[B, S, hidden_size]`.
            norm: what it passes first.
            positions: `[B, S]` or `[1, S]`.
            attention_mask: which keys a query sees.
        """
        c = self.config

        # In a graph the products that are repeated here have no use, and are left out: what is
        # made again is the norm alone.
        @tf.recompute_grad
        def down(h: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            x = norm(h)
            return (h if c.q_lora_rank is None else self.q_a_proj(x)), self.kv_a_proj_with_mqa(x)

        def up(source: tf.Tensor, compressed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            if c.q_lora_rank is None:
                q = self.q_proj(norm(source))
            else:
                q = self.q_b_proj(self.q_a_layernorm(source))
            return self._in_heads(q), self._entries(compressed, positions)

        source, compressed = down(h)
        done = None
        if use_kernels(source):
            q, entries = up(tf.stop_gradient(source), tf.stop_gradient(compressed))
            done = attention_done(*self._core_operands(q, positions, entries, attention_mask))

        @tf.recompute_grad
        def core(source: tf.Tensor, compressed: tf.Tensor) -> tf.Tensor:
            q, entries = up(source, compressed)
            return self._attend_core(q, positions, entries, attention_mask, done)

        return self._project(core(source, compressed))

    def attend(
        self,
        x: tf.Tensor,
        cache: LatentCache,
        slots: tf.Tensor,
        positions: tf.Tensor,
        attention_mask: tf.Tensor | CausalMask,
        absorb: bool = True,
    ) -> tuple[tf.Tensor, LatentCache]:
        """Write new tokens to the cache and attend to all that it holds.

        Args:
            x: `[B, S, hidden_size]`: the new tokens.
            cache: of this layer, with L slots.
            slots: `[B, S]` or `[1, S]`: where the new tokens go.
            positions: `[B, S]` or `[1, S]`: what RoPE sees.
            attention_mask: a `CausalMask`, or `[B or 1, S, L]` boolean.
            absorb: attend in the latent space (cheap for few new tokens) instead of
                expanding keys and values of all L slots.

        Returns:
            `[B, S, hidden_size]` and the cache with the new tokens in it.
        """
        x = tf.cast(x, self.compute_dtype)
        cache = cache.write(self._compress(x, positions), slots)
        entries = tf.cast(cache.entries, x.dtype)
        if not absorb:
            q = self._raw_queries(x)
            return self._attend_expanded(q, positions, entries, attention_mask), cache
        if isinstance(attention_mask, CausalMask):
            attention_mask = attention_mask.dense()
        q_nope, q_rope = self._queries(x, positions)
        return self._attend_absorbed(q_nope, q_rope, entries, attention_mask), cache

    def decode(
        self, x: tf.Tensor, cache: LatentCache, positions: tf.Tensor, mask: CausalMask
    ) -> tuple[tf.Tensor, LatentCache]:
        """Do as `attend` does absorbed, without gradients, and as fast as can be.

        Where the compiled operations serve, one of them does all that lies between the
        projections, and changes the cache in place if nobody else holds it.

        Args:
            x: `[B, S, hidden_size]`: the new tokens.
            cache: of this layer, with L slots.
            positions: `[B, S]` or `[1, S]`: what RoPE sees.
            mask: its slots are where the new tokens go.

        Returns:
            `[B, S, hidden_size]` and the cache with the new tokens in it.
        """
        c = self.config
        x = tf.cast(x, self.compute_dtype)
        up = tf.convert_to_tensor(self.kv_b_proj.kernel)
        if not use_kernels(x, up) or cache.entries.dtype != x.dtype:
            return self.attend(x, cache, mask.slots, positions, mask)
        out, entries = fused_latent_attention(
            self._raw_queries(x),
            self.kv_a_proj_with_mqa(x),
            tf.convert_to_tensor(self.kv_a_layernorm.weight),
            up,
            rope_rotation(positions, c.qk_rope_head_dim, c.rope_theta, c.rope_scaling),
            tf.cast(mask.slots, tf.int32),
            None if mask.valid is None else tf.cast(mask.valid, tf.bool),
            cache.entries,
            c.score_scale,
            self.LATENT_EPSILON,
            c.rope_interleave,
        )
        return self.o_proj(out), LatentCache(entries)

    def paged(self, x: tf.Tensor, pool: tf.Variable, pages: Pages) -> tf.Tensor:
        """Attend for new tokens of several sequences, whose past lies in blocks of a pool.

        There are no gradients. Where the compiled operations serve, one of them does all that
        lies between the projections, and writes to the pool in place.

        Args:
            x: `[1, T, hidden_size]`: the new tokens of all sequences, one after the other.
            pool: of this layer; the new tokens are in it afterwards.
            pages: whose tokens they are.

        Returns:
            `[1, T, hidden_size]`.
        """
        c = self.config
        x = tf.cast(x, self.compute_dtype)
        up = tf.convert_to_tensor(self.kv_b_proj.kernel)
        positions = pages.slots[None]
        if not use_kernels(x, up) or pool.dtype != x.dtype:
            return self._paged_stock(x, pool, pages)
        cosines, sines = rope_rotation(positions, c.qk_rope_head_dim, c.rope_theta, c.rope_scaling)
        out = fused_paged_attention(
            self._raw_queries(x)[0],
            self.kv_a_proj_with_mqa(x)[0],
            tf.convert_to_tensor(self.kv_a_layernorm.weight),
            up,
            (cosines[0], sines[0]),
            *pages,
            pool,
            c.score_scale,
            self.LATENT_EPSILON,
            c.rope_interleave,
        )
        return self.o_proj(out[None])

    def _paged_stock(self, x: tf.Tensor, pool: tf.Variable, pages: Pages) -> tf.Tensor:
        """Do as `paged` with stock operations: short sequences at once, long ones in turn."""
        c = self.config
        positions = pages.slots[None]
        write_pages(pool, self._compress(x, positions)[0], pages)
        q_BTHQ = self._raw_queries(x)
        counts = pages.splits[1:] - pages.splits[:-1]
        # How many sequences come before the first that brings more than a few tokens.
        few = tf.reduce_sum(tf.math.cumprod(tf.cast(counts <= self.FEW, tf.int32)))
        length = pages.tables.shape[1] or tf.shape(pages.tables)[1]
        length *= pool.shape[1]

        def past(first: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
            blocks = tf.gather(pool, pages.tables[first:end])
            entries = tf.reshape(blocks, [end - first, length, c.cache_width])
            return tf.cast(entries, x.dtype)

        def short() -> tf.Tensor:
            most = tf.reduce_max(counts[:few])
            # Rows of `most` tokens, the surplus ones copies of the last.
            steps = tf.minimum(tf.range(most)[None], counts[:few, None] - 1)
            index = tf.maximum(pages.splits[:few, None] + steps, 0)
            q = tf.gather(q_BTHQ[0], index)
            slots = tf.gather(pages.slots, index)
            q_nope, q_rope = self._rotated(q, slots)
            mask = CausalMask(slots, length).dense()
            out = self._attend_latent(q_nope, q_rope, past(tf.constant(0), few), mask)
            kept = tf.range(most)[None] < counts[:few, None]
            return tf.boolean_mask(out, kept)

        def none() -> tf.Tensor:
            return tf.zeros([0, c.num_attention_heads, c.v_head_dim], x.dtype)

        def long(b: tf.Tensor, done: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            first, end = pages.splits[b], pages.splits[b + 1]
            slots = positions[:, first:end]
            mask = CausalMask(slots, length)
            out = self._attend_core(q_BTHQ[:, first:end], slots, past(b, b + 1), mask)
            return b + 1, tf.concat([done, out[0]], axis=0)

        done = tf.cond(few > 0, short, none)
        known = tf.TensorShape([None, c.num_attention_heads, c.v_head_dim])
        _, out = tf.while_loop(
            lambda b, _: b < tf.size(counts),
            long,
            (few, done),
            shape_invariants=(tf.TensorShape([]), known),
            parallel_iterations=1,
        )
        return self._project(tf.reshape(out, [1, tf.shape(x)[1], *known[1:]]))

    def _rope(self, x: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        c = self.config
        return apply_rope(x, positions, c.rope_theta, c.rope_scaling, c.rope_interleave)

    def _raw_queries(self, x_BSD: tf.Tensor) -> tf.Tensor:
        """Return `[B, S, H, N + R]`, not yet rotated (eq. 6-7)."""
        c = self.config
        if c.q_lora_rank is None:
            q = self.q_proj(x_BSD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        return self._in_heads(q)

    def _in_heads(self, q: tf.Tensor) -> tf.Tensor:
        c = self.config
        return tf.reshape(q, [*_leading(q), c.num_attention_heads, c.qk_head_dim])

    def _rotated(self, q_BSHQ: tf.Tensor, positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return `q_nope [B, S, H, N]` and the rotated `q_rope [B, S, H, R]` (eq. 8-9)."""
        c = self.config
        q_nope, q_rope = tf.split(q_BSHQ, [c.qk_nope_head_dim, c.qk_rope_head_dim], axis=-1)
        return q_nope, self._rope(q_rope, positions)

    def _queries(self, x_BSD: tf.Tensor, positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return both parts of the queries, ready to attend."""
        return self._rotated(self._raw_queries(x_BSD), positions)

    def _compress(self, x_BSD: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """Return what the cache holds: normed latent and rotated key, `[B, S, C + R]`."""
        return self._entries(self.kv_a_proj_with_mqa(x_BSD), positions)

    def _entries(self, compressed: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        c = self.config
        latent, k_rope = tf.split(compressed, [c.kv_lora_rank, c.qk_rope_head_dim], axis=-1)
        return tf.concat([self.kv_a_layernorm(latent), self._rope(k_rope, positions)], axis=-1)

    def _attend_expanded(
        self,
        q_BSHQ: tf.Tensor,
        positions: tf.Tensor,
        entries: tf.Tensor,
        mask: tf.Tensor | CausalMask,
    ) -> tf.Tensor:
        """Make keys and values of the latent, then attend as usual (eq. 10-11)."""
        return self._project(self._attend_core(q_BSHQ, positions, entries, mask))

    def _keys_and_values(self, entries: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return `[B, L, H, N + V]` and the rotated key `[B, L, R]`."""
        c = self.config
        latent, k_rope = tf.split(entries, [c.kv_lora_rank, c.qk_rope_head_dim], axis=-1)
        kv = self.kv_b_proj(latent)
        width = c.qk_nope_head_dim + c.v_head_dim
        return tf.reshape(kv, [*_leading(kv), c.num_attention_heads, width]), k_rope

    def _core_operands(
        self, q_BSHQ: tf.Tensor, positions: tf.Tensor, entries: tf.Tensor, mask: CausalMask
    ) -> tuple[Any, ...]:
        """Return what `fused_attention` takes."""
        c = self.config
        rotation = rope_rotation(positions, c.qk_rope_head_dim, c.rope_theta, c.rope_scaling)
        shape = tf.broadcast_dynamic_shape(tf.shape(positions), tf.shape(mask.slots))
        return (
            q_BSHQ,
            *self._keys_and_values(entries),
            tuple(tf.broadcast_to(r, tf.concat([shape, r.shape[-1:]], 0)) for r in rotation),
            tf.broadcast_to(tf.cast(mask.slots, tf.int32), shape),
            None if mask.valid is None else tf.cast(mask.valid, tf.bool),
            c.score_scale,
            c.rope_interleave,
        )

    def _attend_core(
        self,
        q_BSHQ: tf.Tensor,
        positions: tf.Tensor,
        entries: tf.Tensor,
        mask: tf.Tensor | CausalMask,
        done: AttentionDone | None = None,
    ) -> tf.Tensor:
        """Return `[B, S, H, V]`; what is `done` is not computed again."""
        c = self.config
        if isinstance(mask, CausalMask) and use_kernels(q_BSHQ):
            operands = self._core_operands(q_BSHQ, positions, entries, mask)
            attend: Callable[..., tf.Tensor] = fused_attention
            return attend(*operands, done=done)
        kv, k_rope = self._keys_and_values(entries)
        q = tf.concat(self._rotated(q_BSHQ, positions), axis=-1) * c.score_scale
        k_nope, v_BLHV = tf.split(kv, [c.qk_nope_head_dim, c.v_head_dim], axis=-1)
        k_rope = tf.repeat(k_rope[:, :, None], c.num_attention_heads, axis=2)
        return _attend(q, tf.concat([k_nope, k_rope], axis=-1), v_BLHV, mask)

    def _attend_absorbed(
        self, q_nope: tf.Tensor, q_rope: tf.Tensor, entries: tf.Tensor, mask: tf.Tensor
    ) -> tf.Tensor:
        return self._project(self._attend_latent(q_nope, q_rope, entries, mask))

    def _attend_latent(
        self, q_nope: tf.Tensor, q_rope: tf.Tensor, entries: tf.Tensor, mask: tf.Tensor
    ) -> tf.Tensor:
        """Attend in the latent space: `W_uk` goes into the query, `W_uv` into the output.

        Returns:
            `[B, S, H, V]`.
        """
        c = self.config
        heads = c.num_attention_heads
        kernel = tf.cast(tf.convert_to_tensor(self.kv_b_proj.kernel), entries.dtype)
        up = tf.reshape(kernel, [c.kv_lora_rank, heads, c.qk_nope_head_dim + c.v_head_dim])
        up_k, up_v = tf.split(up, [c.qk_nope_head_dim, c.v_head_dim], axis=-1)
        q_latent = tf.einsum("bshn,chn->bshc", q_nope, up_k)
        q_BSHC = tf.concat([q_latent, q_rope], axis=-1) * c.score_scale
        batch, count = tf.shape(q_BSHC)[0], tf.shape(q_BSHC)[1]
        queries = tf.reshape(q_BSHC, [batch, count * heads, c.cache_width])
        scores = tf.matmul(queries, entries, transpose_b=True)
        scores = tf.reshape(scores, [batch, count, heads, tf.shape(entries)[1]])
        weights = masked_softmax(scores, mask[:, :, None])
        weights = tf.reshape(weights, [batch, count * heads, tf.shape(entries)[1]])
        out = tf.matmul(weights, entries[..., : c.kv_lora_rank])
        out = tf.reshape(out, [batch, count, heads, c.kv_lora_rank])
        return tf.einsum("bshc,chv->bshv", out, up_v)

    def _project(self, out_BSHV: tf.Tensor) -> tf.Tensor:
        c = self.config
        width = c.num_attention_heads * c.v_head_dim
        return self.o_proj(tf.reshape(out_BSHV, [*_leading(out_BSHV)[:2], width]))

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...], *_: Any, **__: Any
    ) -> tuple[int | None, ...]:
        """Return the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal layer."""
        return super().get_config() | {"config": self.config.to_dict()}


def _attend(
    q_BSHQ: tf.Tensor, k_BLHQ: tf.Tensor, v_BLHV: tf.Tensor, mask: tf.Tensor | CausalMask
) -> tf.Tensor:
    """Attend with stock operations; under a `CausalMask` a block of queries at a time."""
    k_BHLQ = tf.transpose(k_BLHQ, [0, 2, 1, 3])
    v_BHLV = tf.transpose(v_BLHV, [0, 2, 1, 3])

    def attend(q: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
        scores = tf.matmul(tf.transpose(q, [0, 2, 1, 3]), k_BHLQ, transpose_b=True)
        out = tf.matmul(masked_softmax(scores, allowed[:, None]), v_BHLV)
        return tf.transpose(out, [0, 2, 1, 3])

    if not isinstance(mask, CausalMask):
        return attend(q_BSHQ, mask)
    size, count = MultiHeadLatentAttention.QUERY_BLOCK, q_BSHQ.shape[1]
    if count is not None and count <= size:
        return attend(q_BSHQ, mask.dense())
    count = tf.shape(q_BSHQ)[1]

    def block(first: tf.Tensor, out: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        end = tf.minimum(first + size, count)
        found = attend(q_BSHQ[:, first:end], mask.queries(first, end).dense())
        return first + size, out.write(first // size, tf.transpose(found, [1, 0, 2, 3]))

    blocks = tf.TensorArray(
        q_BSHQ.dtype, (count + size - 1) // size, infer_shape=False, element_shape=[None] * 4
    )
    # One block after another: two at once would hold twice the weights.
    _, blocks = tf.while_loop(
        lambda first, _: first < count, block, (tf.constant(0), blocks), parallel_iterations=1
    )
    out_SBHV = tf.ensure_shape(blocks.concat(), [None, None, *v_BLHV.shape[2:]])
    return tf.transpose(out_SBHV, [1, 0, 2, 3])


def _leading(x: tf.Tensor) -> list[int | tf.Tensor]:
    """Return all but the last size of `x`, static where known; one that is not may be -1."""
    sizes = x.shape[:-1].as_list()
    if sizes.count(None) == 1:
        return [-1 if size is None else size for size in sizes]
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(sizes)]
