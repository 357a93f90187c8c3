"""Ranks that Ray starts: one is killed, Ray starts all anew, and the run ends in the same numbers.

Run by `nox -s ray`: Ray is large, and takes a minute to start and start anew.
"""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest

from conftest import MODEL, losses
from ds_train import CheckpointError
from ds_train.parallel.on_ray import train_on_ray

CONFIG = f"""
[model]
{chr(10).join(f"{key} = {value!r}" for key, value in MODEL.items())}
[data]
sequence_length = 16
held_out = 0.1
[schedule]
peak = 1e-2
warmup_steps = 2
[train]
steps = 200
batch_size = 4
log_every = 1
[checkpoint]
every = 2
[parallel]
dp = 2
"""
SECONDS = 400


def command(folder, out, *more):
    words = ["launch", "--config", str(folder / "train.toml"), "--data", str(folder / "texts")]
    run = "from ds_train.cli import main; main()"
    return [sys.executable, "-c", run, *words, "--out", str(out), *more]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.toml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "texts").mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        words = " ".join(str(number) for number in random.integers(0, 500, 400))
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(words, encoding="utf-8")
    return tmp_path


@pytest.mark.ranks
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray; nox -s ray has it")
def test_a_killed_worker_is_started_anew(folder):
    out = folder / "out"
    log = folder / "log.txt"
    with (
        log.open("w", encoding="utf-8") as heard,
        subprocess.Popen(  # noqa: S603 - ourselves
            command(folder, out, "--ray", "1"), stdout=heard, stderr=subprocess.STDOUT
        ) as process,
    ):
        deadline = time.monotonic() + SECONDS
        while not list((out / "checkpoints").glob("step-*/manifest.json")):
            assert process.poll() is None, log.read_text(encoding="utf-8")[-2000:]
            assert time.monotonic() < deadline
            os.sched_yield()
        said = log.read_text(encoding="utf-8")
        killed = re.findall(r"rank 1 of 2 \([^,]+, process (\d+)\)", said)
        os.kill(int(killed[-1]), signal.SIGKILL)
        assert process.wait(SECONDS) == 0, log.read_text(encoding="utf-8")[-2000:]
    said = log.read_text(encoding="utf-8")
    started = set(re.findall(r"rank 1 of 2 \([^,]+, process (\d+)\)", said))
    assert len(started) == 2, "Ray did not start the ranks anew"
    calm = folder / "calm"
    subprocess.run(  # noqa: S603 - ourselves
        command(folder, calm, "--nproc", "2"), check=True, capture_output=True
    )
    np.testing.assert_allclose(losses(out), losses(calm), rtol=1e-5)


def test_a_run_that_is_not_to_go_on_is_refused_before_ray_starts(finished, tmp_path):
    config = finished.trainer.config
    with pytest.raises(CheckpointError, match="has checkpoints up to step 6"):
        train_on_ray(config, [tmp_path], finished.out, resume=False, restarts=1)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is here")
def test_without_ray_one_line_says_what_to_install(folder):
    run = subprocess.run(  # noqa: S603 - ourselves
        command(folder, folder / "out", "--ray", "1"), capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "pip install 'ds-train[ray]'" in run.stderr.splitlines()[-1]
