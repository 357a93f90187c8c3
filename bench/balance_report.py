"""The figures of docs/phases/2-experts.md: a table between two marks, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.growth_plots import COLOURS
from bench.marks import replaced
from bench.precision_report import runs_by_variant

EVEN = 0.2  # the coefficient of variation to stay below
EVERY = 20


def publish(runs: Sequence[dict[str, Any]], variants: Sequence[str], out: Path) -> None:
    """Put the table into the page under `out` and draw its plot."""
    by_name = runs_by_variant(runs, variants)
    page = out / "phases" / "2-experts.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(replaced(text, table(by_name)), encoding="utf-8")
    if by_name:
        draw(by_name, out / "assets" / "balance.png")


def table(by_name: dict[str, list[dict[str, Any]]]) -> str:
    """Return one row a variant, the least even layer of all seeds counting."""
    titles = ["balanced by", "seeds", "variation of the load, last 100 steps"]
    titles += ["MaxVio of a step, at the end", "least used expert [even shares]"]
    titles += ["bits per byte (each seed)"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, runs in by_name.items():
        worst = max(max(run["last_variation"]) for run in runs)
        violation = max(layer[-1] for run in runs for layer in run["max_violation"])
        least = min(min(run["least"]) for run in runs)
        scores = [run["bits_per_byte"] for run in runs]
        each = ", ".join(f"{score:.3f}" for score in scores)
        cells = [
            name,
            str(len(runs)),
            f"{worst:.3f}{'' if worst < EVEN else ' (not even)'}",
            f"{violation:.2f}",
            f"{least:.2f}",
            f"{statistics.fmean(scores):.3f} ({each})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(by_name: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw both measures over steps, a panel a layer; a line is the mean of the seeds."""
    layers = len(next(iter(by_name.values()))[0]["variation"])
    figure = Figure(figsize=(10, 1.4 + 2.2 * layers), layout="constrained")
    axes = figure.subplots(layers, 2, sharex=True, squeeze=False)
    measures = (("variation", "coefficient of variation"), ("max_violation", "MaxVio"))
    for layer in range(layers):
        for axis, (measure, label) in zip(axes[layer], measures, strict=True):
            for (name, runs), colour in zip(by_name.items(), [*COLOURS, "black"], strict=False):
                values = np.mean([run[measure][layer] for run in runs], axis=0)
                steps = EVERY * (1 + np.arange(len(values)))
                axis.plot(steps, values, color=colour, label=name)
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[layer][0].axhline(EVEN, color="black", linewidth=0.8, linestyle=":")
        what = "the MTP module's" if layer == layers - 1 else f"expert layer {layer}"
        axes[layer][0].set_title(what, loc="left", fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
