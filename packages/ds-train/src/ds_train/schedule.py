"""The learning-rate schedule of DeepSeek-V3 (arXiv 2412.19437, section 4.2).

Linear warm-up to the peak, constant, cosine to a floor, then two constant tails:
the floor, and a last, lower rate. The paper's own figures, in tokens of 14.8T:
2K warm-up steps to 2.2e-4, constant until 10T, cosine until 14.3T to 2.2e-5,
constant for 333B, then 7.3e-6 for the last 167B.

Departure: the ends of the phases are given in optimizer steps, not tokens.
"""

import math

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="ds_train")
class WarmupConstantCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate as a function of the optimizer step (0 for the first update).

    Args:
        peak: The rate after warm-up.
        floor: The rate at the end of the cosine, and on the first tail.
        final: The rate on the second tail.
        warmup_steps: Update `i` of these uses `peak * (i + 1) / warmup_steps`, so that
            the first update is not lost to a rate of zero.
        constant_until: First step of the cosine.
        cosine_until: First step of the first tail.
        tail_until: First step of the second tail.

    Raises:
        ValueError: If the ends of the phases are not in order or a rate is negative.
    """

    def __init__(
        self,
        peak: float,
        floor: float,
        final: float,
        warmup_steps: int,
        constant_until: int,
        cosine_until: int,
        tail_until: int,
    ) -> None:
        ends = (0, warmup_steps, constant_until, cosine_until, tail_until)
        if list(ends) != sorted(ends):
            msg = (
                "schedule phases must end in order 0 <= warmup_steps <= constant_until <= "
                f"cosine_until <= tail_until, got {ends[1:]}"
            )
            raise ValueError(msg)
        if min(peak, floor, final) < 0:
            msg = f"learning rates must be >= 0, got peak={peak}, floor={floor}, final={final}"
            raise ValueError(msg)
        self.peak, self.floor, self.final = peak, floor, final
        self.warmup_steps = warmup_steps
        self.constant_until = constant_until
        self.cosine_until = cosine_until
        self.tail_until = tail_until

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the rate of update `step`, a float32 scalar tensor."""
        step = tf.cast(step, tf.float32)
        warm = self.peak * (step + 1.0) / max(self.warmup_steps, 1)
        length = max(self.cosine_until - self.constant_until, 1)
        progress = tf.clip_by_value((step - self.constant_until) / length, 0.0, 1.0)
        cosine = self.floor + (self.peak - self.floor) * 0.5 * (1.0 + tf.cos(math.pi * progress))
        rate = tf.where(step < self.warmup_steps, warm, cosine)
        return tf.where(step < self.tail_until, rate, self.final)

    def get_config(self) -> dict[str, float | int]:
        """Returns the constructor's arguments, for Keras serialisation."""
        return {
            "peak": self.peak,
            "floor": self.floor,
            "final": self.final,
            "warmup_steps": self.warmup_steps,
            "constant_until": self.constant_until,
            "cosine_until": self.cosine_until,
            "tail_until": self.tail_until,
        }
