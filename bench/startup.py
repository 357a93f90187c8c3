"""Start-up: imports, the first training step, reading weights, the first token that is decoded."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

from bench.growth import run_case

ROUNDS = 5
PACKAGES = ("ds_attention", "ds_model", "ds_train")


def measure_startup(model: str) -> dict[str, Any]:
    """Measure everything; seconds by name, medians.

    Args:
        model: the directory that is read.
    """
    found: dict[str, Any] = {"imports": import_seconds(("tensorflow", "keras", *PACKAGES))}
    found["train"] = run_case("train", {"model": model, "batch": 8, "length": 256})
    for precision in ("float32", "bfloat16"):
        given = {"model": model, "precision": precision, "context": 512}
        found[f"first_token_{precision}"] = run_case("first_token", given)
    print(f"start-up: {found}", file=sys.stderr, flush=True)
    return found


def import_seconds(modules: tuple[str, ...]) -> dict[str, float]:
    """Return how long a process takes that imports a module and ends, in turn, medians."""
    times: dict[str, list[float]] = {module: [] for module in modules}
    for _ in range(ROUNDS):
        for module in modules:
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", f"import {module}"],
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
                capture_output=True,
                check=True,
            )
            times[module].append(time.perf_counter() - start)
    return {module: statistics.median(values) for module, values in times.items()}
