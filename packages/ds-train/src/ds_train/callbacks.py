"""What a training run tells those who watch it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_train.stability import StabilityMetrics


@dataclass(frozen=True)
class StepMetrics:
    """What is known after an optimizer step.

    Attributes:
        step: Optimizer steps done, from 1.
        loss: What was minimised.
        cross_entropy: Of the next token, nats.
        mtp_cross_entropy: Of the tokens further ahead, mean over depths, nats.
        balance_loss: Sequence-wise balance loss, summed over layers, without alpha.
        gradient_norm: Global norm before clipping.
        learning_rate: Of this step.
        tokens_per_second: Over the time since the last report of this kind.
        max_violation: For each expert layer `max(load) / mean(load) - 1`.
        loads: `[expert layers, experts]` float32, tokens that each expert got.
        skipped: Steps so far that changed nothing because a gradient was not finite.
        loss_scale: What the loss was multiplied by; 1 but in float16.
    """

    step: int
    loss: float
    cross_entropy: float
    mtp_cross_entropy: float
    balance_loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    max_violation: tuple[float, ...]
    loads: np.ndarray
    skipped: int = 0
    loss_scale: float = 1.0


class Callback:
    """Override what you want to hear of; nothing here may change the run."""

    def on_start(self, step: int, steps: int) -> None:
        """The run starts, or goes on, with `step` of `steps` done."""

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimizer step was done."""

    def on_stability(self, metrics: StabilityMetrics) -> None:
        """What rounding did was looked at; `[train] watch_every` says how often."""

    def on_checkpoint(self, path: Path) -> None:
        """A checkpoint is complete on disk."""

    def on_end(self, step: int) -> None:
        """All steps are done, or the run was interrupted after `step`."""
