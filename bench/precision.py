"""Does FP8 train as well as BF16? Preset `mini`, the same batches in every precision.

`python -m bench.precision` trains each variant with each seed and writes docs/assets/fp8.json, the
plot and the figures in docs/phases/1-fp8.md. What is done already is kept: a run that was stopped
goes on with the variants and seeds that are missing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import keras
from pydantic import BaseModel, ConfigDict

from bench.growth import run_case
from bench.precision_report import publish
from bench.process import ROOT
from bench.text import packed
from ds_train import Callback, StepMetrics, TrainConfig, Trainer
from ds_train.data import TokenFile
from ds_train.quickstart import quickstart_config

DOCS = ROOT / "docs"
WORK = ROOT / "build" / "precision"
EVERY = 10  # steps that one number of a curve is the mean of
LAST = 50  # steps that are compared
# What is set in [train] and [fp8], by name as the page shows it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "BF16": ("mixed_bfloat16", {}),
    "FP8": ("fp8", {}),
    "FP8, scales powers of two": ("fp8", {"power_of_two": True}),
    "FP8, one scale a tensor": ("fp8", {"scaling": "tensor"}),
    "FP8, gradients in E5M2": ("fp8", {"gradient_format": "E5M2"}),
    "FP8, sums of 14 bits": ("fp8", {"accumulator_bits": 14}),
    "FP8, sums of 14 bits, promoted every 128": (
        "fp8",
        {"accumulator_bits": 14, "promote_every": 128},
    ),
}
POLICIES = ("BF16", "FP8", "float32")  # whose memory is measured


class Run(BaseModel):
    """One training run.

    Attributes:
        curve: cross-entropy of the next token [nats], means over 10 steps.
        last: mean over the last 50 steps.
        step_seconds: median time of a step.
    """

    model_config = ConfigDict(extra="forbid")

    variant: str
    seed: int
    steps: int
    curve: list[float]
    last: float
    step_seconds: float


class Found(BaseModel):
    """Everything that was measured.

    Attributes:
        memory: of `bench.cases.held`, by policy.
    """

    model_config = ConfigDict(extra="forbid")

    runs: list[Run] = []
    memory: dict[str, dict[str, Any]] = {}


def config_of(variant: str, steps: int, seed: int) -> TrainConfig:
    """Return the quickstart's run in another precision; bfloat16 moments, as in the paper.

    A fifth of its learning rate: the faster a run learns, the further apart those end that differ
    in rounding alone.
    """
    policy, fp8 = VARIANTS[variant]
    tables = quickstart_config(steps, seed).model_dump()
    tables["train"]["dtype_policy"] = policy
    tables["fp8"].update(fp8)
    tables["optimizer"]["moments"] = "bfloat16"
    tables["schedule"].update(peak=1e-3, floor=1e-4, final=3e-5)
    tables["checkpoint"]["every"] = steps
    return TrainConfig.from_dict(tables, source=variant)


class _Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._then = time.perf_counter()

    def on_step(self, metrics: StepMetrics) -> None:
        """Keep what is plotted, and say something now and then."""
        now = time.perf_counter()
        self.losses.append(metrics.cross_entropy)
        self.seconds.append(now - self._then)
        self._then = now
        if metrics.step % 100 == 0:
            print(
                f"  step {metrics.step}: {metrics.cross_entropy:.4f}", file=sys.stderr, flush=True
            )


def train(variant: str, steps: int, seed: int, tokens: TokenFile) -> Run:
    """Do one run, from its start."""
    keras.backend.clear_session()
    gc.collect()
    heard = _Losses()
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        Trainer(config_of(variant, steps, seed), tokens, folder, callbacks=[heard]).train()
    means = [
        statistics.fmean(heard.losses[at : at + EVERY]) for at in range(0, len(heard.losses), EVERY)
    ]
    return Run(
        variant=variant,
        seed=seed,
        steps=steps,
        curve=[round(value, 5) for value in means],
        last=round(statistics.fmean(heard.losses[-LAST:]), 6),
        step_seconds=round(statistics.median(heard.seconds), 4),
    )


def in_order(variants: list[str], seeds: int) -> list[tuple[str, int]]:
    """Return what to train: the three precisions with all seeds, then the rest seed by seed."""
    main = [name for name in POLICIES if name in variants]
    rest = [name for name in variants if name not in POLICIES]
    found = [(name, seed) for seed in range(seeds) for name in main]
    return found + [(name, seed) for seed in range(seeds) for name in rest]


def read(data: Path) -> Found:
    """Return what earlier runs found."""
    if not data.exists():
        return Found()
    return Found.model_validate_json(data.read_text(encoding="utf-8"))


def keep(found: Found, data: Path) -> None:
    """Write the data; nothing measured is lost."""
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Return the command line's."""
    made = argparse.ArgumentParser(prog="bench.precision", description=__doc__)
    flag = made.add_argument
    flag("--steps", type=int, default=600, help="of each run [600]")
    flag("--seeds", type=int, default=3, help="runs of each variant [3]")
    flag("--variants", default="", help="semicolon-separated names, instead of all")
    flag("--again", action="store_true", help="forget what was measured before")
    flag("--render", action="store_true", help="write the page again from its data")
    flag("--out", type=Path, default=DOCS, help="the folder of the page [docs]")
    return made


def main() -> int:
    """Train what is missing, measure memory, write the page."""
    given = parser().parse_args()
    data = given.out / "assets" / "fp8.json"
    found = Found() if given.again else read(data)
    if not given.render:
        wanted = [name for name in given.variants.split(";") if name] or list(VARIANTS)
        _, tokens, _ = packed(WORK)
        done = {(run.variant, run.seed, run.steps) for run in found.runs}
        for variant, seed in in_order(wanted, given.seeds):
            if (variant, seed, given.steps) in done:
                continue
            print(f"{variant}, seed {seed}", file=sys.stderr, flush=True)
            found.runs.append(train(variant, given.steps, seed, tokens))
            keep(found, data)
        for name in POLICIES:
            if name not in found.memory:
                policy, _ = VARIANTS[name]
                found.memory[name] = run_case("held", {"policy": policy})
                keep(found, data)
    publish(found.model_dump(), list(VARIANTS), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
