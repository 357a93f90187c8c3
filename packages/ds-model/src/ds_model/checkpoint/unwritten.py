"""A model without values, for someone who is about to write them all.

Drawing random weights takes longer than reading a checkpoint. Keras has no model without
weights, but TensorFlow asks a creator for each variable; this one hands out memory that
nobody has touched, which costs nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

Initial = Callable[[], tf.Tensor]


class Unwritten:
    """The variables that were made without values, and how each would have been drawn."""

    def __init__(self) -> None:
        self._initial_of: list[tuple[tf.Variable, Initial]] = []

    def create(self, next_creator: Callable[..., tf.Variable], **options: Any) -> tf.Variable:
        """Make one variable: what `tf.variable_creator_scope` calls."""
        initial, dtype = options["initial_value"], tf.as_dtype(options["dtype"])
        # Integers are states, of seed generators say, which others may read at once.
        shape = _shape(initial) if callable(initial) and dtype.is_floating else None
        if shape is None:
            return next_creator(**options)
        options["initial_value"] = lambda: tf.raw_ops.Empty(shape=shape, dtype=dtype, init=False)
        variable = next_creator(**options)
        self._initial_of.append((variable, initial))
        return variable

    def draw_all_but(self, written: Iterable[keras.Variable]) -> None:
        """Give every variable the value that it would have had, but those in `written`."""
        known = {id(variable.value) for variable in written}
        for variable, initial in self._initial_of:
            if id(variable) not in known:
                variable.assign(initial())


@contextmanager
def unwritten() -> Iterator[Unwritten]:
    """Within it, Keras makes weights of undefined value; the caller writes or draws them all."""
    made = Unwritten()
    with tf.variable_creator_scope(made.create):
        yield made


def _shape(initial: Initial) -> tf.TensorShape | None:
    """The shape of what `initial` would draw, or `None` if that takes drawing it."""
    try:
        with tf.Graph().as_default():  # names the operations, and runs none
            return initial().shape
    except RuntimeError:  # it reads a variable, as an initializer with a seed generator does
        return None
