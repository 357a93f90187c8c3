"""The small floating-point formats of DeepSeek-V3 (arXiv 2412.19437, section 3.3).

The paper uses E4M3 in all matrix products, and E5M6 for one operand, the input of the attention's
output projection (section 3.3.3). E5M2 is the wider and coarser format that earlier FP8 recipes
kept for gradients (arXiv 2209.05433); it is here to compare with. UE8M0 holds scales: powers of
two and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import tensorflow as tf

_ONE = 2**23  # what adds one to the exponent in float32's bits
_NAN = 255  # of UE8M0
_E4M3_NAN = 127  # and with the sign 255


@dataclass(frozen=True)
class Format:
    """What a floating-point format can hold.

    Attributes:
        name: name as papers write it, such as ``E4M3``.
        dtype: TensorFlow's storage type; a wider one where it has none of that size.
        max: largest finite magnitude.
        smallest_normal: smallest magnitude that keeps all mantissa bits; below it the
            spacing stays at ``smallest_subnormal``.
        mantissa_bits: explicit bits of the mantissa, the leading one not counted.
    """

    name: str
    dtype: tf.DType
    max: float
    smallest_normal: float
    mantissa_bits: int

    @property
    def smallest_subnormal(self) -> float:
        """Smallest magnitude above zero, and the spacing of all subnormal numbers."""
        return self.smallest_normal * 2.0**-self.mantissa_bits

    @property
    def worst_relative_error(self) -> float:
        """Bound on ``|cast(x) - x| / |x|`` for ``smallest_normal <= |x| <= max``.

        In ``[2^e, 2^(e+1))`` the numbers lie ``2^(e-m)`` apart, with ``m`` mantissa bits.
        Rounding to the nearest one moves ``x`` by at most half of that, and ``|x|`` is at
        least ``2^e``, so the quotient is at most ``2^-(m+1)``: 6.25% for E4M3, 12.5% for
        E5M2, 0.78% for E5M6. Below ``smallest_normal`` the error is at most half of
        ``smallest_subnormal`` in absolute terms, and has no relative bound.
        """
        return 2.0 ** -(self.mantissa_bits + 1)


E4M3 = Format(
    name="E4M3",
    dtype=tf.dtypes.experimental.float8_e4m3fn,
    max=448.0,
    smallest_normal=2.0**-6,
    mantissa_bits=3,
)
"""4 bits of exponent, 3 of mantissa, no infinity (arXiv 2209.05433): V3's operands."""

E5M2 = Format(
    name="E5M2",
    dtype=tf.dtypes.experimental.float8_e5m2,
    max=57344.0,
    smallest_normal=2.0**-14,
    mantissa_bits=2,
)
"""5 bits of exponent, 2 of mantissa, as in IEEE's half precision (arXiv 2209.05433)."""

E5M6 = Format(
    name="E5M6",
    dtype=tf.float16,  # whose numbers include all of E5M6's
    max=65024.0,  # if infinity has a code, as in E5M2; the paper does not say
    smallest_normal=2.0**-14,
    mantissa_bits=6,
)
"""12 bits, for the input of attention's output projection (arXiv 2412.19437, section 3.3.3)."""


def cast(x: tf.Tensor, fmt: Format) -> tf.Tensor:
    """Rounds to the nearest number of a format, ties to even; what is too large saturates.

    Magnitudes above ``fmt.max``, infinities included, become ``fmt.max`` with their
    sign, as the ``satfinite`` conversion of GPUs does. (A plain ``tf.cast`` makes NaN of
    them in E4M3, which has no infinity, and infinities in E5M2.) NaN stays NaN.

    TensorFlow defines no gradient for casts to 8 bits: the gradient through this is None.

    Args:
        x: any shape, a float dtype.
        fmt: the format to round to.

    Returns:
        The shape of ``x``, dtype ``fmt.dtype``. To compute with it, ``tf.cast`` it back:
        that is exact in float32 and bfloat16.
    """
    x = tf.convert_to_tensor(x)
    x = tf.clip_by_value(x, -fmt.max, fmt.max)
    if fmt.dtype.size > 1:  # a wider type, whose own rounding would not do
        x = _round(tf.cast(x, tf.float32), fmt)
    return tf.cast(x, fmt.dtype)


