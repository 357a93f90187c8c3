"""Pictures of a run: losses, what rounding does, memory; needs the extra `plot`.

Of experts see `ds_moe.figures`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure

from ds_model import CausalLM
from ds_precision.figures import PALETTE
from ds_train.memory import TrainingMemory
from ds_train.parallel import Schedule, Timetable
from ds_train.plan import Plan

__all__ = [
    "expert_layer_names",
    "plot_loss",
    "plot_memory",
    "plot_plan",
    "plot_schedule",
    "plot_stability",
    "plot_training_memory",
]

_BLUE, _ORANGE, _GREEN = PALETTE["blue"], PALETTE["orange"], PALETTE["green"]


class Timeline(Protocol):
    """What `plot_memory` draws.

    Attributes:
        seconds: When it was looked, from 0.
        bytes: What the process held then.
        before: What it held at first.
    """

    seconds: Sequence[float]
    bytes: Sequence[int]
    before: int


def plot_loss(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw cross-entropies and learning rate over steps.

    Args:
        rows: The lines of a run's `metrics.jsonl`, each a mapping.
    """
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot(steps, [r["cross_entropy"] for r in rows], color=_BLUE, label="next token")
    if any(row["mtp_cross_entropy"] for row in rows):
        upper.plot(
            steps,
            [r["mtp_cross_entropy"] for r in rows],
            color=_ORANGE,
            linestyle="--",
            label="tokens further ahead (MTP)",
        )
    upper.set_ylabel("cross-entropy [nats per token]")
    upper.set_title("Training loss")
    upper.legend(frameon=False)
    upper.grid(alpha=0.3)
    lower.plot(steps, [row["learning_rate"] for row in rows], color=_GREEN)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("optimizer step")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.grid(alpha=0.3)
    return figure


