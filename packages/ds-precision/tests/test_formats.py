"""Casts against ml_dtypes, which TensorFlow and JAX take their 8-bit types from."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ds_precision import (
    E4M3,
    E5M2,
    E5M6,
    cast,
    from_ue8m0,
    pack_bits,
    to_ue8m0,
    unpack_bits,
)

REFERENCE = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}
formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)


def all_numbers(fmt):
    """The finite numbers of a format, from its 256 bit patterns."""
    numbers = np.arange(256, dtype=np.uint8).view(REFERENCE[fmt.name]).astype(np.float32)
    return numbers[np.isfinite(numbers)]


def assert_same_bits(actual, expected):
    """Equal bit for bit; any NaN equals any other."""
    nan = np.isnan(expected.astype(np.float32))
    assert np.array_equal(np.isnan(actual.astype(np.float32)), nan)
    assert np.array_equal(actual.view(np.uint8)[~nan], expected.view(np.uint8)[~nan])


@formats
def test_attributes_are_those_of_ml_dtypes(fmt):
    info = ml_dtypes.finfo(REFERENCE[fmt.name])
    assert fmt.dtype.as_numpy_dtype is REFERENCE[fmt.name]
    assert fmt.max == float(info.max)
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert fmt.mantissa_bits == info.nmant


@formats
def test_every_byte_casts_to_itself(fmt):
    numbers = all_numbers(fmt)
    expected = numbers.astype(REFERENCE[fmt.name])
    assert_same_bits(cast(numbers, fmt).numpy(), expected)
    assert np.array_equal(tf.cast(cast(numbers, fmt), tf.float32).numpy(), numbers)


@formats
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16], ids=lambda d: d.name)
def test_ties_between_neighbours_go_to_even(fmt, dtype):
    numbers = np.unique(all_numbers(fmt))
    ties = tf.cast((numbers[1:] + numbers[:-1]) / 2, dtype)
    around = tf.concat([ties * (1 - 2**-7), ties, ties * (1 + 2**-7)], axis=0)
    assert_same_bits(cast(around, fmt).numpy(), around.numpy().astype(REFERENCE[fmt.name]))


@formats
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_random_bits_equal_ml_dtypes_where_nothing_saturates(fmt, jit):
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[np.isnan(x) | (np.abs(x) <= fmt.max)]
    compiled = tf.function(lambda t: cast(t, fmt), jit_compile=jit)
    with np.errstate(invalid="ignore"):
        assert_same_bits(compiled(x).numpy(), x.astype(REFERENCE[fmt.name]))


@formats
def test_what_is_too_large_saturates_with_its_sign(fmt):
    too_large = np.array([fmt.max * 1.01, fmt.max * 1e6, 3e38, np.inf], np.float32)
    assert np.all(tf.cast(cast(too_large, fmt), tf.float32).numpy() == fmt.max)
    assert np.all(tf.cast(cast(-too_large, fmt), tf.float32).numpy() == -fmt.max)
    assert np.isnan(tf.cast(cast([np.nan], fmt), tf.float32).numpy()).all()


@formats
@given(
    x=arrays(
        np.float32,
        st.integers(1, 64),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    )
)
def test_error_stays_within_what_the_format_states(fmt, x):
    back = tf.cast(cast(x, fmt), tf.float32).numpy().astype(np.float64)
    x = np.clip(x.astype(np.float64), -fmt.max, fmt.max)
    normal = np.abs(x) >= fmt.smallest_normal
    error = np.abs(back - x)
    assert np.all(error[normal] <= fmt.worst_relative_error * np.abs(x[normal]))
    assert np.all(error[~normal] <= fmt.smallest_subnormal / 2)


@pytest.mark.parametrize(("fmt", "bound"), [(E4M3, 0.0625), (E5M2, 0.125), (E5M6, 2**-7)])
def test_worst_relative_error_is_nearly_reached(fmt, bound):
    """Just above 1 + half a step the error is the bound over (1 + the bound)."""
    assert fmt.worst_relative_error == bound
    tie = np.float32(1 + bound)
    error = abs(float(tf.cast(cast([tie], fmt), tf.float32)[0]) - tie) / tie
    assert error == pytest.approx(bound / (1 + bound))


def e5m6_numbers():
    """Every finite E5M6 number that is not negative, from its codes: five bits, then six."""
    codes = np.arange(31 * 64)
    exponents, mantissas = codes // 64, codes % 64
    subnormal = exponents == 0
    return np.where(
        subnormal, mantissas * 2.0**-20, (64 + mantissas) * 2.0 ** (exponents - 15.0 - 6)
    )


def test_e5m6_attributes_are_those_of_its_codes():
    numbers = e5m6_numbers()
    assert E5M6.max == numbers.max()
    assert E5M6.smallest_subnormal == numbers[1]
    assert E5M6.smallest_normal == numbers[64]
    assert E5M6.smallest_normal / E5M6.smallest_subnormal == 2**E5M6.mantissa_bits
    assert np.array_equal(tf.cast(cast(numbers, E5M6), tf.float64).numpy(), numbers)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_e5m6_goes_to_the_nearest_code_ties_to_the_even_one(jit):
    numbers = e5m6_numbers()
    ties = (numbers[1:] + numbers[:-1]) / 2
    drawn = np.exp2(np.random.default_rng(0).uniform(-24, 16, 5000)).clip(0, E5M6.max)
    x = np.concatenate([ties, np.nextafter(ties, 0), np.nextafter(ties, 1e9), drawn])
    x = x.astype(np.float32).astype(np.float64)
    high = np.searchsorted(numbers, x).clip(1, len(numbers) - 1)
    below, above = numbers[high - 1], numbers[high]
    up = (above - x < x - below) | ((above - x == x - below) & (high % 2 == 0))
    expected = np.where(up, above, below)
    compiled = tf.function(lambda t: cast(t, E5M6), jit_compile=jit)
    for sign in (1, -1):
        found = compiled(tf.constant(sign * x, tf.float32)).numpy().astype(np.float64)
        assert np.array_equal(found, sign * expected)


def test_e5m6_saturates():
    found = cast(np.array([65024.0, 65500.0, 1e9, np.inf, -np.inf, np.nan], np.float32), E5M6)
    assert found.numpy()[:5].tolist() == [65024.0] * 4 + [-65024.0]
    assert np.isnan(found.numpy()[5])


def test_every_ue8m0_byte_is_what_ml_dtypes_reads():
    every = np.arange(256, dtype=np.uint8)
    numbers = every.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(from_ue8m0(every).numpy(), numbers, equal_nan=True)
    assert np.array_equal(to_ue8m0(numbers).numpy(), every)


@given(scale=st.floats(2.0**-126, 2.0**127, width=32))
def test_ue8m0_rounds_up_to_the_next_power(scale):
    found = float(from_ue8m0(to_ue8m0(tf.constant(scale))))
    assert found / 2 < scale <= found


def test_ue8m0_has_no_zero_and_no_sign():
    wrong = np.array([0.0, -0.0, -1.0, np.inf, -np.inf, np.nan, 2.0**127 * 1.5], np.float32)
    assert (to_ue8m0(wrong).numpy() == 255).all()


@formats
def test_every_byte_survives_packing(fmt):
    dtype = REFERENCE[fmt.name]
    codes = np.arange(256, dtype=np.uint8)
    values = tf.constant(codes.view(dtype).reshape(2, 128))
    packed = pack_bits(values)
    assert packed.shape == (2, 32)
    assert packed.dtype == tf.int32
    there = packed.numpy().view(np.uint8).reshape(-1)
    number = ~np.isnan(codes.view(dtype).astype(np.float32))
    np.testing.assert_array_equal(there[number], codes[number])
    back = unpack_bits(packed, 128, fmt).numpy().reshape(-1)
    np.testing.assert_array_equal(back.view(np.uint8)[number], codes[number])
    assert np.isnan(back[~number].astype(np.float32)).all()


def test_packing_fills_up_to_four():
    values = tf.cast(tf.constant([[1.0, -2.0, 0.5, 448.0, -0.0]]), E4M3.dtype)
    packed = pack_bits(values)
    assert packed.shape == (1, 2)
    np.testing.assert_array_equal(
        tf.cast(unpack_bits(packed, 5, E4M3), tf.float32), tf.cast(values, tf.float32)
    )
