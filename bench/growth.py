"""How cost grows: with experts, context, batch, depth, width, and the memory of training.

Every point is measured in a fresh process (`bench.case`), for its peak memory's sake.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.memory import training_bytes
from bench.process import ROOT
from bench.tasks import PRESET
from ds_model import ModelConfig

GROUPS = ("experts", "context", "batch", "size", "memory")
CONTEXT_ROOM = 64  # positions past the longest context


@dataclass(frozen=True)
class Point:
    """One point of a curve.

    Attributes:
        group: of `GROUPS`.
        x: where on the curve.
        series: which curve, where a group has several.
        case: of `bench.cases`.
        arguments: of the case.
    """

    group: str
    x: int
    series: str
    case: str
    arguments: dict[str, Any] = field(default_factory=dict)


def points(model: str) -> list[Point]:
    """Return all points.

    Args:
        model: the directory that training reads.
    """
    found = []
    for experts in (32, 64, 128, 256):
        changed = {"n_routed_experts": experts}
        written = {"batch": 1, "context": 512, "new": 64, **changed}
        found.append(Point("experts", experts, "decode", "decode", written))
        # 128 tokens an expert: as many as 1024 tokens give 32 experts, of which 4 are chosen.
        trained = {"batch": experts // 8, "length": 256, **changed}
        found.append(Point("experts", experts, "step", "step", trained))
    for context in (512, 2048, 8192, 32768):
        long = {"max_position_embeddings": context + CONTEXT_ROOM}
        read = {"batch": 1, "context": context, "new": 32, **long}
        found.append(Point("context", context, "float32", "decode", read))
    for batch in (1, 2, 4, 8, 16, 32, 64):
        for precision in ("float32", "bfloat16"):
            rows = {"batch": batch, "context": 512, "new": 32, "precision": precision}
            found.append(Point("batch", batch, precision, "decode", rows))
    square = {"batch": 8, "length": 256}
    for layers in (4, 8, 16):
        deep = {**square, "num_hidden_layers": layers}
        found.append(Point("size", layers, "layers", "step", deep))
    for hidden in (256, 512, 1024):
        wide = {**square, **scaled(hidden)}
        found.append(Point("size", hidden, "width", "step", wide))
    for batch in (2, 4, 8, 16):
        whole = {"model": model, "batch": batch, "length": 256}
        found.append(Point("memory", batch, "kept", "train", whole))
        found.append(Point("memory", batch, "recomputed", "train", {**whole, "recompute": "block"}))
    return found


def scaled(hidden: int) -> dict[str, int]:
    """Return preset `bench`'s widths, all scaled with the hidden one; heads keep their size."""
    names = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "q_lora_rank": 192,
        "kv_lora_rank": 128,
        "moe_intermediate_size": 256,
    }
    return {name: value * hidden // 512 for name, value in names.items()}


def measure_growth(model: str, groups: Sequence[str]) -> list[dict[str, Any]]:
    """Measure the points of some groups, one process after the other.

    Returns:
        For each point `group`, `x`, `series` and what its case found, or `failed` and why.
    """
    found = []
    for point in points(model):
        if point.group not in groups:
            continue
        values = run_case(point.case, point.arguments)
        print(
            f"{time.strftime('%H:%M:%S')} {point.group} {point.x} {point.series}: {values}",
            file=sys.stderr,
            flush=True,
        )
        if point.group == "memory":
            config = ModelConfig.preset(PRESET)
            tokens = point.arguments["batch"] * point.arguments["length"]
            remade = point.arguments.get("recompute") == "block"
            values["expected"] = training_bytes(config, tokens, recompute=remade)
        where = {"group": point.group, "x": point.x, "series": point.series}
        found.append(where | point.arguments | values)
    return found


def run_case(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Measure one case in a fresh process; one that dies says with what status."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.case", name, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode or not run.stdout.strip():
        last = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"failed": f"ended with status {run.returncode}: {last[:160]}"}
    values: dict[str, Any] = json.loads(run.stdout)
    return values
