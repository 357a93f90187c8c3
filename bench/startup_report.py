"""The page's section on start-up, from what `startup` measured."""

from __future__ import annotations

from typing import Any

GIB = 2**30
IMPORT_TARGET, STEP_TARGET, TOKEN_TARGET = 0.2, 6.0, 3.0  # seconds


def startup_section(found: dict[str, Any], notes: dict[str, str]) -> str:
    """Return the section on start-up, beside what is aimed at."""
    if not found:
        return ""
    imports = found["imports"]
    over = imports["ds_attention"] - imports["tensorflow"]
    rows: list[tuple[str, float, float | None]] = []
    rows.append(("`import ds_attention` beyond `import tensorflow`", over, IMPORT_TARGET))
    rows += [
        (f"`import {name}`", seconds, None)
        for name, seconds in imports.items()
        if name != "ds_attention"
    ]
    train = found["train"]
    if "failed" not in train:
        rows.append(("first training step, 8 x 256, float32", train["first_seconds"], STEP_TARGET))
        rows.append(("a later one", train["seconds"], None))
    read = []
    for precision in ("float32", "bfloat16"):
        first = found[f"first_token_{precision}"]
        if "failed" in first:
            continue
        name = "first decoded token after the weights are read, 512 before"
        rows.append((f"{name}, {precision}", first["first_token_seconds"], TOKEN_TARGET))
        rows.append((f"reading the weights, {precision}", first["load_seconds"], None))
        read.append(
            f"Reading the weights as {precision} held {first['load_peak'] / GIB:.2f} GiB at its "
            f"peak for a file of {first['file_bytes'] / GIB:.2f} GiB, of which "
            f"{first['load_read'] / first['file_bytes']:.0%} went through `read`, the rest through "
            "a memory map."
        )
    lines = ["## Start-up", "", "| | seconds | target |", "|---|---|---|"]
    for name, seconds, target in rows:
        aim = "-" if target is None else f"{target:g}: {'met' if seconds <= target else 'not met'}"
        lines.append(f"| {name} | {seconds:.2f} | {aim} |")
    failed = [f"- {name}: {value['failed']}" for name, value in found.items() if "failed" in value]
    extra = [notes["startup"]] if notes.get("startup") else []
    return "\n\n".join(["\n".join(lines), *read, *failed, *extra])
