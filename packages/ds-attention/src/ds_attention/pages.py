"""A latent cache in blocks, shared by sequences that come and go (arXiv 2309.06180).

A *pool* holds one layer's latents, in blocks of a few neighbouring tokens. A sequence owns whole
blocks, wherever they lie, and its *table* names them in order; two sequences that begin alike may
name the same ones. Here a token's slot in its sequence is its position.

Shape letters: T new tokens of B sequences, M blocks a table has room for.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from ds_attention.config import AttentionConfig


class Pages(NamedTuple):
    """Whose tokens a step reads, and where their past lies.

    Attributes:
        slots: `[T]` int32: where each token goes in its sequence.
        splits: `[B + 1]` int32: sequence b's tokens are `splits[b]` to `splits[b + 1]`. Those that
            bring up to 8 tokens come first: they attend in the latent space.
        tables: `[B, M]` int32: the blocks of each sequence, in order.
        copies: `[n, 2]` int32: blocks to copy before the step, from and to.
    """

    slots: tf.Tensor
    splits: tf.Tensor
    tables: tf.Tensor
    copies: tf.Tensor


def latent_pool(
    config: AttentionConfig, blocks: int, block_size: int, dtype: str | tf.DType = "float32"
) -> tf.Variable:
    """Claim one layer's pool, `[blocks, block_size, cache_width]`, for good.

    Args:
        config: of the layer.
        blocks: how many blocks.
        block_size: tokens of a block.
        dtype: of the entries: the layer's compute type.

    Raises:
        ValueError: a size is below 1.
    """
    for name, value in (("blocks", blocks), ("block_size", block_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    entries = tf.zeros([blocks, block_size, config.cache_width], dtype)
    return tf.Variable(entries, trainable=False, name="latent_pool")


def write_pages(pool: tf.Variable, new: tf.Tensor, pages: Pages) -> None:
    """Copy blocks, then write `new [T, cache_width]` to its places, with stock operations."""
    moved = tf.gather(pool, pages.copies[:, 0])
    pool.scatter_update(tf.IndexedSlices(moved, pages.copies[:, 1]))
    size = pool.shape[1]
    blocks = tf.gather_nd(pages.tables, tf.stack([owners(pages), pages.slots // size], axis=1))
    places = tf.stack([blocks, pages.slots % size], axis=1)
    pool.scatter_nd_update(places, tf.cast(new, pool.dtype))


def owners(pages: Pages) -> tf.Tensor:
    """Return the sequence of each token, `[T]` int32."""
    counts = pages.splits[1:] - pages.splits[:-1]
    return tf.repeat(tf.range(tf.size(counts)), counts)
