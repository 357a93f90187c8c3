"""The end of a step: gradients summed over who holds the same weights, then AdamW.

Two ways. `WholeUpdate`: every holder has both moments of all its weights. `ShardedUpdate`, ZeRO-1
(arXiv 1910.02054): of N holders each has the moments of one N-th, updates that, and they exchange
what is new. Both give the same numbers.

Weights with the same holders are one flat row, so that there is one exchange for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
import tensorflow as tf

from ds_train.checkpoint import Piece, weight_name
from ds_train.optimizer import AdamW
from ds_train.parallel.collectives import Ranks
from ds_train.parallel.layout import Layout, is_expert
from ds_train.parallel.world import World
from ds_train.step import square_sum


@dataclass(frozen=True)
class _Row:
    """Weights that the same ranks hold, one after the other.

    Attributes:
        ranks: the holders.
        weights: the weights.
        at: the place of each in the list of all weights of this rank.
    """

    ranks: Ranks
    weights: tuple[keras.Variable, ...]
    at: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """Numbers in each."""
        return [prod(weight.shape) for weight in self.weights]

    @property
    def padded(self) -> int:
        """Numbers in all, made a multiple of the holders."""
        return -(-sum(self.sizes) // self.ranks.size) * self.ranks.size

    def flat(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """Put one tensor a weight side by side, `[padded]`."""
        parts = [tf.reshape(tensor, [-1]) for tensor in tensors]
        if missing := self.padded - sum(self.sizes):
            parts.append(tf.zeros([missing], parts[0].dtype))
        return tf.concat(parts, axis=0)

    def apart(self, flat: tf.Tensor) -> list[tf.Tensor]:
        """Undo `flat`."""
        parts = tf.split(flat[: sum(self.sizes)], self.sizes)
        return [
            tf.reshape(part, weight.shape) for part, weight in zip(parts, self.weights, strict=True)
        ]


class Update(ABC):
    """Gradients in, new weights out.

    Args:
        weights: all that this rank trains.
        optimizer: not built yet.
        layout: who holds what.
        world: this rank's.

    Attributes:
        optimizer: as given.
    """

    def __init__(
        self,
        weights: Sequence[keras.Variable],
        optimizer: AdamW,
        layout: Layout,
        world: World,
    ) -> None:
        self.optimizer = optimizer
        self._weights = list(weights)
        self._layout = layout
        self._world = world

    @abstractmethod
    def reduce(self, gradients: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Sum gradients over holders.

        Args:
            gradients: one a weight, of this rank's tokens.

        Returns:
            What `apply` takes, and this rank's share of the square sum over all weights of all
            ranks, float32.
        """

    @abstractmethod
    def apply(self, reduced: Sequence[tf.Tensor], scale: tf.Tensor) -> None:
        """Do the update with gradients times `scale`; exchanges nothing."""

    @abstractmethod
    def share(self) -> None:
        """Give the others what is new here, and take what is new there."""

    @abstractmethod
    def moments(self) -> list[Piece]:
        """Return this rank's moments as pieces of the whole model's."""

    def weights(self, variables: Sequence[keras.Variable]) -> list[Piece]:
        """Return variables of this rank's part as pieces of the whole model's."""
        return [self._piece(weight_name(variable), variable, variable) for variable in variables]

    def averages(self, values: Sequence[keras.Variable]) -> list[Piece]:
        """Return the averages of this rank's weights as pieces of the whole model's."""
        return [
            self._piece(f"average/{weight_name(weight)}", value, weight)
            for weight, value in zip(self._weights, values, strict=False)
        ]

    def writes(self, piece: Piece) -> bool:
        """Say whether this rank, of those that have the same numbers, is the one to save them."""
        name = piece.name
        for kind in ("momentum/", "velocity/", "average/"):
            name = name.removeprefix(kind)
        return self._layout.replicas(name, self._world.rank).ranks[0] == self._world.rank

    @abstractmethod
    def refresh(self) -> None:
        """Take note that weights were changed from outside."""

    def _rows(self, apart: bool) -> list[_Row]:
        """Sort weights into rows; `apart` keeps matrices, which decay, from the rest."""
        found: dict[tuple[int, bool], tuple[Ranks, list[int]]] = {}
        for i, weight in enumerate(self._weights):
            group = self._layout.replicas(weight_name(weight), self._world.rank)
            key = (group.key, apart and len(weight.shape) > 1)
            found.setdefault(key, (self._world.ranks(group), []))[1].append(i)
        # By key: one order of groups on all ranks.
        return [
            _Row(ranks, tuple(self._weights[i] for i in at), tuple(at))
            for _, (ranks, at) in sorted(found.items(), key=lambda entry: entry[0])
        ]

    def _piece(
        self,
        name: str,
        variable: keras.Variable,
        weight: keras.Variable,
        start: int = 0,
        cut: slice | None = None,
    ) -> Piece:
        """Say which numbers of the whole model a variable has.

        Args:
            name: of the tensor in the whole model.
            variable: has the numbers.
            weight: the tensor's shape on this rank is that of this weight.
            start: of the numbers, in this rank's tensor.
            cut: which of the variable's numbers.
        """
        whole, place = tuple(weight.shape), self._world.place
        if is_expert(weight_name(weight)):
            start += place.ep * prod(whole)
            whole = (whole[0] * self._layout.mesh.ep, *whole[1:])
        return Piece(name, variable, start, cut, whole)


