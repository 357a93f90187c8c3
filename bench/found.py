"""What a run of the benchmark finds, as it lies in docs/assets/benchmarks.json."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from bench.ratios import Spread
from bench.tasks import Precision, Task

OURS = "ours"
TRANSFORMERS = "transformers"


class _Found(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Speed(_Found):
    """One system at one task.

    Attributes:
        mode: of its ways to do it, the fastest; `None` if it can't.
        tried: each mode's tokens a second, or why it failed.
        first_seconds: its first run, compilation included.
        speed: tokens a second over all runs.
        ratio: how many times faster we are, within pairs.
    """

    mode: str | None
    tried: dict[str, float | str]
    first_seconds: float | None = None
    speed: Spread | None = None
    ratio: Spread | None = None


class Row(_Found):
    """One task.

    Attributes:
        task: what was done.
        systems: by name; those that can't do it at all are absent.
        others: share of the processors that strangers took meanwhile, from 0 to 1.
        idle: share that the waiting workers took meanwhile.
    """

    task: Task
    systems: dict[str, Speed]
    others: float
    idle: float


class Agreement(_Found):
    """How far one system at one precision computes what transformers in float32 computes.

    Attributes:
        logits: largest difference of the last positions' logits, each row centred, over the
            largest of them, for 8 prompts of 512 tokens.
        first_tokens: of those 8 prompts' best next tokens, how many are equal.
        greedy: of 32 tokens written greedily after the first prompt, how many are equal before the
            first that is not.
        loss: relative difference of the first training step's loss; `None` if it does not train.
        gradient_norm: the same of the gradient's norm.
    """

    system: str
    precision: Precision
    logits: float
    first_tokens: int
    greedy: int
    loss: float | None = None
    gradient_norm: float | None = None


class Missing(_Found):
    """A system that did not take part at a precision, and why, on one line."""

    system: str
    precision: Precision | None
    reason: str


class Found(_Found):
    """Everything.

    Attributes:
        scope: "full" or "short".
        limits: GFLOP/s and GB/s; see `bench.limits`.
        loading: seconds until each system had the model and could be asked.
        growth: of `bench.growth`: one mapping a measured point.
        startup: of `bench.startup`: seconds by name.
        kernels: of `bench.kernels`: `rows`, one mapping an operation; or `failed` and why; and of
            `bench.shares`: `starting` and `shares`.
    """

    scope: str
    date: str
    machine: dict[str, str]
    threads: int
    rounds: int
    versions: dict[str, str]
    limits: dict[str, float] = {}
    missing: list[Missing] = []
    agreement: list[Agreement] = []
    rows: list[Row] = []
    loading: dict[str, float] = {}
    growth: list[dict[str, Any]] = []
    startup: dict[str, Any] = {}
    kernels: dict[str, Any] = {}
