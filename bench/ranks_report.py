"""The figures of docs/phases/3-distribution.md: a table between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.marks import replaced

MIB = 2**20


def publish(found: dict[str, Any], out: Path) -> None:
    """Put the tables into the page under `out`."""
    page = out / "phases" / "3-distribution.md"
    text = page.read_text(encoding="utf-8")
    tables = "\n\n".join([table(found["points"]), held_table(found["held"])])
    page.write_text(replaced(text, tables), encoding="utf-8")


def held_table(points: Sequence[dict[str, Any]]) -> str:
    """Return one row a schedule and pipeline rank."""
    titles = ["two pipeline ranks", "rank", "micro-batches held", "closed form [MiB a sequence]"]
    titles += ["measured", "difference"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for point in points:
        expected, measured = point["expected"] / MIB, point["measured"] / MIB
        cells = [point["schedule"], str(point["rank"]), str(point["in_flight"])]
        cells += [f"{expected:.1f}", f"{measured:.1f}", f"{measured / expected - 1:+.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(points: Sequence[dict[str, Any]]) -> str:
    """Return one row a mesh."""
    titles = ["mesh", "processes", "a step [s]", "of one process", "processor time [s]"]
    titles += ["of one process", "idle: measured / schedule's", "sent [MiB]", "of the least"]
    titles += ["first step [s]"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    whole = next((p for p in points if p["mesh"] == "one process"), None)
    cut = next((p for p in points if p["mesh"] == "one process, 4 micro-batches"), None)
    for point in points:
        # Small micro-batches cost more by themselves: a pipeline stands beside one that has them.
        one = cut if cut and "pp" in point["mesh"] else whole
        cells = [point["mesh"], str(point["ranks"]), f"{point['step_seconds']:.3f}"]
        cells += ["-", f"{point['processor_seconds']:.3f}", "-"]
        if one and one is not point:
            cells[3] = f"{point['step_seconds'] / one['step_seconds']:.2f}"
            cells[5] = f"{point['processor_seconds'] / one['processor_seconds']:.2f}"
        if point["ranks"] == 2:
            busy = point["processor_seconds"] / (point["ranks"] * point["step_seconds"])
            cells.append(f"{max(0.0, 1 - busy):.0%} / {point['bubble']:.0%}")
        else:
            cells.append("-")
        if point["least_bytes"]:
            cells.append(f"{point['bytes'] / MIB:.1f}")
            cells.append(f"{point['bytes'] / point['least_bytes']:.2f}")
        else:
            cells += ["-", "-"]
        cells.append(f"{point['first_seconds']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
