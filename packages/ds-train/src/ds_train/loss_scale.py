"""What the loss is multiplied by, and what becomes of a step that is not finite.

Loss scaling as mixed precision training has it (arXiv 1710.03740, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tensorflow as tf

from ds_train.config import TrainTable

_FIRST, _LARGEST, _GROWS_AFTER = 2.0**15, 2.0**24, 2000


class LossScale:
    """The scale of one run; on many ranks each has its own, and all are equal.

    Args:
        train: the run's table `[train]`.

    Attributes:
        value: what the loss is multiplied by before the backward pass, float32. Fixed at 1 but in
            float16: there it halves when a gradient is not finite, and doubles after 2,000 steps
            without one.
        good_steps: how many such steps there were, int32.
        skips: whether a step that is not finite changes nothing.
    """

    def __init__(self, train: TrainTable) -> None:
        self._moves = train.dtype_policy == "mixed_float16"
        self.skips = self._moves or train.nonfinite == "skip"
        first = _FIRST if self._moves else 1.0
        self.value = tf.Variable(first, trainable=False, name="loss_scale")
        self.good_steps = tf.Variable(0, trainable=False, name="good_steps")

    def scaled(self, loss: tf.Tensor) -> tf.Tensor:
        """Return the loss to start the backward pass from."""
        return loss * self.value if self._moves else loss

    def guarded(self, finite: tf.Tensor, update: Callable[[], None]) -> tf.Tensor:
        """Do an update, unless steps are skipped and this one is not finite.

        Returns:
            1, or 0 where it was not done; a float32 scalar.
        """

        def done() -> tf.Tensor:
            update()
            return tf.constant(1.0)

        return tf.cond(finite, done, lambda: tf.constant(0.0)) if self.skips else done()

    def adjust(self, finite: tf.Tensor) -> None:
        """Take note of how a step went."""
        if not self._moves:
            return
        good = tf.where(finite, self.good_steps + 1, 0)
        grows = good >= _GROWS_AFTER
        factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
        self.value.assign(tf.clip_by_value(self.value * factor, 1.0, _LARGEST))
        self.good_steps.assign(tf.where(grows, 0, good))

    def state(self) -> dict[str, float]:
        """Return what a checkpoint needs."""
        return {"scale": float(self.value.numpy()), "good_steps": int(self.good_steps.numpy())}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on with what `state` returned; with what there is where it lacks something."""
        self.value.assign(state.get("scale", self.value.numpy()))
        self.good_steps.assign(int(state.get("good_steps", 0)))
