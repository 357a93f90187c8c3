"""Does the bias keep experts even, and what does evenness cost? Preset `mini`, the same batches.

`python -m bench.balance` trains each way of balancing with each seed, scores the text that was held
out, and writes docs/assets/balance.json, the plot and the figures in docs/phases/2-experts.md. What
is done already is kept: a run that was stopped goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from pydantic import BaseModel, ConfigDict

from bench.balance_report import publish
from bench.process import ROOT
from bench.text import packed
from ds_model import Tokenizer
from ds_train import Callback, StepMetrics, TrainConfig, Trainer
from ds_train.data import Document, TokenFile
from ds_train.evaluation import bits_per_byte
from ds_train.quickstart import quickstart_config

DOCS = ROOT / "docs"
WORK = ROOT / "build" / "balance"
EVERY = 20  # steps that one number of a curve is the mean of
LAST = 100  # steps that are compared
# What is set in [loss], by name as the page shows it.
VARIANTS: dict[str, dict[str, float]] = {
    "bias": {"bias_update_speed": 0.01, "balance_alpha": 0.0},
    "bias and a small loss, as in V3": {"bias_update_speed": 0.01, "balance_alpha": 1e-4},
    "loss, alpha 0.01": {"bias_update_speed": 0.0, "balance_alpha": 0.01},
    "loss, alpha 0.1": {"bias_update_speed": 0.0, "balance_alpha": 0.1},
    "nothing": {"bias_update_speed": 0.0, "balance_alpha": 0.0},
}


class Run(BaseModel):
    """One training run.

    Attributes:
        max_violation: for each layer MaxVio of a step's load, means over 20 steps.
        variation: for each layer the coefficient of variation of a step's load, the same.
        last_variation: for each layer that of the last 100 steps' load together: what the draw of
            one batch adds is gone.
        least: for each layer the smallest load of an expert in those, over an even share.
        bits_per_byte: of the text that was held out.
    """

    model_config = ConfigDict(extra="forbid")

    variant: str
    seed: int
    steps: int
    max_violation: list[list[float]]
    variation: list[list[float]]
    last_variation: list[float]
    least: list[float]
    bits_per_byte: float


class Found(BaseModel):
    """Everything that was measured."""

    model_config = ConfigDict(extra="forbid")

    runs: list[Run] = []


def config_of(variant: str, steps: int, seed: int) -> TrainConfig:
    """Return the quickstart's run, balanced in another way."""
    tables = quickstart_config(steps, seed).model_dump()
    # The bias moves to the end: what is compared is how even it keeps the load.
    tables["loss"].update(VARIANTS[variant], bias_update_until=1.0)
    tables["checkpoint"]["every"] = steps
    return TrainConfig.from_dict(tables, source=variant)


class _Loads(Callback):
    def __init__(self) -> None:
        self.loads: list[np.ndarray] = []

    def on_step(self, metrics: StepMetrics) -> None:
        """Keep the loads, and say something now and then."""
        self.loads.append(metrics.loads.astype(np.float64))
        if metrics.step % 100 == 0:
            worst = max(metrics.max_violation)
            said = f"  step {metrics.step}: {metrics.cross_entropy:.4f}, MaxVio {worst:.2f}"
            print(said, file=sys.stderr, flush=True)


def variation(loads_LE: np.ndarray) -> np.ndarray:
    """Return the coefficient of variation of each row, `[..., L, E]` to `[..., L]`."""
    return np.asarray(loads_LE.std(axis=-1) / loads_LE.mean(axis=-1))


def curves(loads_NLE: np.ndarray) -> dict[str, list[list[float]]]:
    """Return both measures of evenness, by layer, as means over some steps."""
    violation = loads_NLE.max(axis=-1) / loads_NLE.mean(axis=-1) - 1

    def means(values_NL: np.ndarray) -> list[list[float]]:
        starts = range(0, len(values_NL), EVERY)
        rows = [values_NL[at : at + EVERY].mean(axis=0) for at in starts]
        return [[round(float(value), 4) for value in layer] for layer in np.array(rows).T]

    return {"max_violation": means(violation), "variation": means(variation(loads_NLE))}


def train(
    variant: str,
    steps: int,
    seed: int,
    tokenizer: Tokenizer,
    tokens: TokenFile,
    held_out: list[Document],
) -> Run:
    """Do one run, from its start, and score the text that was held out."""
    keras.backend.clear_session()
    heard = _Loads()
    config = config_of(variant, steps, seed)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        model = Trainer(config, tokens, folder, callbacks=[heard]).train()
    scored = bits_per_byte(model, tokenizer, held_out, config.data.sequence_length)
    last_LE = np.sum(heard.loads[-LAST:], axis=0)
    return Run(
        variant=variant,
        seed=seed,
        steps=steps,
        **curves(np.array(heard.loads)),
        last_variation=[round(float(value), 4) for value in variation(last_LE)],
        least=[round(float(v), 4) for v in last_LE.min(axis=-1) / last_LE.mean(axis=-1)],
        bits_per_byte=round(scored.bits_per_byte, 5),
    )


def read(data: Path) -> Found:
    """Return what earlier runs found."""
    if not data.exists():
        return Found()
    return Found.model_validate_json(data.read_text(encoding="utf-8"))


def parser() -> argparse.ArgumentParser:
    """Return the command line's."""
    made = argparse.ArgumentParser(prog="bench.balance", description=__doc__)
    flag = made.add_argument
    flag("--steps", type=int, default=600, help="of each run [600]")
    flag("--seeds", type=int, default=2, help="runs of each variant [2]")
    flag("--again", action="store_true", help="forget what was measured before")
    flag("--render", action="store_true", help="write the page again from its data")
    flag("--out", type=Path, default=DOCS, help="the folder of the page [docs]")
    return made


def main(words: list[str] | None = None) -> int:
    """Train what is missing, write the page."""
    given = parser().parse_args(words)
    data: Path = given.out / "assets" / "balance.json"
    found = Found() if given.again else read(data)
    if not given.render:
        text = packed(WORK)
        done = {(run.variant, run.seed, run.steps) for run in found.runs}
        wanted: list[tuple[str, int]] = [
            (name, seed) for seed in range(given.seeds) for name in VARIANTS
        ]
        for variant, seed in wanted:
            if (variant, seed, given.steps) in done:
                continue
            print(f"{variant}, seed {seed}", file=sys.stderr, flush=True)
            found.runs.append(train(variant, given.steps, seed, *text))
            data.parent.mkdir(parents=True, exist_ok=True)
            data.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    runs: list[dict[str, Any]] = [run.model_dump() for run in found.runs]
    publish(runs, list(VARIANTS), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
