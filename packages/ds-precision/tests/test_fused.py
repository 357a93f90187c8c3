"""The one-pass operations against stock TensorFlow's, in value and gradient, at ragged sizes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tensorflow as tf

from ds_precision import (
    fused_adamw,
    fused_cross_entropy,
    fused_rms_norm,
    fused_square_sum,
)

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None, reason="no C++ compiler here: stock operations run alone"
)
TYPES = [tf.float32, tf.bfloat16]
TOLERANCE = {tf.float32: 2e-6, tf.bfloat16: 2**-8}  # bfloat16: half a last place, twice


def normal(seed: int, *shape: int, dtype: tf.DType = tf.float32) -> tf.Tensor:
    return tf.cast(tf.random.stateless_normal(shape, [seed, 0]), dtype)


def wide(tensor: tf.Tensor) -> np.ndarray:
    return tf.cast(tensor, tf.float64).numpy()


def assert_same(found: tf.Tensor, expected: tf.Tensor, dtype: tf.DType) -> None:
    expected = wide(expected)
    size = np.abs(expected).max()
    np.testing.assert_allclose(wide(found), expected, rtol=0, atol=TOLERANCE[dtype] * size)


def value_and_gradients(function, *inputs: tf.Tensor) -> list[tf.Tensor]:
    """Return `function`'s value and the gradients of its product with fixed numbers."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = function(*inputs)
        total = tf.reduce_sum(tf.cast(y, tf.float64) * normal(99, *y.shape, dtype=tf.float64))
    return [y, *tape.gradient(total, inputs)]


def exactly(function, dtype: tf.DType):
    """Return `function` computed in float64 and rounded once."""

    def found(*inputs: tf.Tensor) -> tf.Tensor:
        return tf.cast(function(*(tf.cast(x, tf.float64) for x in inputs)), dtype)

    return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(3, 5, 32), (200, 17), (1, 7), (130, 48)])
def test_rms_norm(shape: tuple[int, ...], dtype: tf.DType) -> None:
    def norm(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        return x * tf.math.rsqrt(tf.reduce_mean(x * x, -1, keepdims=True) + 0.25) * weight

    x, weight = normal(0, *shape, dtype=dtype), normal(1, shape[-1])
    found = value_and_gradients(lambda x, w: fused_rms_norm(x, w, 0.25), x, weight)
    expected = value_and_gradients(exactly(norm, dtype), x, weight)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert_same(one, other, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "classes"), [(5, 3), (130, 33), (2, 4096)])
def test_cross_entropy(rows: int, classes: int, dtype: tf.DType) -> None:
    labels = np.random.default_rng(0).integers(0, classes, rows).astype(np.int32)
    logits = normal(0, rows, classes, dtype=dtype) * 20 + 300

    def loss(x: tf.Tensor) -> tf.Tensor:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, x)

    found = value_and_gradients(lambda x: fused_cross_entropy(x, tf.constant(labels)), logits)
    expected = value_and_gradients(exactly(loss, tf.float32), logits)
    assert_same(found[0], expected[0], tf.float32)
    assert found[1].dtype == dtype
    # Logits of 400: float32 holds their differences to 3e-5.
    np.testing.assert_allclose(
        wide(found[1]), wide(expected[1]), atol=5e-4 if dtype == tf.float32 else 2e-2
    )


def test_unlikely_classes_cost_what_they_should() -> None:
    logits = tf.constant([[0.0, -1000.0, 500.0], [-3e38, 3e38, 0.0]])
    np.testing.assert_allclose(fused_cross_entropy(logits, tf.constant([1, 1])), [1500.0, 0.0])


def test_a_label_out_of_range_is_named() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels hold 4; .* from 0 to 3"):
        fused_cross_entropy(tf.zeros([2, 4]), tf.constant([0, 4]))


def test_square_sum_of_many_tensors() -> None:
    tensors = [normal(i, *shape) for i, shape in enumerate([(3,), (70, 1000), (5, 0), (1, 33, 9)])]
    expected = sum(float(tf.reduce_sum(tf.cast(t, tf.float64) ** 2)) for t in tensors)
    assert float(fused_square_sum(tensors)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(), (7,), (3, 11), (40, 1000)])
def test_adamw(shape: tuple[int, ...]) -> None:
    variable, momentum, gradient = (normal(i, *shape) for i in range(3))
    velocity = tf.square(normal(3, *shape))
    before = [wide(t) for t in (variable, momentum, velocity, gradient)]
    found = fused_adamw(
        variable, momentum, velocity, gradient, tf.constant([0.5, 0.01, 1e-3, 0.02, 0.9, 0.95])
    )
    p, m, v, g = before
    m = 0.9 * m + 0.1 * (0.5 * g)
    v = 0.95 * v + 0.05 * (0.5 * g) ** 2
    p = p - 0.02 * p - 0.01 * m / (np.sqrt(v) + 1e-3)
    for one, other in zip(found, (p, m, v), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    # Tensors that somebody still holds stay as they were.
    for tensor, old in zip((variable, momentum, velocity, gradient), before, strict=True):
        np.testing.assert_array_equal(wide(tensor), old)


def test_adamw_leaves_a_gradient_that_is_read_later() -> None:
    @tf.function(autograph=False)
    def step(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        gradient = x * 2.0
        found = fused_adamw(x, x, tf.square(x), gradient, tf.fill([6], 0.5))
        with tf.control_dependencies(list(found)):
            return tf.identity(gradient), found.variable

    x = normal(0, 300)
    gradient, new = step(x)
    np.testing.assert_array_equal(gradient, x * 2.0)
    assert not np.allclose(new, x)


def test_adamw_names_sizes_that_differ() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="differ in size"):
        fused_adamw(tf.zeros([4]), tf.zeros([4]), tf.zeros([4]), tf.zeros([5]), tf.zeros([6]))
