"""The few collective operations that training needs, with gradients, in one fixed order.

These are TensorFlow's own `CollectiveV2` operations; rendezvous, transport, heartbeats and abort
are its runtime's. What is added here: group and instance keys, gradients (none are registered, and
so each is a `tf.custom_gradient`), and the order.

**Order.** All collectives of one rank take one ordering token, so that TensorFlow's automatic
control dependencies run them one after the other, in the order in which they were traced. NCCL
needs the same order on all members of a group; on CPUs any would do, and the same program runs
there, so a wrong order shows as a hang in a test. `Engine.record` tells the order; that NCCL itself
runs it nobody has seen yet.

**Keys.** An instance key names one operation of a group, with one shape for as long as the process
lives. They are counted up as operations are traced, which all members do alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from ds_train.parallel.mesh import Group

_SIZES = 32  # keys of an exchange whose size is a power of two that is known when it runs


class Traced(NamedTuple):
    """One collective as it was traced.

    Attributes:
        operation: of TensorFlow.
        group: its name.
        instance: its first key.
    """

    operation: str
    group: str
    instance: int


class Engine:
    """What the groups of one rank share. To be made once TensorFlow's runtime is up.

    Args:
        timeout: seconds after which an operation that waits for a peer gives up.

    Attributes:
        record: all collectives in the order in which they were traced.
        timeout: as given.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        self.timeout = timeout
        self.record: list[Traced] = []
        self._next: dict[int, int] = {}
        # Not made when a step is traced: a function that makes a variable is traced twice.
        self._token = tf.Variable(0.0, trainable=False, name="collective_order")

    @property
    def token(self) -> tf.Tensor:
        """The resource that orders this rank's collectives."""
        return self._token.handle

    def instance(self, operation: str, group: Group, keys: int = 1) -> int:
        """Return the first of so many new instance keys."""
        found = self._next.get(group.key, 0)
        self._next[group.key] = found + keys
        self.record.append(Traced(operation, group.name, found))
        return found


class Ranks:
    """One group as its members use it. Alone in it, a rank exchanges nothing.

    Args:
        group: who.
        rank: this member.
        engine: this rank's.

    Attributes:
        size: members.
        index: which of them this is.
    """

    def __init__(self, group: Group, rank: int, engine: Engine) -> None:
        self.group = group
        self.size = len(group.ranks)
        self.index = group.ranks.index(rank)
        self._engine = engine

    def all_reduce(self, x: tf.Tensor) -> tf.Tensor:
        """Return the sum over members, of the shape of `x`. No gradient: it is for gradients."""
        if self.size == 1:
            return x
        return tf.ensure_shape(
            tf.raw_ops.CollectiveReduceV2(
                input=x,
                merge_op="Add",
                final_op="Id",
                **self._options("CollectiveReduceV2"),
            ),
            x.shape,
        )

    def all_gather(self, x: tf.Tensor) -> tf.Tensor:
        """Return the members' `x [n, ...]` one below the other, `[size * n, ...]`. No gradient."""
        if self.size == 1:
            return x
        y = tf.raw_ops.CollectiveGatherV2(input=x, **self._options("CollectiveGatherV2"))
        rows = None if x.shape[0] is None else self.size * x.shape[0]
        return tf.ensure_shape(y, [rows, *x.shape[1:]])

    def reduce_scatter(self, x: tf.Tensor) -> tf.Tensor:
        """Return this member's share `[n]` of the sum over members of `x [size * n]`. No gradient.

        As an all-to-all and a sum: TensorFlow's own has no form for CPUs.
        """
        if self.size == 1:
            return x
        parts = tf.reshape(x, [self.size, -1])
        return tf.reduce_sum(self._exchange(parts, tf.constant(0)), axis=0)

    def all_to_all(self, x: tf.Tensor, power: tf.Tensor | int = 0) -> tf.Tensor:
        """Give row i of `x` to member i; return what the members gave this one.

        Args:
            x: `[size, ...]`. All members' have one shape; it may differ from call to call if
                `power` does.
            power: a scalar from 0 to 31, the same on all members, different for each shape.

        Returns:
            `[size, ...]`: row i is of member i.
        """
        if self.size == 1:
            return x
        power = tf.convert_to_tensor(power)

        @tf.custom_gradient
        def exchange(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            return self._exchange(x, power), lambda dy: self._exchange(dy, power)

        return exchange(x)

    def swap(self, x: tf.Tensor) -> tf.Tensor:
        """Give `x`, of any shape, to the other of two members; return what it gave, of the same.

        No gradient. An all-to-all of the pair: TensorFlow's broadcasts, the other way to send from
        one to one, take no ordering token.
        """
        if self.size != 2:
            raise ValueError(f"{self.group.name} has {self.size} members; only two can swap")
        rows = [tf.zeros_like(x), x] if self.index == 0 else [x, tf.zeros_like(x)]
        return self._exchange(tf.stack(rows), tf.constant(0))[1 - self.index]

    def _exchange(self, x: tf.Tensor, power: tf.Tensor) -> tf.Tensor:
        options = self._options("CollectiveAllToAllV2", _SIZES)
        options["instance_key"] += tf.cast(power, tf.int32)
        return tf.ensure_shape(tf.raw_ops.CollectiveAllToAllV2(input=x, **options), x.shape)

    def _options(self, operation: str, keys: int = 1) -> dict[str, object]:
        return {
            "group_size": self.size,
            "group_key": self.group.key,
            "instance_key": self._engine.instance(operation, self.group, keys),
            "ordering_token": [self._engine.token],
            "communication_hint": "auto",
            "timeout_seconds": self._engine.timeout,
        }
