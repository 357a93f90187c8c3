"""The figures of docs/phases/1-fp8.md: tables between two marks, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.growth_plots import COLOURS, MARKERS
from bench.marks import replaced

MIB = 2**20
TARGET = 0.25  # per cent
REFERENCE = "BF16"


def publish(found: dict[str, Any], variants: Sequence[str], out: Path) -> None:
    """Put tables into the page under `out` and draw its plot."""
    by_name = runs_by_variant(found["runs"], variants)
    page = out / "phases" / "1-fp8.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(replaced(text, figures(found, by_name)), encoding="utf-8")
    if by_name:
        draw(by_name, out / "assets" / "fp8-loss.png")


def runs_by_variant(
    runs: Sequence[dict[str, Any]], variants: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each variant, by seed, in the order of `variants`."""
    found = {}
    for name in variants:
        chosen = sorted((run for run in runs if run["variant"] == name), key=lambda r: r["seed"])
        if chosen:
            found[name] = chosen
    return found


def figures(found: dict[str, Any], by_name: dict[str, list[dict[str, Any]]]) -> str:
    """Return the tables."""
    return "\n\n".join([losses(by_name), *memory(found["memory"], by_name)])


def losses(by_name: dict[str, list[dict[str, Any]]]) -> str:
    """Return one row a variant: its last losses, and how far they are from BF16's, by seed."""
    titles = ["trained with", "seeds", "cross-entropy of the last 50 steps [nats]"]
    titles += ["above BF16, mean (each seed)", "within 0.25%"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    reference = {run["seed"]: run["last"] for run in by_name.get(REFERENCE, [])}
    for name, runs in by_name.items():
        last = [run["last"] for run in runs]
        spread = f"{statistics.fmean(last):.4f} ({min(last):.4f} to {max(last):.4f})"
        paired = [
            (r["last"] / reference[r["seed"]] - 1) * 100 for r in runs if r["seed"] in reference
        ]
        if name == REFERENCE or not paired:
            lines.append(f"| {name} | {len(runs)} | {spread} | - | - |")
            continue
        mean = statistics.fmean(paired)
        each = ", ".join(f"{value:+.2f}%" for value in paired)
        verdict = "yes" if mean <= TARGET else "no"
        lines.append(f"| {name} | {len(runs)} | {spread} | {mean:+.2f}% ({each}) | {verdict} |")
    return "\n".join(lines)


def memory(
    measured: dict[str, dict[str, Any]], by_name: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """Return what each precision holds and how long a step takes."""
    good = {name: found for name, found in measured.items() if "failed" not in found}
    if not good:
        return []
    titles = ["", "float32 weights", "8-bit copies within a step", "moments"]
    titles += ["what a step adds at its peak", "a step of the runs above [s]"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, held in good.items():
        times = [run["step_seconds"] for run in by_name.get(name, [])]
        time = f"{statistics.median(times):.2f}" if times else "-"
        sizes = [held[key] / MIB for key in ("weights", "small_weights", "moments", "step")]
        cells = " | ".join(f"{size:.1f} MiB" for size in sizes)
        lines.append(f"| {name} | {cells} | {time} |")
    return ["\n".join(lines)]


def draw(by_name: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw curves of all variants, and how far each is from BF16 at the end."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (name, runs) in enumerate(by_name.items()):
        means = [
            statistics.fmean(values) for values in zip(*(r["curve"] for r in runs), strict=True)
        ]
        steps = [10 * (i + 1) for i in range(len(means))]
        style = "--" if place >= len(COLOURS) else "-"
        curve.plot(steps, means, style, color=COLOURS[place % len(COLOURS)], label=name)
    curve.set_xlabel("step")
    curve.set_ylabel("cross-entropy [nats], mean of the seeds")
    lowest = min(min(run["curve"]) for runs in by_name.values() for run in runs)
    curve.set_ylim(lowest - 0.1, lowest + 2.0)
    curve.grid(alpha=0.3)
    curve.legend(frameon=False, fontsize=8)
    reference = {run["seed"]: run["last"] for run in by_name.get(REFERENCE, [])}
    names = [name for name in by_name if name != REFERENCE]
    for place, name in enumerate(names):
        for run in by_name[name]:
            if run["seed"] not in reference:
                continue
            above = (run["last"] / reference[run["seed"]] - 1) * 100
            marker = MARKERS[run["seed"] % len(MARKERS)]
            bars.plot(above, place, marker, color=COLOURS[0], alpha=0.8)
    bars.axvline(0, color="black", linewidth=0.8)
    bars.axvspan(-TARGET, TARGET, color=COLOURS[2], alpha=0.15, label="within 0.25% of BF16")
    bars.set_yticks(range(len(names)), [name.replace(", ", ",\n", 1) for name in names], fontsize=8)
    bars.invert_yaxis()
    bars.set_xlabel("last 50 steps above BF16 [%], a mark a seed")
    bars.legend(frameon=False, fontsize=8)
    bars.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
