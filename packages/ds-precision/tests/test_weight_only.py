import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_precision import Linear, matmul, quantize_int8
from ds_precision.kernels import kernels


@settings(deadline=None, max_examples=25)
@given(blocks=st.integers(1, 3), columns=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_rounding_is_within_half_a_step_of_its_blocks_scale(blocks, columns, seed):
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(2, 32 * blocks, columns)) * 10.0 ** rng.integers(-6, 6)).astype("f4")
    found = quantize_int8(w)

    largest = np.abs(w.reshape(2, blocks, 32, columns)).max(axis=2)
    np.testing.assert_allclose(found.scales, largest / 127, rtol=1e-6)
    step = np.repeat(largest / 127, 32, axis=1)
    assert (np.abs(found.dequantize() - w) <= 0.5001 * step).all()


def test_zeros_stay_zeros():
    assert not np.any(quantize_int8(tf.zeros([32, 4])).dequantize())


def test_rows_that_make_no_whole_block_are_named():
    with pytest.raises(ValueError, match="weights have 17 rows; 8-bit weights need a multiple of"):
        quantize_int8(tf.ones([17, 2]))


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_a_quantized_linear_multiplies_by_the_rounded_kernel(setting, monkeypatch):
    layer = Linear(40)
    layer.build((None, 64))
    rounded = quantize_int8(layer.kernel).dequantize()
    x = tf.random.stateless_normal([3, 5, 64], seed=[1, 2])
    layer.quantize("int8")
    layer.quantize("int8")  # a second time changes nothing
    monkeypatch.setenv("DS_PRECISION_KERNELS", setting)
    kernels.cache_clear()
    y = layer(x)
    kernels.cache_clear()

    np.testing.assert_allclose(y, tf.einsum("bsi,io->bso", x, rounded), rtol=1e-5, atol=1e-6)
    assert [w.name for w in layer.weights] == ["kernel_values", "kernel_scales"]
    assert not layer.trainable_weights


def test_a_mode_that_is_not_there_is_named():
    layer = Linear(4)
    layer.build((None, 32))
    with pytest.raises(ValueError, match="mode is 'int4'; it must be 'int8'"):
        layer.quantize("int4")


def test_products_of_8_bit_weights_equal_those_of_what_they_stand_for():
    rng = np.random.default_rng(3)
    w, x = (
        quantize_int8(rng.normal(size=(64, 33))),
        tf.constant(rng.normal(size=(9, 64)), "float32"),
    )

    np.testing.assert_allclose(matmul(x, w), x @ w.dequantize(), rtol=1e-5, atol=1e-5)