def to_ue8m0(scales: tf.Tensor) -> tf.Tensor:
    """Writes scales as UE8M0, an exponent of 8 bits: ``2^(byte - 127)``, 255 for NaN.

    What is no power of two is rounded up to the next one, so that nothing scaled by it overflows.

    Args:
        scales: any shape, a float dtype; positive, from ``2^-127`` to ``2^127``.

    Returns:
        The shape of ``scales``, uint8. NaN, and what is not positive or too large, gives 255.
    """
    scales = tf.cast(scales, tf.float32)
    bits = tf.bitcast(scales, tf.int32)
    exponents = (bits + _ONE - 1) // _ONE
    # Below 2^-126 float32 has no leading one: 2^-127 is half of the mantissa.
    exponents = tf.where(bits <= _ONE // 2, 0, exponents)
    fits = (bits > 0) & (bits < _NAN * _ONE - _ONE + 1)  # to 2^127; beyond, the sum overflows
    return tf.cast(tf.where(fits, exponents, _NAN), tf.uint8)


def from_ue8m0(exponents: tf.Tensor) -> tf.Tensor:
    """Reads UE8M0 bytes.

    Args:
        exponents: any shape, uint8.

    Returns:
        The shape of ``exponents``, float32: ``2^(byte - 127)``, NaN for 255.
    """
    exponents = tf.cast(exponents, tf.int32)
    bits = tf.where(exponents == 0, _ONE // 2, exponents * _ONE)
    return tf.where(exponents == _NAN, float("nan"), tf.bitcast(bits, tf.float32))


def pack_bits(values: tf.Tensor) -> tf.Tensor:
    """Puts the bits of four 8-bit numbers into one int32, which collectives and files can carry.

    TensorFlow has no ``bitcast`` of 8-bit floats: their bits are found by way of float16, which
    holds them all.

    Args:
        values: ``[..., C]``, dtype of ``E4M3`` or ``E5M2``.

    Returns:
        ``[..., ceil(C / 4)]`` int32, the first number lowest. NaN gives one of its codes.
    """
    half = tf.cast(values, tf.float16)
    bits = tf.cast(tf.bitcast(half, tf.uint16), tf.int32)
    magnitude = tf.bitwise.bitwise_and(bits, 0x7FFF)
    if values.dtype == E5M2.dtype:
        codes = magnitude // 2**8
    else:
        normal = magnitude // 2**7 - 64  # exponents count from 7, float16's from 15
        subnormal = tf.cast(tf.abs(half) * 2**9, tf.int32)
        codes = tf.where(magnitude < 9 * 2**10, subnormal, normal)
        codes = tf.where(magnitude > 31 * 2**10, _E4M3_NAN, codes)
    codes += tf.where(bits >= 2**15, 2**7, 0)
    columns = values.shape[-1]
    codes = tf.pad(codes, [[0, 0]] * (values.shape.rank - 1) + [[0, -columns % 4]])
    fours = tf.reshape(codes, tf.concat([tf.shape(codes)[:-1], [-1, 4]], axis=0))
    packed = tf.bitcast(tf.cast(fours, tf.uint8), tf.int32)
    return tf.ensure_shape(packed, [*values.shape[:-1], -(-columns // 4)])


def unpack_bits(packed: tf.Tensor, columns: int, fmt: Format) -> tf.Tensor:
    """Undoes ``pack_bits``.

    Args:
        packed: ``[..., ceil(columns / 4)]`` int32.
        columns: of the values.
        fmt: ``E4M3`` or ``E5M2``.

    Returns:
        ``[..., columns]``, dtype of the format.
    """
    codes = tf.cast(tf.bitcast(packed, tf.uint8), tf.int32)
    codes = tf.reshape(codes, tf.concat([tf.shape(packed)[:-1], [-1]], axis=0))[..., :columns]
    if fmt.dtype == E5M2.dtype:
        values = tf.bitcast(tf.cast(codes * 2**8, tf.uint16), tf.float16)
    else:
        magnitude = codes % 2**7
        normal = tf.bitcast(magnitude * 2**20 + 120 * _ONE, tf.float32)
        values = tf.where(magnitude < 8, tf.cast(magnitude, tf.float32) * 2.0**-9, normal)
        values = tf.where(magnitude == _E4M3_NAN, float("nan"), values)
        values = tf.where(codes >= 2**7, -values, values)
    return tf.ensure_shape(tf.cast(values, fmt.dtype), [*packed.shape[:-1], columns])


def _round(x: tf.Tensor, fmt: Format) -> tf.Tensor:
    """Rounds float32 to a format's spacing, ties to even."""
    exponents = tf.bitcast(tf.abs(x), tf.int32) // _ONE - 127
    exponents = tf.maximum(exponents, round(math.log2(fmt.smallest_normal)))
    spacing = tf.bitcast((exponents - fmt.mantissa_bits + 127) * _ONE, tf.float32)
    return tf.round(x / spacing) * spacing
