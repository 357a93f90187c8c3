"""The figures of docs/phases/3-distribution.md: a table between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.marks import replaced
from ds_model import ModelConfig
from ds_train.plan import CLUSTERS, PUBLISHED, compare, search

MIB, GIB = 2**20, 2**30


def publish(found: dict[str, Any], out: Path) -> None:
    """Put the tables into the page under `out`."""
    page = out / "phases" / "3-distribution.md"
    text = page.read_text(encoding="utf-8")
    tables = "\n\n".join([table(found["points"]), held_table(found["held"])])
    text = replaced(replaced(text, tables), plan_figures(found["here"]), of="the plan")
    page.write_text(text, encoding="utf-8")


def plan_figures(here: dict[str, float] | None) -> str:
    """Return plans beside published runs, what a search finds, and a step of this machine.

    Args:
        here: seconds of a step, "planned" and "measured"; `None` if that was not measured.
    """
    titles = ["run", "published, tokens/s and device", "planned", "error", "source"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for run, plan, error in compare():
        cells = [run.name, f"{run.tokens_per_second:,.0f}", f"{plan.tokens_per_second:,.0f}"]
        cells += ["fitted" if run.fitted else f"{error:+.0%}", run.source]
        lines.append(f"| {' | '.join(cells)} |")
    paper = PUBLISHED[0].recipe
    best, *_ = search(
        ModelConfig.preset("v3-671b"),
        CLUSTERS["h800"],
        paper.devices,
        paper.batch,
        paper.sequence,
        paper.precision,
    )
    how = best.recipe
    said = (
        f"Left to itself the search finds for {how.devices:,} H800: pp {how.pp} x ep {how.ep} x dp "
        f"{how.dp}, {how.schedule}, recompute {how.recompute}, {best.peak / GIB:.0f} of "
        f"{best.cluster.memory:g} GiB."
    )
    if here:
        said += (
            " On this machine, measured with `--measure` and nothing fitted, a step of preset "
            f"`bench` of 8 x 256 tokens in float32 is planned to take {here['planned']:.2f} s, and "
            f"took {here['measured']:.2f} s."
        )
    return "\n".join([*lines, "", said])


def held_table(points: Sequence[dict[str, Any]]) -> str:
    """Return one row a schedule and pipeline rank."""
    titles = ["two pipeline ranks", "rank", "micro-batches held", "closed form [MiB a sequence]"]
    titles += ["tensors", "difference", "as it comes", "difference"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for point in points:
        expected = point["expected"] / MIB
        cells = [point["schedule"], str(point["rank"]), str(point["in_flight"])]
        cells.append(f"{expected:.1f}")
        for found in (point["tensors"] / MIB, point["measured"] / MIB):
            cells += [f"{found:.1f}", f"{found / expected - 1:+.0%}"]
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
