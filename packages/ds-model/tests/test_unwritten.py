"""Variables without values: nothing drawn for those that are written, everything for the rest."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ds_model.checkpoint.unwritten import unwritten


class Counting(keras.initializers.Initializer):
    """Counts how often numbers were drawn, not how often their shape was asked for."""

    def __init__(self):
        self.drawn = tf.Variable(0)

    def __call__(self, shape, dtype=None):
        self.drawn.assign_add(1) if tf.executing_eagerly() else None
        return tf.fill(shape, tf.cast(3, dtype))


class Layer(keras.layers.Layer):
    def __init__(self, *initializers, **kwargs):
        super().__init__(**kwargs)
        self.initializers = initializers

    def build(self, input_shape):
        self.made = [
            self.add_weight(shape=input_shape[1:], initializer=one) for one in self.initializers
        ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_never_drawn(dtype):
    counting = Counting()
    with unwritten() as made:
        layer = Layer(counting, counting, dtype=dtype)
        layer.build((None, 2, 3))
    first, second = layer.made
    assert (first.shape, first.dtype) == ((2, 3), dtype)
    first.assign(np.ones((2, 3)))
    assert counting.drawn.numpy() == 0
    made.draw_all_but([first])
    assert counting.drawn.numpy() == 1
    np.testing.assert_array_equal(first.numpy().astype(float), np.ones((2, 3)))
    np.testing.assert_array_equal(second.numpy().astype(float), np.full((2, 3), 3))


def test_the_rest_is_what_it_would_have_been():
    random = keras.initializers.RandomNormal(seed=3)
    drawn = Layer(random, "ones", "zeros")
    drawn.build((None, 5))
    with unwritten() as made:
        layer = Layer(random, "ones", "zeros")
        layer.build((None, 5))
    made.draw_all_but([])
    for ours, theirs in zip(layer.made, drawn.made, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_an_initializer_that_reads_a_variable_draws_at_once():
    def normal():
        return keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(3))

    drawn = Layer(normal(), normal())
    drawn.build((None, 5))
    with unwritten() as made:
        layer = Layer(normal(), normal())
        layer.build((None, 5))
        for ours, theirs in zip(layer.made, drawn.made, strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    made.draw_all_but(layer.made)


def test_variables_made_later_have_values():
    with unwritten():
        pass
    layer = Layer(Counting())
    layer.build((None, 4))
    np.testing.assert_array_equal(layer.made[0].numpy(), np.full(4, 3))
