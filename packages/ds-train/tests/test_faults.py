"""Ranks that are killed, held or told to stop, and ranks that do not belong together."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from conftest import CUT, losses, start, tables, weights
from ds_train import TrainConfig, Trainer, TrainError
from ds_train.parallel.launch import _environments
from ds_train.parallel.worker import RankRun

STEPS = 60


def config_of(**changes):
    """Return a run of two pipeline ranks, which saves every ten steps."""
    found = {
        "model": CUT,
        "parallel": {"pp": 2, "schedule": "zb1p"},
        "train": {"steps": STEPS, "batch_size": 4, "accumulation": 2, "log_every": 1},
        "checkpoint": {"every": 10, "keep": 2},
    }
    for table, values in changes.items():
        found[table] = found[table] | values
    return TrainConfig.from_dict(tables(**found))


@pytest.fixture(scope="session")
def whole(token_file, tmp_path_factory):
    """Return losses and weights of the run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    start(config_of(), token_file, out)
    return losses(out), read_weights(token_file, out)


def read_weights(token_file, out):
    trainer = Trainer(config_of().in_one_process(), token_file, out)
    trainer.train()  # nothing is left to do
    return weights(trainer)


class Fault:
    """Sends one rank a signal, at a step or while a checkpoint is written."""

    def __init__(self, rank, what, out, during_save):
        self.rank, self.what, self.out = rank, what, out
        self.processes = {}
        self.sent = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True) if during_save else None

    def say(self, line):
        if found := re.match(r"rank (\d+) of .* process (\d+)", line):
            self.processes[int(found[1])] = int(found[2])

    def report(self, step, _steps, _note):
        if step < 15 or self.sent.is_set():
            return
        if self.watcher is None:
            self.send()
        elif not self.watcher.is_alive():
            self.watcher.start()

    def send(self):
        self.sent.set()
        os.kill(self.processes[self.rank], self.what)

    def _watch(self):
        while not list((self.out / "checkpoints").glob(".writing-*")):
            self.sent.wait(0.0005)
        self.send()


CASES = {
    "killed": (1, signal.SIGKILL, False, "rank 1 was ended by SIGKILL"),
    "the first killed": (0, signal.SIGKILL, False, "rank 0 was ended by SIGKILL"),
    "held": (1, signal.SIGSTOP, False, "rank 1 is held by a signal and was killed"),
    "told to stop": (1, signal.SIGTERM, False, r"rank \d: told to stop; step \d+ is saved"),
    "killed during a save": (1, signal.SIGKILL, True, "rank 1 was ended by SIGKILL"),
    "the first killed during a save": (0, signal.SIGKILL, True, "rank 0 was ended by SIGKILL"),
}


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_goes_on_in_the_same_bits(case, whole, token_file, tmp_path):
    rank, what, during_save, said = CASES[case]
    fault = Fault(rank, what, tmp_path, during_save)
    with pytest.raises(TrainError, match=said) as caught:
        start(config_of(), token_file, tmp_path, fault.report, fault.say)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoints").exists()

    start(config_of(), token_file, tmp_path)
    expected, values = whole
    np.testing.assert_array_equal(losses(tmp_path), expected)
    for name, found in read_weights(token_file, tmp_path).items():
        np.testing.assert_array_equal(found, values[name], err_msg=name)


def processes(runs, tmp_path, world=2):
    """Start one process a run; return their exit codes and what they said."""
    environments = _environments(world)
    started = []
    for rank, run in enumerate(runs):
        path = tmp_path / f"run-{rank}.json"
        run.write(path)
        command = [sys.executable, "-m", "ds_train.parallel", str(path)]
        environment = environments[rank] | {"DS_TRAIN_JOIN_SECONDS": "10"}
        started.append(
            subprocess.Popen(  # noqa: S603 - ourselves
                command, env=environment, stdout=subprocess.PIPE, text=True
            )
        )
    outputs = [process.communicate(timeout=120)[0] for process in started]
    return [process.returncode for process in started], outputs


def test_ranks_that_mean_different_runs(token_file, tmp_path):
    runs = [
        RankRun(config_of(**change), config_of().model.build(), token_file.path, tmp_path, True)
        for change in ({}, {"train": {"seed": 3}})
    ]
    codes, outputs = processes(runs, tmp_path)
    assert codes == [2, 2]
    for output in outputs:
        assert "rank 1 has another configuration than rank 0" in output


def test_a_rank_that_never_comes(token_file, tmp_path):
    run = RankRun(config_of(), config_of().model.build(), token_file.path, tmp_path, True)
    codes, outputs = processes([run], tmp_path)
    assert codes == [1]
    assert re.fullmatch(r"rank 0: joins .*; ends if not all come within 10 s\n", outputs[0])


def test_a_mesh_of_another_size(token_file, tmp_path):
    run = RankRun(config_of(), config_of().model.build(), token_file.path, tmp_path, True)
    codes, outputs = processes([run], tmp_path, world=3)
    assert codes == [2]
    assert "the mesh pp 2 x ep 1 x dp 1 has 2 ranks and the environment names 3" in outputs[0]


def test_one_process_refuses_a_mesh(token_file, tmp_path):
    with pytest.raises(TrainError, match=r"\[parallel\] describes 2 ranks .* ds-train launch"):
        Trainer(config_of(), token_file, tmp_path)


def test_what_a_rank_is_told_reads_back(token_file, tmp_path):
    run = RankRun(config_of(), config_of().model.build(), token_file.path, tmp_path, True)
    run.write(tmp_path / "run.json")
    assert RankRun.read(tmp_path / "run.json") == run
    assert json.loads((tmp_path / "run.json").read_text())["config"]["parallel"]["pp"] == 2
