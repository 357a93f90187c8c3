"""The 8-bit floating-point formats of DeepSeek-V3 (arXiv 2412.19437, section 3.3).

The paper uses E4M3 in all matrix products. E5M2 is the wider and coarser format that
earlier FP8 recipes kept for gradients (arXiv 2209.05433); it is here to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf


@dataclass(frozen=True)
class Format:
    """What a floating-point format can hold.

    Attributes:
        name: name as papers write it, such as ``E4M3``.
        dtype: TensorFlow's storage type.
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
        E5M2. Below ``smallest_normal`` the error is at most half of ``smallest_subnormal``
        in absolute terms, and has no relative bound.
        """
        return 2.0 ** -(self.mantissa_bits + 1)


E4M3 = Format(
    name="E4M3",
    dtype=tf.dtypes.experimental.float8_e4m3fn,
    max=448.0,
    smallest_normal=2.0**-6,
    mantissa_bits=3,
)

E5M2 = Format(
    name="E5M2",
    dtype=tf.dtypes.experimental.float8_e5m2,
    max=57344.0,
    smallest_normal=2.0**-14,
    mantissa_bits=2,
)


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
    return tf.cast(tf.clip_by_value(x, -fmt.max, fmt.max), fmt.dtype)
