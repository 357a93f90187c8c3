"""Casts against ml_dtypes, which TensorFlow and JAX take their 8-bit types from."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ds_precision import E4M3, E5M2, cast

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


@pytest.mark.parametrize(("fmt", "bound"), [(E4M3, 0.0625), (E5M2, 0.125)])
def test_worst_relative_error_is_nearly_reached(fmt, bound):
    """Just above 1 + half a step the error is the bound over (1 + the bound)."""
    assert fmt.worst_relative_error == bound
    tie = np.float32(1 + bound)
    error = abs(float(tf.cast(cast([tie], fmt), tf.float32)[0]) - tie) / tie
    assert error == pytest.approx(bound / (1 + bound))
