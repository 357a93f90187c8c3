"""The compiled matrix products: built on first use, cached, and optional.

`operations.cc` holds a few TensorFlow operations that beat what stock TensorFlow has for experts
and for single tokens. Where they can't be had (no compiler, a GPU, `DS_PRECISION_KERNELS=off`)
everything runs on stock operations with the same results up to rounding.
"""

from ds_precision.kernels.library import kernels, operations

__all__ = ["kernels", "operations"]
