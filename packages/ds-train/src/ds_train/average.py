"""The running average of the weights, kept in the host's memory (arXiv 2412.19437, section 3.2.3).

It tells early how the model will be once the learning rate has fallen, and costs a device nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import keras
import tensorflow as tf


class ParameterAverage:
    """Exponential average of weights: after each step `average += (1 - decay) (weight - average)`.

    Args:
        weights: Whose average; it starts as they are.
        decay: How much of the average a step leaves, at least 0 and below 1.

    Attributes:
        weights: As given.
        values: One variable a weight, in the host's memory whatever the weights lie in.
    """

    def __init__(self, weights: Sequence[keras.Variable], decay: float) -> None:
        self.weights = list(weights)
        with tf.device("CPU:0"):
            self.values = [
                keras.Variable(tf.identity(weight), trainable=False, name=f"average_{i}")
                for i, weight in enumerate(self.weights)
            ]
        share = 1.0 - decay

        def update() -> None:
            for weight, value in zip(self.weights, self.values, strict=True):
                now = tf.convert_to_tensor(value)
                value.assign(now + share * (tf.convert_to_tensor(weight) - now))

        self._update = tf.function(update, autograph=False)

    def update(self) -> None:
        """Take note of the weights as they are after a step."""
        with tf.device("CPU:0"):
            self._update()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the weights are their averages."""
        before = [tf.identity(weight) for weight in self.weights]
        for weight, value in zip(self.weights, self.values, strict=True):
            weight.assign(value)
        try:
            yield
        finally:
            for weight, value in zip(self.weights, before, strict=True):
                weight.assign(value)
