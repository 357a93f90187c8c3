"""What each row aims at: ratios within one run, never seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The aim of one row; `None` where there is none.

    Attributes:
        transformers: times the speed of transformers in its best mode.
        best: times the speed of the fastest peer at the same precision.
        roofline: share of what the machine's own limits allow, from 0 to 1.
    """

    transformers: float | None = None
    best: float | None = None
    roofline: float | None = None


TARGETS: dict[str, Target] = {
    "train-8x256-float32": Target(2.2, 2.2, 0.55),
    "train-8x256-bfloat16": Target(1.8, 1.8, 0.40),
    "prefill-1x512-float32": Target(2.7, 1.0, 0.57),
    "prefill-1x512-bfloat16": Target(3.0, 1.0, 0.35),
    "prefill-8x512-float32": Target(3.6, 1.0, 0.62),
    "prefill-8x512-bfloat16": Target(3.2, 1.05, 0.45),
    "decode-1x512-float32": Target(6.0, 1.0, 0.40),
    "decode-1x512-bfloat16": Target(5.5, 1.3, 0.33),
    "decode-8x512-float32": Target(6.0, 1.0, 0.30),
    "decode-8x512-bfloat16": Target(5.0, 1.0, 0.25),
    "decode-32x512-float32": Target(6.0, 1.05),
    "decode-32x512-bfloat16": Target(5.0, 1.05),
    "decode-1x512-int8": Target(best=1.0),
}
