"""From pairs of runs to figures: medians, and ratios with their range.

A ratio is taken within a pair, two runs one right after the other, so that what slows the machine
for longer than that falls out of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median and the range around it.

    Attributes:
        median: of the values.
        lowest: of them.
        highest: of them.
    """

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value.

        Raises:
            ValueError: there is none.
        """
        if not values:
            raise ValueError("no value was measured; expected at least 1")
        return cls(statistics.median(values), min(values), max(values))


def speed_ratios(pairs: Sequence[tuple[float, float]]) -> Spread:
    """Return how many times faster the first of each pair is, from speeds (tokens a second)."""
    return Spread.of([ours / peer for ours, peer in pairs])


def pair_order(round_index: int, peers: Sequence[str]) -> list[tuple[str, bool]]:
    """Return which peer to pair with in turn, and whether we go first, for one round.

    Order changes from round to round, so that neither side always follows the other and no peer
    always comes first.
    """
    start = round_index % len(peers) if peers else 0
    turned = [*peers[start:], *peers[:start]]
    return [(peer, (round_index + peers.index(peer)) % 2 == 0) for peer in turned]
