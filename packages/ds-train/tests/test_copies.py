"""Copies of busy experts on ranks that are processes: weights travel, outputs stay."""

import json
import subprocess
import sys
from pathlib import Path

from ds_train.parallel.launch import _environments

RANK = Path(__file__).with_name("copies_rank.py")


def test_a_model_whose_busy_experts_have_copies_says_the_same():
    processes = [
        subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, str(RANK)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in _environments(2)
    ]
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for output in said:
        (line,) = (line for line in output.splitlines() if line.startswith("found "))
        found = json.loads(line.removeprefix("found "))
        assert max(found["dealt out"], found["copied"], found["drafts"]) < 1e-5
        assert found["held"] == [6] * len(found["held"])  # 8 experts and 4 copies on 2 ranks
        assert found["after"] - 1 < 0.5 * (found["busiest"] - 1)
