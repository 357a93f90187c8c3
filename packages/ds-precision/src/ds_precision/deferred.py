"""The backward pass in two halves: inputs' gradients at once, weights' gradients later.

Whoever waits for a gradient waits for that of an input; those of weights are needed at the end of a
step alone. Pipelines that put them off are idle less (arXiv 2401.10241; "backward for weights" in
arXiv 2412.19437, section 3.2.1).

Within `defer_weight_gradients` the products of weights are traced so that their backward pass hands
what a weight's gradient takes to a `WeightGradients`, instead of computing it. To the tape such a
weight then has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import keras
import tensorflow as tf


class _Waiting(NamedTuple):
    weights: tuple[keras.Variable, ...]
    operands: list[tf.Tensor]
    compute: Callable[..., Sequence[tf.Tensor]]


class WeightGradients:
    """Weights' gradients that wait to be computed."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []

    def put(
        self,
        weight: keras.Variable,
        operands: list[tf.Tensor],
        compute: Callable[..., tf.Tensor],
    ) -> None:
        """Leave what a gradient is made of.

        Args:
            weight: whose gradient.
            operands: tensors of any shapes.
            compute: makes the gradient, in the weight's shape, of such tensors.
        """
        self.put_together((weight,), operands, lambda *given: (compute(*given),))

    def put_together(
        self,
        weights: Sequence[keras.Variable],
        operands: list[tf.Tensor],
        compute: Callable[..., Sequence[tf.Tensor]],
    ) -> None:
        """Leave what the gradients of several weights are made of, by one computation.

        Args:
            weights: whose gradients.
            operands: tensors of any shapes.
            compute: makes the gradients, each in its weight's shape, of such tensors.
        """
        self._waiting.append(_Waiting(tuple(weights), operands, compute))

    def compute(self) -> list[tuple[keras.Variable, tf.Tensor]]:
        """Compute all that wait, each once; a weight that was used twice is there twice.

        Each gradient has the shape of its weight, and its type. Operations are made where this is
        called: under its control dependencies, say.
        """
        waiting, self._waiting = self._waiting, []
        found = []
        for weights, operands, compute in waiting:
            # An identity is made here, and so waits for what this call waits for.
            gradients = compute(*map(tf.identity, operands))
            for weight, gradient in zip(weights, gradients, strict=True):
                found.append((weight, tf.cast(gradient, weight.dtype)))
        return found


_OPEN: list[WeightGradients] = []


@contextmanager
def defer_weight_gradients(into: WeightGradients) -> Iterator[None]:
    """Trace a forward pass whose weights' gradients will go there."""
    _OPEN.append(into)
    try:
        yield
    finally:
        _OPEN.pop()


def deferred_weight_gradients() -> WeightGradients | None:
    """Return where weights' gradients go that are traced now; `None` if they are computed."""
    return _OPEN[-1] if _OPEN else None
