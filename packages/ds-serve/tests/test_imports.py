"""The server's interface can be imported without TensorFlow, and without its command line."""

import json
import subprocess
import sys

HEAVY = {
    "tensorflow",
    "keras",
    "ds_model",
    "tokenizers",
    "transformers",
    "torch",
    "typer",
    "rich",
    "uvicorn",
    "httpx",
    "matplotlib",
}


def test_import_leaves_the_model_and_the_command_line_alone():
    check = "import json, sys, ds_serve; print(json.dumps(list(sys.modules)))"
    command = [sys.executable, "-c", check]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert {name.partition(".")[0] for name in json.loads(ran.stdout)} & HEAVY == set()
