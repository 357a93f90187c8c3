"""One pass over new tokens of many sequences, whose past lies in blocks: what a server runs.

Blocks as in arXiv 2309.06180; latents as in arXiv 2405.04434, section 2.1.

Shape letters: T new tokens of all sequences, D hidden_size, M layers with experts, K experts a
token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import tensorflow as tf

from ds_attention import Pages, latent_pool

if TYPE_CHECKING:
    from ds_model.causal_lm import CausalLM


class PagedCache:
    """The latents of all layers, in blocks; its memory is claimed once.

    Block `i` is block `i` of every layer, so one table serves a sequence in all of them.

    Args:
        model: whose layers they are.
        blocks: how many blocks.
        block_size: tokens of a block.
        drafts: have a layer for the first MTP module too.

    Attributes:
        pools: one `[blocks, block_size, cache_width]` variable a layer, the MTP module's last.
        blocks: how many blocks.
        block_size: tokens of a block.

    Raises:
        ValueError: a size is below 1, or the model has no MTP module to draft with.
    """

    def __init__(
        self, model: CausalLM, blocks: int, block_size: int = 64, drafts: bool = False
    ) -> None:
        if drafts and not model.mtp:
            raise ValueError("drafts is True; this model has no MTP module to draft with")
        attention, policy = model.config.attention, model.compute_dtype
        self.pools = [
            latent_pool(attention, blocks, block_size, policy)
            for _ in range(len(model.blocks) + drafts)
        ]
        self.blocks, self.block_size = blocks, block_size

    @property
    def nbytes(self) -> int:
        """Bytes that all blocks occupy."""
        return self.blocks * self.block_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        pool = self.pools[0]
        return len(self.pools) * self.block_size * pool.shape[-1] * pool.dtype.size


class PagedOutput(NamedTuple):
    """What one pass gives.

    Attributes:
        hidden: `[T, D]`: normed hidden states, for `CausalLM.head`.
        experts: `[M, T, K]` int32: the experts chosen in each layer that has some.
    """

    hidden: tf.Tensor
    experts: tf.Tensor


def read_pages(model: CausalLM, tokens: tf.Tensor, pages: Pages, cache: PagedCache) -> PagedOutput:
    """Read new tokens of several sequences, and put their latents into the cache.

    Args:
        model: the model.
        tokens: `[T]` int32: those of all sequences, one after the other.
        pages: whose they are.
        cache: where the sequences' past lies.
    """
    h = model.embed_tokens(tokens[None])
    chosen = []
    # Not `zip(strict)`: the pool of the MTP module is left over.
    for block, pool in zip(model.blocks, cache.pools):  # noqa: B905
        h, routing = block.paged(h, pages, pool)
        if routing is not None:
            chosen.append(routing.indices)
    width = model.config.num_experts_per_tok or 0
    experts = tf.stack(chosen) if chosen else tf.zeros([0, tf.size(tokens), width], tf.int32)
    return PagedOutput(model.norm(h)[0], experts)


def draft_pages(
    model: CausalLM, hidden: tf.Tensor, following: tf.Tensor, pages: Pages, cache: PagedCache
) -> tf.Tensor:
    """Let the first MTP module look at the same positions (arXiv 2412.19437, eq. 21-23).

    Args:
        model: the model.
        hidden: `[T, D]` of `read_pages`.
        following: `[T]` int32: the token that follows each of those that were read.
        pages: as for `read_pages`.
        cache: with a layer for drafts.

    Returns:
        `[T, D]`, for `CausalLM.head`: what it makes of the token after the following one.
    """
    ahead = model.embed_tokens(following[None])
    return model.mtp[0].paged(hidden[None], ahead, pages, cache.pools[len(model.blocks)])[0][0]
