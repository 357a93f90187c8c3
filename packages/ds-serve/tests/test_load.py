"""A public load tool, locust, against a real server: no failure, and figures that agree."""

import json
import re
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import wait_for
from ds_serve import Engine, EngineOptions, create_app

FILE = Path(__file__).parent / "locustfile.py"


# Not `importorskip`: importing locust turns this process's threads into gevent's.
@pytest.mark.skipif(find_spec("locust") is None, reason="locust is not installed")
def test_locust_finds_no_failure(model, tokenizer, live):
    engine = Engine(model, EngineOptions(4, 64, 16, 4))
    server = live(create_app(model, tokenizer, "tiny", engine=engine))
    home = server.url.removesuffix("/v1")
    command = [sys.executable, "-m", "locust", "-f", str(FILE), "--headless", "--json"]
    command += ["-u", "8", "-r", "8", "-t", "4s", "--host", home, "--exit-code-on-error", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert ran.returncode == 0, ran.stderr[-2000:]
    entries = {entry["name"]: entry for entry in json.loads(ran.stdout)}
    assert all(entry["num_failures"] == 0 for entry in entries.values())
    asked = sum(entry["num_requests"] for entry in entries.values())
    assert asked > 20
    with urllib.request.urlopen(f"{home}/metrics") as response:  # noqa: S310 - our own
        figures = response.read().decode()
    counted = re.findall(r'ds_serve_requests_total\{.*"/v1/completions".*\} ([\d.]+)', figures)
    assert asked <= sum(map(float, counted)) <= asked + 8  # those cut off at the end
    wait_for(lambda: engine.texts == 0)
    assert engine.scheduler.pool.free == engine.scheduler.pool.blocks
