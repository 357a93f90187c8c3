"""Who may look at whom: causally, among valid keys; held as vectors until a block needs it.

Shape letters: B batch, S queries, L keys.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from ds_attention.cache import causal_mask


class CausalMask(NamedTuple):
    """A causal mask by its parts: a long context never needs all pairs at once.

    Attributes:
        slots: `[B, S]` or `[1, S]` int32: where the queries lie; each sees keys up to its own.
        length: number of keys L.
        valid: `[B, L]`, nonzero where a key is real; all are if `None`.
    """

    slots: tf.Tensor
    length: int | tf.Tensor
    valid: tf.Tensor | None = None

    def dense(self) -> tf.Tensor:
        """Return the boolean mask `[B or 1, S, L]`."""
        return causal_mask(self.slots, self.length, self.valid)

    def queries(self, first: tf.Tensor, end: tf.Tensor) -> CausalMask:
        """Return the mask of queries `first` to `end` over the same keys."""
        return self._replace(slots=self.slots[:, first:end])
