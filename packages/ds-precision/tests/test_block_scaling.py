"""Block scaling against loops over blocks in NumPy with ml_dtypes, and worked figures."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_precision import E4M3, E5M2, BlockScaled, block_scaling, dequantize_blocks, quantize_blocks

REFERENCE = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}
E4M3_BYTES = ml_dtypes.float8_e4m3fn


def quantize_by_loops(x, block, fmt):
    """``act_quant`` of DeepSeek's inference code, one block after the other."""
    rows, columns = x.shape
    values = np.zeros(x.shape, REFERENCE[fmt.name])
    scales = np.ones([-(-rows // block[0]), -(-columns // block[1])], np.float32)
    for p in range(scales.shape[0]):
        for q in range(scales.shape[1]):
            here = np.s_[
                p * block[0] : (p + 1) * block[0],
                q * block[1] : (q + 1) * block[1],
            ]
            amax = np.abs(x[here]).max()
            if amax > 0:
                scales[p, q] = amax / np.float32(fmt.max)
            # amax / scale may exceed the maximum by a rounding, where ml_dtypes makes NaN.
            scaled = np.clip(x[here] / scales[p, q], -fmt.max, fmt.max)
            values[here] = scaled.astype(values.dtype)
    return values, scales


def random_matrix(rows, columns, seed):
    """Normal numbers whose size varies from column to column by many powers of ten."""
    rng = np.random.default_rng(seed)
    spread = np.exp(3 * rng.normal(size=columns))
    return (rng.normal(size=(rows, columns)) * spread).astype(np.float32)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("block", [(128, 128), (1, 128)], ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (130, 300), (3, 5)], ids=str)
def test_equals_loops_over_blocks(fmt, block, shape):
    x = random_matrix(*shape, seed=1)
    values, scales = quantize_by_loops(x, block, fmt)
    actual = quantize_blocks(x, block, fmt)
    assert np.array_equal(actual.scales.numpy(), scales)
    assert np.array_equal(actual.values.numpy().view(np.uint8), values.view(np.uint8))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 999),
)
def test_any_ragged_edge_equals_loops(rows, columns, block, seed):
    x = random_matrix(rows, columns, seed)
    values, scales = quantize_by_loops(x, block, E4M3)
    actual = quantize_blocks(x, block)
    assert np.array_equal(actual.scales.numpy(), scales)
    assert np.array_equal(actual.values.numpy().view(np.uint8), values.view(np.uint8))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), block=st.sampled_from([(128, 128), (1, 128), (7, 3)]))
def test_round_trip_error_is_the_stated_one(seed, block):
    x = random_matrix(40, 150, seed)
    scaled = quantize_blocks(x, block)
    back = dequantize_blocks(scaled).numpy().astype(np.float64)
    unit = BlockScaled(tf.ones_like(x), scaled.scales, block)
    scale = dequantize_blocks(unit).numpy().astype(np.float64)
    normal = np.abs(x) >= E4M3.smallest_normal * scale
    error = np.abs(back - x)
    rounding = 1 + 1e-5
    assert np.all(error[normal] <= E4M3.worst_relative_error * rounding * np.abs(x[normal]))
    assert np.all(error[~normal] <= E4M3.smallest_subnormal / 2 * rounding * scale[~normal])


