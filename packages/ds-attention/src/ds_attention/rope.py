"""Rotary position embedding and its YaRN extension.

RoPE: arXiv 2104.09864. YaRN: arXiv 2309.00071, as DeepSeek-V3 uses it (section 4.3): only
the decoupled rotary part of query and key turns, and the attention temperature is
`0.1 mscale ln(factor) + 1`.

Shape letters: B batch, S sequence, R rotary dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class YarnConfig:
    """YaRN's numbers, under the names of `rope_scaling` in a released `config.json`.

    Attributes:
        factor: how many times the context grows [40 in V3].
        original_max_position_embeddings: context length of pre-training [4096 in V3].
        beta_fast: rotations over the original context above which a pair is left as it is.
        beta_slow: rotations below which a pair is fully interpolated.
        mscale: numerator of the factor that cos and sin carry; `None` or 0 where unset.
        mscale_all_dim: its denominator; also scales the attention scores when set.
        attention_factor: overrides the factor that cos and sin carry.
        truncate: whether the correction range is rounded outwards to whole pairs.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it must be 1 or more")
        if not self.original_max_position_embeddings > 0:
            raise ValueError(
                "rope_scaling.original_max_position_embeddings is "
                f"{self.original_max_position_embeddings}; it must be a positive length"
            )

    @property
    def rotation_scale(self) -> float:
        """The factor that cos and sin carry."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return yarn_mscale(self.factor)

    @property
    def score_scale(self) -> float:
        """The factor on the attention scores: `mscale(factor, mscale_all_dim)^2`, or 1."""
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's temperature `0.1 mscale ln(factor) + 1` (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(dim: int, theta: float, yarn: YarnConfig | None = None) -> np.ndarray:
    """Return the angle per position of each rotary pair.

    Args:
        dim: number of rotary dimensions, even.
        theta: RoPE's base.
        yarn: how the context was extended, if it was.

    Returns:
        `[dim / 2]` float32, in radians a position.
    """
    wavelengths = np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    frequencies = 1.0 / wavelengths
    if yarn is None:
        return frequencies.astype(np.float32)
    kept = 1.0 - _interpolation_ramp(dim, theta, yarn)
    interpolated = 1.0 / (np.float32(yarn.factor) * wavelengths)
    return (interpolated * (1.0 - kept) + frequencies * kept).astype(np.float32)


def _interpolation_ramp(dim: int, theta: float, yarn: YarnConfig) -> np.ndarray:
    """Return, for each pair, 0 where it keeps its frequency and 1 where it is interpolated."""

    def pair_with(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, as in the reference
    pairs = np.arange(dim // 2, dtype=np.float32)
    return np.clip((pairs - low) / (high - low), 0, 1).astype(np.float32)


def rope_rotation(
    positions: tf.Tensor, dim: int, theta: float = 10000.0, yarn: YarnConfig | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return what rotates each pair at each position.

    Args:
        positions: `[B, S]` or `[1, S]`, integer.
        dim: number of rotary dimensions R, even.
        theta: RoPE's base.
        yarn: how the context was extended, if it was; its factor is in the result.

    Returns:
        Cosines and sines, each `[B or 1, S, R / 2]` float32.
    """
    angles = tf.cast(positions, tf.float32)[..., None] * rope_frequencies(dim, theta, yarn)
    scale = 1.0 if yarn is None else yarn.rotation_scale
    return tf.cos(angles) * scale, tf.sin(angles) * scale


def apply_rope(
    x: tf.Tensor,
    positions: tf.Tensor,
    theta: float = 10000.0,
    yarn: YarnConfig | None = None,
    interleave: bool = True,
) -> tf.Tensor:
    """Rotate the last axis of `x` by the angle of its position.

    The output lists the first members of all pairs, then the second ones, whichever way the
    input was laid out. Query and key are treated alike, so their products do not notice.

    Args:
        x: `[B, S, R]` or `[B, S, heads, R]`, floating.
        positions: `[B, S]` or `[1, S]`, integer.
        theta: RoPE's base.
        yarn: how the context was extended, if it was.
        interleave: pairs lie side by side (the released weights) or half a vector apart.

    Returns:
        The rotated `x`, same shape and type. Angles are computed in float32.
    """
    rotation = rope_rotation(positions, x.shape[-1], theta, yarn)
    cos, sin = (tf.cast(part, x.dtype) for part in rotation)
    if x.shape.rank == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else tf.split(x, 2, axis=-1)
    return tf.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)
