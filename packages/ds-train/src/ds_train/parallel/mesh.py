"""Who stands where: ranks as places in a mesh of pipeline, replicas and experts.

The three ways of sharing are those of arXiv 2412.19437, section 3.2.

Rank = (stage rank * dp + replica) * ep + expert rank: ranks that exchange tokens are neighbours,
those that pass activations down the pipeline, which is least, are furthest apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

_KINDS = ("world", "experts", "pair", "dense weights", "expert weights")


class Place(NamedTuple):
    """One rank's coordinates.

    Attributes:
        pp: which rank of its pipeline.
        dp: which replica.
        ep: which share of the experts.
    """

    pp: int
    dp: int
    ep: int


class Group(NamedTuple):
    """Ranks that take part in one exchange.

    Attributes:
        name: unique in the mesh.
        ranks: its members, ascending.
        key: TensorFlow's group key, the same number on each of them.
    """

    name: str
    ranks: tuple[int, ...]
    key: int


@dataclass(frozen=True)
class Mesh:
    """How many ranks share the work in which way (arXiv 2412.19437, section 3.2).

    Attributes:
        pp: pipeline ranks.
        ep: ranks that the experts of a layer are dealt out to. They see different tokens, so for
            all that is no expert they are replicas.
        dp: replicas of that.

    Raises:
        ValueError: a number is not positive; names it.
    """

    pp: int = 1
    ep: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for name in ("pp", "ep", "dp"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0):
                raise ValueError(f"{name} is {value!r}; it must be a positive integer")

    def __str__(self) -> str:
        return f"pp {self.pp} x ep {self.ep} x dp {self.dp}"

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.pp * self.ep * self.dp

    @property
    def data_ranks(self) -> int:
        """Ranks of one pipeline rank; each of them sees other tokens."""
        return self.ep * self.dp

    def place(self, rank: int) -> Place:
        """Return where a rank stands."""
        rest, ep = divmod(rank, self.ep)
        pp, dp = divmod(rest, self.dp)
        return Place(pp, dp, ep)

    def rank(self, place: Place) -> int:
        """Return who stands there."""
        return (place.pp * self.dp + place.dp) * self.ep + place.ep

    def data_rank(self, rank: int) -> int:
        """Return which share of a batch a rank trains on."""
        return rank % self.data_ranks

    @property
    def world(self) -> Group:
        """All ranks."""
        return self._group("world", range(self.size))

    def experts(self, rank: int) -> Group:
        """Return the ranks that share a layer's experts with this one."""
        first = rank - self.place(rank).ep
        return self._group("experts", range(first, first + self.ep))

    def pair(self, a: int, b: int) -> Group:
        """Return two ranks that pass each other activations."""
        return self._group("pair", (a, b))

    def replicas(self, stage_ranks: Iterable[int], rank: int, of_experts: bool) -> Group:
        """Return who holds the same weights as this rank, and so shares their gradients' sum.

        Args:
            stage_ranks: the pipeline ranks that hold them, this one's among them.
            rank: this one.
            of_experts: whether the weights are a share of the experts.
        """
        columns = [self.place(rank).ep] if of_experts else range(self.ep)
        ranks = [
            self.rank(Place(pp, dp, ep))
            for pp in stage_ranks
            for dp in range(self.dp)
            for ep in columns
        ]
        return self._group("expert weights" if of_experts else "dense weights", ranks)

    def _group(self, kind: str, ranks: Iterable[int]) -> Group:
        members = tuple(sorted(ranks))
        first, last = members[0], members[-1]
        # Two groups of one kind differ in their first or last member.
        key = 1 + (_KINDS.index(kind) * self.size + first) * self.size + last
        return Group(f"{kind} {','.join(map(str, members))}", members, key)