class WholeUpdate(Update):
    """All moments at every holder."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sums = self._rows(apart=False)
        self.optimizer.build(self._weights)

    def reduce(self, gradients: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Sum gradients over holders; see `Update`."""
        found = list(gradients)
        squares = []
        for row in self._sums:
            mine = [gradients[i] for i in row.at]
            if row.ranks.size > 1:
                mine = row.apart(row.ranks.all_reduce(row.flat(mine)))
            squares.append(square_sum(mine) / row.ranks.size)
            for i, gradient in zip(row.at, mine, strict=True):
                found[i] = gradient
        return found, tf.add_n(squares)

    def apply(self, reduced: Sequence[tf.Tensor], scale: tf.Tensor) -> None:
        """Do the update; see `Update`."""
        self.optimizer.apply(reduced, self._weights, scale=scale)

    def share(self) -> None:
        """Do nothing: every holder has updated the same."""

    def refresh(self) -> None:
        """Do nothing: nothing else holds the weights' numbers."""

    def moments(self) -> list[Piece]:
        """Return the moments of all weights here."""
        both = {"momentum": self.optimizer.momentums, "velocity": self.optimizer.velocities}
        return [
            self._piece(f"{kind}/{weight_name(weight)}", moment, weight)
            for kind, moments in both.items()
            for weight, moment in zip(self._weights, moments, strict=True)
        ]


class ShardedUpdate(Update):
    """Moments of one share of each row. A row that one rank holds alone is updated where it is."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        rows = self._rows(apart=True)
        self._shared = [row for row in rows if row.ranks.size > 1]
        self._own = sorted(i for row in rows if row.ranks.size == 1 for i in row.at)
        self._shards = [
            keras.Variable(self._mine(row), name=f"shard_{i}") for i, row in enumerate(self._shared)
        ]
        self._updated = [*self._shards, *(self._weights[i] for i in self._own)]
        self.optimizer.build(self._updated)

    def reduce(self, gradients: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Sum gradients over holders, each its share; see `Update`."""
        found = []
        for row in self._shared:
            mine = row.ranks.reduce_scatter(row.flat([gradients[i] for i in row.at]))
            found.append(self._shaped(row, mine))
        found += [gradients[i] for i in self._own]
        return found, square_sum(found)

    def apply(self, reduced: Sequence[tf.Tensor], scale: tf.Tensor) -> None:
        """Update this rank's share; see `Update`."""
        self.optimizer.apply(reduced, self._updated, scale=scale)

    def share(self) -> None:
        """Exchange the shares; see `Update`."""
        for row, shard in zip(self._shared, self._shards, strict=True):
            whole = row.ranks.all_gather(tf.reshape(tf.convert_to_tensor(shard), [-1]))
            for weight, value in zip(row.weights, row.apart(whole), strict=True):
                weight.assign(value)

    def refresh(self) -> None:
        """Take the shares from the weights again."""
        for row, shard in zip(self._shared, self._shards, strict=True):
            shard.assign(self._mine(row))

    def moments(self) -> list[Piece]:
        """Return the moments of this rank's shares, cut at the weights' ends."""
        found = []
        both = {"momentum": self.optimizer.momentums, "velocity": self.optimizer.velocities}
        for kind, moments in both.items():
            for row, moment in zip(self._shared, moments, strict=False):
                found += self._cut(kind, row, moment)
            for i, moment in zip(self._own, moments[len(self._shared) :], strict=True):
                weight = self._weights[i]
                found.append(self._piece(f"{kind}/{weight_name(weight)}", moment, weight))
        return found

    def writes(self, piece: Piece) -> bool:
        """Say whether this rank saves a piece: moments are nobody else's; see `Update`."""
        return piece.name.startswith(("momentum/", "velocity/")) or super().writes(piece)

    def _cut(self, kind: str, row: _Row, moment: keras.Variable) -> list[Piece]:
        share = row.padded // row.ranks.size
        first, at, found = share * row.ranks.index, 0, []
        for weight, size in zip(row.weights, row.sizes, strict=True):
            low, high = max(first, at), min(first + share, at + size)
            if low < high:
                cut = slice(low - first, high - first)
                name = f"{kind}/{weight_name(weight)}"
                found.append(self._piece(name, moment, weight, low - at, cut))
            at += size
        return found

    def _mine(self, row: _Row) -> tf.Tensor:
        flat = row.flat([tf.convert_to_tensor(weight) for weight in row.weights])
        share = row.padded // row.ranks.size
        return self._shaped(row, flat[share * row.ranks.index :][:share])

    def _shaped(self, row: _Row, share: tf.Tensor) -> tf.Tensor:
        """Make it a matrix of one row where the weights are matrices: AdamW decays those."""
        return share[None] if len(row.weights[0].shape) > 1 else share