def act_quant_ue8m0(x, block):
    """``act_quant`` of DeepSeek's inference code with ``scale_fmt="ue8m0"``, in float64."""
    values = np.zeros(x.shape, E4M3_BYTES)
    scales = np.ones([-(-x.shape[0] // block[0]), -(-x.shape[1] // block[1])])
    for p, q in np.ndindex(*scales.shape):
        here = np.s_[
            p * block[0] : (p + 1) * block[0],
            q * block[1] : (q + 1) * block[1],
        ]
        amax = np.float32(max(np.abs(x[here]).max(), np.float32(1e-4)))
        scales[p, q] = 2.0 ** np.ceil(np.log2(np.float64(amax / np.float32(448))))
        values[here] = np.clip(x[here] / scales[p, q], -448, 448).astype(E4M3_BYTES)
    return values, scales


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    block=st.sampled_from([(128, 128), (1, 128), (2, 3)]),
    size=st.sampled_from([1e-9, 1e-4, 1.0, 448.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_powers_of_two_equal_deepseeks_kernel(rows, columns, block, size, seed):
    x = (size * random_matrix(rows, columns, seed)).astype(np.float32)
    x[0, 0] = np.float32(size)  # 448 times a power of two among them: the scale is exact there
    values, scales = act_quant_ue8m0(x, block)
    actual = quantize_blocks(x, block, power_of_two=True)
    assert np.array_equal(actual.scales.numpy(), scales)
    assert np.array_equal(actual.values.numpy().view(np.uint8), values.view(np.uint8))


def test_powers_of_two_have_a_scale_for_zeros_and_none_for_nan():
    x = np.zeros([1, 4], np.float32)
    x[0, 3] = np.nan
    scaled = quantize_blocks(x, (1, 2), power_of_two=True)
    assert np.array_equal(scaled.scales.numpy(), [[2.0**-22, np.nan]], equal_nan=True)


def test_power_of_two_moves_into_the_scales_alone():
    x = random_matrix(130, 140, seed=3)
    plain, larger = quantize_blocks(x), quantize_blocks(x * 2.0**9)
    assert np.array_equal(plain.values.numpy().view("u1"), larger.values.numpy().view("u1"))
    assert np.array_equal(plain.scales.numpy() * 2.0**9, larger.scales.numpy())


def test_weight_scale_inv_multiplies():
    """Two blocks by hand: byte 0x7E is 448, 0x38 is 1, 0xBC is -1.5; scales 0.5 and 2."""
    values = np.array([[0x7E, 0x38, 0xBC], [0x00, 0x80, 0x38]], np.uint8).view(E4M3_BYTES)
    scaled = BlockScaled(tf.constant(values), tf.constant([[0.5, 2.0]]), block=(2, 2))
    expected = [[224.0, 0.5, -3.0], [0.0, -0.0, 2.0]]
    assert np.array_equal(dequantize_blocks(scaled).numpy(), expected)
    assert dequantize_blocks(scaled, tf.bfloat16).dtype == tf.bfloat16
    assert np.array_equal(dequantize_blocks(scaled, tf.bfloat16).numpy(), expected)


def test_stacked_matrices_are_quantized_one_by_one():
    x = np.stack([random_matrix(5, 200, seed) for seed in range(3)])
    stacked = quantize_blocks(x, (2, 128))
    for i in range(3):
        single = quantize_blocks(x[i], (2, 128))
        assert np.array_equal(stacked.scales[i].numpy(), single.scales.numpy())
        assert np.array_equal(
            dequantize_blocks(stacked)[i].numpy(), dequantize_blocks(single).numpy()
        )


def test_zeros_stay_zeros():
    scaled = quantize_blocks(np.zeros([3, 130], np.float32))
    assert np.array_equal(scaled.scales.numpy(), np.ones([1, 2]))
    assert np.array_equal(dequantize_blocks(scaled).numpy(), np.zeros([3, 130]))


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_block_and_no_other(bad, jit):
    x = np.ones([2, 6], np.float32)
    x[0, 4] = bad
    there_and_back = tf.function(
        lambda t: dequantize_blocks(quantize_blocks(t, (1, 3))), jit_compile=jit
    )
    expected = np.array([[1, 1, 1, np.nan, np.nan, np.nan], [1, 1, 1, 1, 1, 1]], np.float32)
    assert np.array_equal(there_and_back(x).numpy(), expected, equal_nan=True)


def test_smallest_float32_numbers_keep_the_relative_bound():
    """448 is far above them, so the scale is not the largest over 448 but stops at 2^-126."""
    x = np.array([[1.3e-38, -1.9e-38, 2.0**-126, 0.0]], np.float32)
    scaled = quantize_blocks(x)
    assert float(scaled.scales[0, 0]) == 2.0**-126
    error = np.abs(dequantize_blocks(scaled).numpy().astype(np.float64) - x)
    assert np.all(error <= E4M3.worst_relative_error * np.abs(x.astype(np.float64)))


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_compiled_with_unknown_rows_equals_eager(jit):
    x = random_matrix(5, 256, seed=2)
    compiled = tf.function(
        lambda t: quantize_blocks(t, (1, 128)),
        input_signature=[tf.TensorSpec([None, 256])],
        jit_compile=jit,
    )
    eager, traced = quantize_blocks(x, (1, 128)), compiled(x)
    assert traced.block == (1, 128)
    # XLA may multiply by 1/448 where eager divides by 448: one rounding of the scale.
    np.testing.assert_allclose(traced.scales.numpy(), eager.scales.numpy(), rtol=2**-23)
    np.testing.assert_allclose(
        dequantize_blocks(traced).numpy(), dequantize_blocks(eager).numpy(), rtol=2**-3
    )


@pytest.mark.parametrize("block", [(0, 128), (128,), (1.5, 2), (128, -1)], ids=str)
def test_bad_block_is_named(block):
    with pytest.raises(ValueError, match=r"block is .*two positive numbers"):
        quantize_blocks(np.ones([2, 2], np.float32), block)


def test_vector_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(3,\).*rows, columns"):
        quantize_blocks(np.ones([3], np.float32))


def test_scales_that_do_not_fit_are_refused():
    scaled = BlockScaled(tf.ones([200, 300]), tf.ones([2, 2]))
    with pytest.raises(ValueError, match=r"scales have shape \[2, 2\].*need \[2, 3\]"):
        dequantize_blocks(scaled)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    block=st.tuples(st.sampled_from([1, 3, 32, 128]), st.sampled_from([1, 5, 32, 128]))
    | st.just(block_scaling.WHOLE),
    fmt=st.sampled_from([E4M3, E5M2]),
    power_of_two=st.booleans(),
    dtype=st.sampled_from([tf.float32, tf.bfloat16]),
    seed=st.integers(0, 999),
)
def test_compiled_and_stock_operations_agree_in_every_bit(
    shape, block, fmt, power_of_two, dtype, seed
):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(4 * rng.normal(size=shape))
    special = rng.random(shape)
    x[special < 0.1] = 0
    x[special > 0.995] = rng.choice([np.inf, np.nan, 1e38])
    x = tf.cast(x, dtype)
    found = quantize_blocks(x, block, fmt, power_of_two)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_scaling, "use_kernels", lambda *_: False)
        stock = quantize_blocks(x, block, fmt, power_of_two)
        read = dequantize_blocks(stock, dtype)
    assert np.array_equal(found.scales, stock.scales, equal_nan=True)
    wide = [tf.cast(one.values, tf.float32).numpy() for one in (found, stock)]
    assert np.array_equal(*wide, equal_nan=True)
    assert np.array_equal(*(np.signbit(one) for one in wide)) or np.isnan(wide[0]).any()
    again = tf.cast(dequantize_blocks(found, dtype), tf.float32)
    assert np.array_equal(again, tf.cast(read, tf.float32), equal_nan=True)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_every_byte_is_read_as_ml_dtypes_reads_it(fmt):
    every = np.arange(256, dtype=np.uint8).view(REFERENCE[fmt.name]).reshape(2, 128)
    scaled = BlockScaled(tf.constant(every), tf.ones([2, 1]), (1, 128))
    expected = every.astype(np.float32)
    assert np.array_equal(dequantize_blocks(scaled), expected, equal_nan=True)
