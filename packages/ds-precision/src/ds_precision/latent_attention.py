"""Attention to a latent cache by the compiled operations.

Letters: B batch or sequences, S new tokens of each, T of all, L slots, M blocks a table has room
for, H heads, N and R the parts of a query, C latent, V a head's value.
"""

from __future__ import annotations

import tensorflow as tf

from ds_precision.kernels import operations


def fused_latent_attention(
    q: tf.Tensor,
    compressed: tf.Tensor,
    norm: tf.Tensor,
    up: tf.Tensor,
    rotation: tuple[tf.Tensor, tf.Tensor],
    slots: tf.Tensor,
    valid: tf.Tensor | None,
    entries: tf.Tensor,
    scale: float,
    epsilon: float,
    interleave: bool,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Norm, rotate and cache the latents of new tokens, and attend to the cache.

    All that multi-head latent attention does between its projections when it decodes (arXiv
    2405.04434, section 2.1, absorbed), as one operation with sums in float32. There is no
    gradient. The cache changes in place where nobody else holds it.

    Args:
        q: `[B, S, H, N + R]`, float32 or bfloat16, its last R numbers not yet rotated.
        compressed: `[B, S, C + R]`, of the type of `q`: latents before their norm, keys before
            their rotation.
        norm: `[C]`: the weight of the latents' norm.
        up: `[C, H * (N + V)]`: makes keys and values of a latent.
        rotation: cosines and sines, each `[B or 1, S, R / 2]` float32.
        slots: `[B or 1, S]` int32: where the tokens go; each sees slots up to its own.
        valid: `[B, L]` boolean: and of those the valid ones; all if `None`.
        entries: `[B, L, C + R]`, of the type of `q`: the cache.
        scale: factor on the scores.
        epsilon: of the latents' norm.
        interleave: whether rotated pairs lie side by side.

    Returns:
        `[B, S, H * V]` in the type of `q`, zero for a query that sees nothing; and the cache.

    Raises:
        tf.errors.InvalidArgumentError: a slot is out of range, or sizes do not fit.
    """
    cosines, sines = rotation
    y, updated = operations().ds_latent_attention(
        q=q,
        compressed=compressed,
        norm=norm,
        up=up,
        cosines=cosines,
        sines=sines,
        slots=slots,
        valid=tf.zeros([0, 0], tf.bool) if valid is None else valid,
        entries=entries,
        scale=scale,
        epsilon=epsilon,
        interleave=interleave,
    )
    heads, width = q.shape[2:]
    y.set_shape([*q.shape[:2], up.shape[-1] - heads * (width - 2 * cosines.shape[-1])])
    updated.set_shape(entries.shape)
    return y, updated


def fused_paged_attention(
    q: tf.Tensor,
    compressed: tf.Tensor,
    norm: tf.Tensor,
    up: tf.Tensor,
    rotation: tuple[tf.Tensor, tf.Tensor],
    slots: tf.Tensor,
    splits: tf.Tensor,
    tables: tf.Tensor,
    copies: tf.Tensor,
    pool: tf.Variable,
    scale: float,
    epsilon: float,
    interleave: bool,
) -> tf.Tensor:
    """Do as `fused_latent_attention` for sequences of any lengths whose past lies in blocks.

    A block of the pool holds the latents of a few neighbouring tokens (arXiv 2309.06180). New
    tokens are written into the variable where it lies. A sequence with more than 8 new tokens
    attends with keys and values made of all its latents; what a sequence gets depends on how many
    new tokens it has, and not on which others there are.

    Args:
        q: `[T, H, N + R]`, float32 or bfloat16, its last R numbers not yet rotated.
        compressed: `[T, C + R]`, of the type of `q`: latents before their norm, keys before
            their rotation.
        norm: `[C]`: the weight of the latents' norm.
        up: `[C, H * (N + V)]`: makes keys and values of a latent.
        rotation: cosines and sines, each `[T, R / 2]` float32.
        slots: `[T]` int32: where a token goes in its sequence; it sees slots up to its own.
        splits: `[B + 1]` int32: sequence b's new tokens are `splits[b]` to `splits[b + 1]`, those
            of sequences with up to 8 first.
        tables: `[B, M]` int32: the blocks of each sequence, in order.
        copies: `[n, 2]` int32: blocks to copy before anything else, from and to.
        pool: `[blocks, slots of a block, C + R]`, of the type of `q`. Operations that write to
            parts of a variable (`scatter_nd_update`) must not have been used on it: from then on
            TensorFlow reads copies of it.
        scale: factor on the scores.
        epsilon: of the latents' norm.
        interleave: whether rotated pairs lie side by side.

    Returns:
        `[T, H * V]` in the type of `q`.

    Raises:
        tf.errors.InvalidArgumentError: a slot, a split or a block is out of range, or sizes do not
            fit.
    """
    cosines, sines = rotation
    y = operations().ds_paged_attention(
        q=q,
        compressed=compressed,
        norm=norm,
        up=up,
        cosines=cosines,
        sines=sines,
        slots=slots,
        splits=splits,
        tables=tables,
        copies=copies,
        pool=pool.read_value(),
        scale=scale,
        epsilon=epsilon,
        interleave=interleave,
    )
    heads, width = q.shape[1:]
    y.set_shape([q.shape[0], up.shape[-1] - heads * (width - 2 * cosines.shape[-1])])
    return y
