"""Small weights: what is rounded, by how much, and that products are those of what they mean."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_precision import MODES, Linear, QuantizedWeights, fused_experts, matmul, quantize_weights
from ds_precision.kernels import kernels

WHOLE = ("int8", "int8_channel", "int4")


def drawn(seed, *shape):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10.0 ** rng.integers(-6, 6)).astype("f4")


def bits(found):
    parts = [tf.convert_to_tensor(part) for part in found]
    return sum(8 * tf.size(part).numpy() * part.dtype.size for part in parts)


@settings(deadline=None, max_examples=25)
@given(
    blocks=st.integers(1, 3),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    mode=st.sampled_from(["int8", "int8_channel"]),
)
def test_8_bits_are_within_half_a_step_of_their_scale(blocks, columns, seed, mode):
    w = drawn(seed, 2, 32 * blocks, columns)
    found = quantize_weights(w, mode)

    groups = w.reshape(2, blocks if mode == "int8" else 1, -1, columns)
    exact = np.abs(groups).max(axis=2) / 127
    scales = np.asarray(found.scales, "f4")
    assert found.scales.dtype == tf.bfloat16
    assert (np.abs(scales - exact) <= exact * 2**-8).all()  # the nearest bfloat16
    step = np.repeat(scales, groups.shape[2], axis=1)
    assert (np.abs(found.dequantize() - w) <= 0.5001 * step).all()


@settings(deadline=None, max_examples=25)
@given(blocks=st.integers(1, 3), columns=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_4_bits_are_never_worse_than_scaling_to_the_largest_number(blocks, columns, seed):
    """The scale that makes the largest magnitude -8 is one of those that are tried."""
    w = drawn(seed, 32 * blocks, columns)
    found = quantize_weights(w, "int4")

    groups = w.reshape(blocks, 32, columns)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    scale = np.asarray(tf.cast(tf.cast(largest / -8, tf.bfloat16), tf.float32))
    plain = np.clip(np.round(groups / scale), -8, 7) * scale
    worst = ((plain - groups) ** 2).sum(axis=1)
    error = ((found.dequantize().numpy().reshape(groups.shape) - groups) ** 2).sum(axis=1)
    assert (error <= worst * (1 + 1e-5)).all()


def test_two_rows_share_a_byte_and_the_even_one_is_low():
    w = np.zeros((32, 2), "f4")
    w[0], w[1], w[2] = [-8, 7], [3, -8], [1, -4]
    found = quantize_weights(w, "int4")

    # The largest magnitude, -8, takes scale 1 in both columns; 8 stands for 0.
    np.testing.assert_array_equal(np.asarray(found.scales, "f4"), [[1, 1]])
    np.testing.assert_array_equal(found.values[:2], [[0 + 16 * 11, 15], [9 + 16 * 8, 4 + 16 * 8]])
    np.testing.assert_array_equal(found.dequantize(), w)


@pytest.mark.parametrize(
    ("mode", "expected"), [("int8", 8.5), ("int8_channel", 8.0625), ("int4", 4.5), ("fp8", 8.00195)]
)
def test_bits_a_weight_are_those_of_the_table(mode, expected):
    assert bits(quantize_weights(drawn(0, 256, 128), mode)) / (256 * 128) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("mode", MODES)
def test_zeros_stay_zeros(mode):
    assert not np.any(quantize_weights(tf.zeros([32, 4]), mode).dequantize())


@pytest.mark.parametrize("mode", MODES)
def test_a_stack_is_its_matrices(mode):
    w = drawn(1, 3, 64, 40)
    stack = quantize_weights(w, mode)
    for place, matrix in enumerate(w):
        np.testing.assert_array_equal(
            stack.dequantize()[place], quantize_weights(matrix, mode).dequantize()
        )


@pytest.mark.parametrize("mode", WHOLE)
def test_rows_that_make_no_whole_block_are_named(mode):
    with pytest.raises(ValueError, match=f"weights have 17 rows; mode '{mode}' needs a multiple"):
        quantize_weights(tf.ones([17, 2]), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(mode, bad):
    with pytest.raises(ValueError, match="not finite"):
        quantize_weights(tf.concat([tf.ones([31, 2]), [[1, bad]]], axis=0), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", ["on", "off"])
def test_a_quantized_linear_multiplies_by_the_rounded_kernel(mode, setting, monkeypatch):
    layer = Linear(40)
    layer.build((None, 64))
    rounded = quantize_weights(layer.kernel, mode).dequantize()
    x = tf.random.stateless_normal([3, 5, 64], seed=[1, 2])
    layer.quantize(mode)
    layer.quantize(mode)  # a second time changes nothing
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
    with pytest.raises(ValueError, match="mode is 'int3'; it must be one of int8, int8_channel,"):
        layer.quantize("int3")


@settings(deadline=None, max_examples=60)
@given(
    mode=st.sampled_from(MODES),
    tokens=st.integers(1, 40),
    blocks=st.integers(1, 9),
    columns=st.integers(1, 300),
    ragged=st.integers(0, 31),
    dtype=st.sampled_from([tf.float32, tf.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_products_are_those_of_what_the_weights_mean(
    mode, tokens, blocks, columns, ragged, dtype, seed
):
    rng = np.random.default_rng(seed)
    rows = 32 * blocks - (ragged if mode == "fp8" else 0)
    w = quantize_weights(rng.normal(size=(rows, columns)), mode)
    x = tf.cast(rng.normal(size=(tokens, rows)), dtype)

    expected = tf.cast(x, tf.float32) @ w.dequantize()
    tolerance = 1e-5 if dtype == tf.float32 else 1e-2
    np.testing.assert_allclose(
        tf.cast(matmul(x, w), tf.float32),
        expected,
        rtol=tolerance,
        atol=tolerance * np.abs(expected).max(),
    )


@settings(deadline=None, max_examples=40)
@given(
    mode=st.sampled_from(MODES),
    tokens=st.integers(1, 70),
    inner=st.integers(1, 3),
    narrower=st.integers(0, 31),
    dtype=st.sampled_from([tf.float32, tf.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_experts_are_those_of_what_the_weights_mean(mode, tokens, inner, narrower, dtype, seed):
    """Also where gate and up meet within a block of E4M3, and within sixteen columns."""
    rng = np.random.default_rng(seed)
    width = 32 * inner - (narrower if mode == "fp8" else 0)
    up = quantize_weights(rng.normal(size=(4, 96, 2 * width)), mode)
    down = quantize_weights(rng.normal(size=(4, width, 96)), mode)
    x = tf.cast(rng.normal(size=(tokens, 96)), dtype)
    indices = tf.constant(rng.integers(0, 4, (tokens, 2)), tf.int32)
    gates = tf.constant(rng.uniform(size=(tokens, 2)), tf.float32)

    y = tf.cast(fused_experts(x, indices, gates, up, down), tf.float32)
    wide = (tf.cast(x, tf.float32), indices, gates, up.dequantize(), down.dequantize())
    expected = fused_experts(*wide)
    tolerance = 1e-5 if dtype == tf.float32 else 3e-2
    assert np.abs(y - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.skipif(kernels() is None, reason="no compiled operations here")
@pytest.mark.parametrize(
    ("values", "scales", "said"),
    [
        (tf.zeros([32, 4], tf.int8), tf.zeros([1, 4]), "need bfloat16 scales"),
        (tf.zeros([32, 4], tf.int8), tf.zeros([2, 4], tf.bfloat16), "a multiple of 32"),
        (tf.zeros([16, 4], tf.uint8), tf.zeros([1, 3], tf.bfloat16), "for each column"),
        (
            tf.cast(tf.zeros([32, 4]), tf.dtypes.experimental.float8_e4m3fn),
            tf.zeros([2, 1]),
            "for each block of 128 by 128",
        ),
    ],
)
def test_scales_that_do_not_fit_are_named(values, scales, said):
    with pytest.raises(tf.errors.InvalidArgumentError, match=said):
        matmul(tf.ones([1, 32]), QuantizedWeights(values, scales))
