"""Whether the systems compute the same: against transformers in float32, before any timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.found import Agreement
from bench.process import Process, WorkerError
from bench.tasks import AGREEMENT_ROWS, CONTEXT, GREEDY_TOKENS, Precision, Task, stream


@dataclass(frozen=True)
class Reference:
    """What one system says about the prompts.

    Attributes:
        logits: `[8, V]` float32 of the last positions.
        greedy: `[32]` tokens written after the first prompt.
        step: loss (nats) and gradient norm of the first training step, if it trains.
    """

    logits: np.ndarray
    greedy: np.ndarray
    step: dict[str, float] | None


def ask(process: Process, train: Task | None) -> Reference:
    """Let a worker say what it computes.

    Raises:
        WorkerError: it could not.
    """
    vocab_size = process.ask("vocab_size")
    prompts = stream(vocab_size, AGREEMENT_ROWS, CONTEXT)
    logits = np.array(process.ask("logits", ids=prompts.tolist()), np.float32)
    greedy = process.ask("greedy", ids=prompts[:1].tolist(), new=GREEDY_TOKENS)
    step: dict[str, float] | None = None
    if train is not None:
        try:
            step = process.ask("first_step", task=train.to_json())
        except WorkerError as error:
            if not str(error).startswith("NotImplementedError"):
                raise
    return Reference(logits, np.array(greedy[0]), step)


def compare(system: str, precision: Precision, said: Reference, expected: Reference) -> Agreement:
    """Return how far a system agrees with the reference."""
    equal = said.greedy == expected.greedy
    kept = len(equal) if equal.all() else int(np.argmin(equal))
    return Agreement(
        system=system,
        precision=precision,
        logits=difference(said.logits, expected.logits),
        first_tokens=int((said.logits.argmax(-1) == expected.logits.argmax(-1)).sum()),
        greedy=kept,
        **steps_apart(said.step, expected.step),
    )


def difference(said: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of `[B, V]` logits over the largest, each row centred.

    Centred, so that log-probabilities, which is all that some systems give, compare as well.
    """
    said, expected = (rows - rows.mean(-1, keepdims=True) for rows in (said, expected))
    return float(np.abs(said - expected).max() / np.abs(expected).max())


def steps_apart(said: dict[str, float] | None, expected: dict[str, float] | None) -> dict[str, Any]:
    """Return the relative differences of loss and gradient norm, where both trained."""
    if said is None or expected is None:
        return {}
    return {name: abs(said[name] / expected[name] - 1) for name in ("loss", "gradient_norm")}
