"""8-bit casts beside torch's, which saturate too."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import torch

from ds_precision import E4M3, E5M2, Format, cast

TORCH = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_every_finite_number_goes_to_the_same_byte(fmt: Format) -> None:
    """All of bfloat16, whose numbers are spread over float32's, and a million random patterns."""
    bfloat16 = np.arange(2**16, dtype=np.uint32) << 16
    drawn = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    numbers = np.concatenate([bfloat16, drawn]).view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    ours = cast(tf.constant(numbers), fmt).numpy().view(np.uint8)
    theirs = torch.tensor(numbers).to(TORCH[fmt.name]).view(torch.uint8).numpy()
    # E5M2 has a code for infinity, and torch takes it where ours stays finite.
    same = theirs & 0x7F != 0x7C if fmt is E5M2 else np.ones(len(numbers), bool)
    np.testing.assert_array_equal(ours[same], theirs[same])
    assert (np.abs(numbers[~same]) > fmt.max).all()
