"""Redundant experts that run: copies of busy ones on other ranks (arXiv 2412.19437, section 3.4.1).

`rebalance_experts` says which experts get copies and where each lies; here weights move there, and
tokens find one of an expert's copies, each in turn. For inference: what copies would learn is not
summed.

Letters: T tokens, E experts of the model, K experts a token, P copies in all, R ranks, N = P / R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

from ds_moe.exchange import ExpertRanks


class Copies(NamedTuple):
    """Where one layer's experts lie.

    Attributes:
        held: `[P]` int64: the expert that each copy is of, rank by rank.
        places: `[E, most]` int32: the copies of each expert; those it lacks repeat others.
        counts: `[E]` int32: how many it has.
    """

    held: NDArray[np.int64]
    places: NDArray[np.int32]
    counts: NDArray[np.int32]

    @classmethod
    def of(cls, held: ArrayLike, experts: int) -> Copies:
        """Read who holds what.

        Args:
            held: `[P]`: a row of `Placement.physical_to_logical`.
            experts: E.

        Raises:
            ValueError: an expert is missing, or there is none of a number; names it.
        """
        row = np.asarray(held, np.int64)
        counts = np.bincount(row, minlength=experts)
        if len(counts) > experts:
            raise ValueError(f"a copy is of expert {row.max()}; there are {experts}")
        if not counts.all():
            raise ValueError(f"expert {int(np.argmin(counts))} has no copy; each needs one")
        places = [
            np.resize(np.flatnonzero(row == expert), counts.max()) for expert in range(experts)
        ]
        return cls(row, np.array(places, np.int32), counts.astype(np.int32))

    def chosen(self, indices: tf.Tensor, turn: int) -> tf.Tensor:
        """Return a copy for each choice: those of an expert take its tokens in turn.

        Args:
            indices: `[T, K]` int32: experts.
            turn: which copy the first token goes to, so that ranks begin with different ones.
        """
        order_T1 = tf.range(turn, turn + tf.shape(indices)[0])[:, None]
        copy_TK = order_T1 % tf.gather(tf.constant(self.counts), indices)
        return tf.gather_nd(tf.constant(self.places), tf.stack([indices, copy_TK], axis=-1))


def move_experts(stack: tf.Tensor, before: Copies, after: Copies, ranks: ExpertRanks) -> tf.Tensor:
    """Give every rank the experts that it is to hold, by one exchange; all ranks call this.

    Args:
        stack: `[N, ...]`: what this rank holds, as `before` says.
        before: who holds what now.
        after: and who is to.
        ranks: who they are.

    Returns:
        `[N', ...]`: what this rank is to hold, in the order of `after`.
    """
    sent = [_sent(before, after, source, ranks.size) for source in range(ranks.size)]
    most = max(len(row) for rows in sent for row in rows)
    power = max(most - 1, 0).bit_length()
    rows = [np.resize(np.array(row or [0]), 1 << power) for row in sent[ranks.index]]
    received = ranks.all_to_all(tf.gather(stack, np.array(rows)), tf.constant(power))
    # Experts come in the order in which they are to lie, from each of the ranks that give them.
    place = [0] * ranks.size
    found = []
    for source in _sources(before, after, ranks.index, ranks.size):
        found.append((source << power) + place[source])
        place[source] += 1
    return tf.gather(tf.reshape(received, [-1, *stack.shape[1:]]), found)


def _sources(before: Copies, after: Copies, rank: int, size: int) -> Sequence[int]:
    """Return who gives a rank each expert that it is to hold: itself if it can."""
    old, new = len(before.held) // size, len(after.held) // size
    given = []
    for expert in after.held[rank * new : (rank + 1) * new]:
        owners = before.places[expert, : before.counts[expert]] // old
        given.append(rank if rank in owners else int(owners[rank % len(owners)]))
    return given


def _sent(before: Copies, after: Copies, source: int, size: int) -> list[list[int]]:
    """Return for each rank which of its experts `source` gives it, in order."""
    old, new = len(before.held) // size, len(after.held) // size
    here = before.held[source * old : (source + 1) * old].tolist()
    return [
        [
            here.index(expert)
            for expert, giver in zip(
                after.held[rank * new : (rank + 1) * new],
                _sources(before, after, rank, size),
                strict=True,
            )
            if giver == source
        ]
        for rank in range(size)
    ]
