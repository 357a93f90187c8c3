"""Progress says the same on a terminal and in a file: which stage, how far, what came of it."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from ds_train import StepMetrics, progress
from ds_train.progress import Stages, TrainingProgress


@pytest.mark.parametrize("terminal", [True, False])
def test_each_stage_ends_with_one_line(terminal, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    out = io.StringIO()
    stages = Stages(Console(file=out, force_terminal=terminal, width=120), 2)
    with stages.stage("packing") as stage:
        stage.report(3, 10)
        stage.summary = "10 documents"
    with stages.stage("saving") as stage:
        stage.summary = "[model]"
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"\[1/2\] packing +\d+\.\d s  10 documents\n", text)
    assert re.search(r"\[2/2\] saving +\d+\.\d s  \[model\]\n", text)
    assert "3/10" in text
    assert list(stages.seconds) == ["packing", "saving"]


def test_training_shows_loss_rate_and_speed(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    out = io.StringIO()
    with Stages(Console(file=out, width=200), 1).stage("training") as stage:
        watcher = TrainingProgress(stage)
        watcher.on_start(40, 100)
        watcher.on_step(
            StepMetrics(41, 5.0, 4.25, 4.5, 3.0, 0.7, 1e-3, 2048.4, (0.1,), np.ones((1, 4)))
        )
    assert "training 40/100  from step 40" in out.getvalue()
    assert (
        "training 41/100  loss 5.000  next token 4.250 nats  rate 1.0e-03  2,048 tokens/s"
        in out.getvalue()
    )
