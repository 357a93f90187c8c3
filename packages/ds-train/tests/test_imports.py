"""Importing a package costs TensorFlow's own import, and next to nothing more.

What is imported is what can be checked without a clock. One process serves all, since it takes
seconds to import TensorFlow.
"""

import json
import subprocess
import sys

import pytest

CHECK = """
import json, sys
import tensorflow as tf
packages = lambda: {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
found, before = {}, packages()
for package in sys.argv[1:]:
    __import__(package)
    found[package] = sorted(packages() - before)
    before = packages()
# Refused once a device is in use, as by a tensor made at import: then it is too late for users.
tf.config.threading.set_intra_op_parallelism_threads(1)
print(json.dumps(found))
"""

ADDS = {
    "ds_precision": {"ds_precision"},
    "ds_attention": {"ds_attention"},
    "ds_moe": {"ds_moe"},
    "ds_model": {"ds_model", "jinja2", "markupsafe", "safetensors", "tokenizers"},
    "ds_train": {"ds_train", "pydantic", "pydantic_core", "annotated_types", "typing_inspection"},
}
"""What each package imports that those above it and TensorFlow have not: no torch, no
transformers, no typer, no matplotlib, no server."""


@pytest.fixture(scope="module")
def imported():
    command = [sys.executable, "-c", CHECK, *ADDS]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - ours
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("package", ADDS)
def test_import_brings_only_what_it_needs(imported, package):
    assert set(imported[package]) <= ADDS[package]
