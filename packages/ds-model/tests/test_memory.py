"""Arrays become tensors on the same memory, whatever their dtype, and never by accident."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from ds_model.checkpoint.memory import aligned, as_tensor

every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])


@every_dtype
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 11), (0, 4)])
def test_a_tensor_holds_the_array(shape, dtype):
    array = aligned(shape, np.dtype(dtype))
    array[...] = np.arange(array.size).reshape(shape)
    tensor = as_tensor(array)
    assert tensor.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(tensor.numpy(), array)


@every_dtype
def test_a_variable_takes_the_memory_over(dtype):
    array = aligned((4, 4), np.dtype(dtype))
    array[...] = 1
    variable = tf.Variable(tf.zeros([4, 4], dtype))
    variable.assign(as_tensor(array))
    array[2, 3] = 7  # no copy was made, so the variable sees it
    assert variable.numpy()[2, 3] == 7


def test_a_variable_on_such_memory_is_updated_in_place_of_no_other():
    array = aligned((3, 3), np.dtype(np.float32))
    array[...] = 1
    tensor = as_tensor(array)
    one, two = tf.Variable(tensor), tf.Variable(tensor)
    one.assign_add(tf.ones([3, 3]))
    np.testing.assert_array_equal(one.numpy(), np.full((3, 3), 2))
    np.testing.assert_array_equal(two.numpy(), np.ones((3, 3)))


def test_the_memory_outlives_the_array():
    def made():
        array = aligned((1000, 1000), np.dtype(np.float32))
        array[...] = np.arange(1000)
        return as_tensor(array)

    tensors = [made() for _ in range(4)]
    for tensor in tensors:
        np.testing.assert_array_equal(tensor.numpy(), np.tile(np.arange(1000), (1000, 1)))


@every_dtype
def test_an_array_from_elsewhere_is_copied(dtype):
    raw = aligned((9,), np.dtype(dtype))
    raw[...] = np.arange(9)
    array = raw[1:]  # TensorFlow would abort on this address
    tensor = as_tensor(array)
    array[0] = 5
    np.testing.assert_array_equal(tensor.numpy(), np.arange(1, 9))
