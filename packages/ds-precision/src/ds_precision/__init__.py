"""Number formats and the matrix products of DeepSeek-V3."""

from ds_precision.linear import Linear, matmul

__all__ = ["Linear", "matmul"]