def plot_stability(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw what rounding does over steps, and each layer's gradient norm.

    Operands are drawn by kind, the worst of each at every look: inputs, weights, gradients.

    Args:
        rows: The lines of a run's `stability.jsonl`, each a mapping.
    """
    steps = [row["step"] for row in rows]
    has_operands = any(row["operands"] for row in rows)
    figure = Figure(figsize=(8, 10 if has_operands else 4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(4 if has_operands else 1, 1, sharex=True))
    if has_operands:
        panels: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
            ("underflow", "share that became 0", max),
            ("amax", "largest magnitude", max),
            ("drift", "drift of a scale [powers of 2]", lambda values: max(values, key=abs)),
        )
        kinds = {"input": (_BLUE, "-"), "weight": (_ORANGE, "--"), "gradient": (_GREEN, ":")}
        for axis, (field, label, worst) in zip(axes, panels, strict=False):
            for kind, (colour, style) in kinds.items():
                found = [
                    [s[field] for name, s in row["operands"].items() if name.endswith(kind)]
                    for row in rows
                ]
                values = [worst(each) if each else np.nan for each in found]
                axis.plot(steps, values, style, color=colour, label=f"{kind}s", marker=".")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[1].set_yscale("log")
        axes[0].legend(frameon=False)
        axes[0].set_title("Rounding to 8 bits: the worst operand of each kind")
    layers: dict[str, list[float]] = {}
    for row in rows:
        squares: dict[str, float] = {}
        for path, norm in row["gradient_norms"].items():
            layer = path.partition("/")[0]
            squares[layer] = squares.get(layer, 0.0) + norm**2
        for layer, square in squares.items():
            layers.setdefault(layer, []).append(square**0.5)
    norms_LN = np.asarray(list(layers.values()), np.float64)
    below = norms_LN[norms_LN > 0]
    field = axes[-1].pcolormesh(
        steps,
        np.arange(len(layers)),
        np.log10(np.maximum(norms_LN, below.min() if below.size else 1.0)),
        cmap="viridis",
    )
    axes[-1].set_yticks(range(len(layers)), list(layers), fontsize="small")
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_title("Gradient norm of each layer", fontsize="medium")
    figure.colorbar(field, ax=axes[-1], label="log10 of the norm")
    return figure


def plot_memory(timelines: Mapping[str, Timeline]) -> Figure:
    """Draw what a process holds over time, beyond what it held before.

    Args:
        timelines: Of `ds_train.notebook.memory_profile`, by the name to show.
    """
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axis = figure.subplots()
    for (name, line), colour in zip(timelines.items(), PALETTE.values(), strict=False):
        held = (np.asarray(line.bytes, np.float64) - line.before) / 2**20
        axis.plot(line.seconds, held, color=colour, label=f"{name}: peak {held.max():,.0f} MiB")
        axis.fill_between(line.seconds, held, color=colour, alpha=0.15, linewidth=0)
    axis.set_xlabel("time [s]")
    axis.set_ylabel("held beyond the start [MiB]")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def plot_training_memory(memory: TrainingMemory | Mapping[str, TrainingMemory]) -> Figure:
    """Draw what a training step holds, part by part, in closed form.

    Args:
        memory: Of `training_memory`; or several, by the name to show.
    """
    named = memory if isinstance(memory, Mapping) else {"a training step": memory}
    unit, divisor = _unit(max(found.peak for found in named.values()))
    figure = Figure(figsize=(8, 1.8 + 0.7 * len(named)), layout="constrained")
    axis = figure.subplots()
    for row, found in enumerate(named.values()):
        parts = {
            "weights": found.parameters,
            "moments": found.moments,
            "gradients": found.gradients,
            "activations": sum(found.activations.values()),
            "logits": found.logits,
            "scratch": found.scratch,
        }
        left = 0.0
        for (part, size), colour in zip(parts.items(), PALETTE.values(), strict=False):
            width = size / divisor
            axis.barh(
                row, width, left=left, color=colour, height=0.6, label=part if row == 0 else None
            )
            left += width
        peak = found.peak / divisor
        axis.plot([peak, peak], [row - 0.4, row + 0.4], color="black", linewidth=2)
        axis.text(peak, row - 0.43, f" peak {peak:,.1f}", va="bottom", fontsize="small")
    axis.set_yticks(range(len(named)), list(named))
    axis.invert_yaxis()
    axis.set_xlabel(f"{unit}; not all of it is held at once: the line is the most that is")
    axis.legend(
        frameon=False, ncols=6, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    return figure


def _unit(size: int) -> tuple[str, float]:
    for unit, divisor in (("TiB", 2.0**40), ("GiB", 2.0**30)):
        if size >= 2 * divisor:
            return unit, divisor
    return "MiB", 2.0**20


def plot_plan(plan: Plan) -> Figure:
    """Draw what each pipeline rank's devices hold, and what takes a step's time.

    Args:
        plan: Of `ds_train.plan.make_plan` or `search`.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    ranks = np.arange(len(plan.memory))
    names = list(dict.fromkeys(name for rank in plan.memory for name in rank))
    colours = [*PALETTE.values(), "0.6", "0.8"]
    bottom = np.zeros(len(ranks))
    for name, colour in zip(names, colours, strict=False):
        sizes = np.array([rank.get(name, 0.0) for rank in plan.memory]) / 2**30
        left.bar(ranks, sizes, bottom=bottom, color=colour, label=name, width=0.8)
        bottom += sizes
    limit = plan.cluster.memory
    left.axhline(limit, color="black", linewidth=1.5)
    left.text(ranks[-1] + 0.4, limit, f"{limit:g} GiB", ha="right", va="bottom", fontsize="small")
    left.set_xlabel("pipeline rank")
    left.set_ylabel("held by a device [GiB]")
    left.legend(
        frameon=False, fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    done = 0.0
    for (name, seconds), colour in zip(plan.seconds.items(), PALETTE.values(), strict=False):
        right.bar([0], [seconds], bottom=[done], color=colour, width=0.5)
        share = seconds / plan.step_seconds
        if share >= _SMALLEST:
            right.text(
                0.3, done + seconds / 2, f"{name}, {share:.0%}", va="center", fontsize="small"
            )
        done += seconds
    right.set_xlim(-0.4, 1.6)
    right.set_xticks([])
    right.set_ylabel("a step [s]")
    recipe = plan.recipe
    right.set_title(
        f"pp {recipe.pp} x ep {recipe.ep} x dp {recipe.dp}, {recipe.schedule}:\n"
        f"{plan.tokens_per_second:,.0f} tokens/s a device",
        fontsize="medium",
    )
    return figure


def expert_layer_names(model: CausalLM) -> list[str]:
    """Return what to call the layers of `model.moe_layers`, in that order."""
    names = [f"layer {i}" for i, block in enumerate(model.blocks) if block.moe]
    return names + [f"MTP module {k}" for k, m in enumerate(model.mtp, start=1) if m.block.moe]


def plot_schedule(schedule: Schedule, timetable: Timetable) -> Figure:
    """Draw who does what when in a pipeline; what stays white is idle.

    An overlapped pair is drawn as two halves, one above the other. Numbers are micro-batches, where
    there is room for them.

    Args:
        schedule: What is done.
        timetable: When.
    """
    ranks, length = len(schedule.ranks), timetable.length
    figure = Figure(figsize=(min(16, 3 + length / 5), 1.2 + 0.36 * ranks), layout="constrained")
    axes = figure.subplots()
    looks = {
        "F": ("forward", PALETTE["blue"]),
        "B": ("backward", PALETTE["orange"]),
        "I": ("backward, inputs", PALETTE["yellow"]),
        "W": ("backward, weights", PALETTE["green"]),
    }
    drawn = set()
    for rank, slots in enumerate(schedule.ranks):
        times = zip(slots, timetable.starts[rank], timetable.ends[rank], strict=True)
        for slot, start, end in times:
            height = 0.84 / len(slot)
            for i, work in enumerate(slot):
                label, colour = looks[work.kind]
                bottom = rank - 0.42 + i * height
                axes.broken_barh(
                    [(start, end - start)],
                    (bottom, height),
                    facecolor=colour,
                    edgecolor="white",
                    linewidth=0.5,
                    label=None if work.kind in drawn else label,
                )
                drawn.add(work.kind)
                if length <= _NUMBERED:
                    middle = (start + end) / 2, bottom + height / 2
                    text = str(work.micro_batch)
                    axes.text(*middle, text, ha="center", va="center", fontsize=6)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_xlim(0, length)
    axes.set_yticks(range(ranks))
    axes.set_xlabel("time [units of the costs given]")
    axes.set_ylabel("pipeline rank")
    idle = timetable.bubble / length
    axes.set_title(f"{schedule.name}: {schedule.micro_batches} micro-batches, {idle:.1%} idle")
    figure.legend(loc="outside lower center", ncols=len(drawn), frameon=False)
    return figure


_SMALLEST = 0.015  # share of a step that still has room for its name
_NUMBERED = 90  # units of time that still leave room for numbers
