"""The pictures of how cost grows. Okabe and Ito's colours, and a marker for each curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D")
GIB = 2**30
Points = Sequence[dict[str, Any]]
Value = Callable[[dict[str, Any]], float]


def write_plots(points: Points, limits: dict[int, dict[str, float]], folder: Path) -> list[str]:
    """Draw every group that has points, and return the names of the files.

    Args:
        points: of `bench.growth`, those that failed left out.
        limits: tokens a second that the machine allows to decode, by batch and precision.
        folder: where `benchmarks-GROUP.png` go.
    """
    draw: dict[str, Callable[[Figure, Points], None]] = {
        "experts": _experts,
        "context": _context,
        "batch": lambda figure, group: _batch(figure, group, limits),
        "size": _size,
        "memory": _memory,
    }
    names = []
    for group, fill in draw.items():
        chosen = [point for point in points if point["group"] == group]
        if not chosen:
            continue
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        fill(figure, chosen)
        name = f"benchmarks-{group}.png"
        figure.savefig(folder / name, dpi=110)
        names.append(name)
    return names


def _experts(figure: Figure, points: Points) -> None:
    time, memory = figure.subplots(1, 2)
    decode, step = _series(points, "decode"), _series(points, "step")
    _line(time, 0, decode, lambda p: p["step_seconds"] * 1e3, "decode, a token")
    _line(time, 1, step, _per_token("gradient_seconds"), "forward and backward, a token")
    _line(time, 2, step, _per_token("optimizer_seconds"), "optimizer, a token")
    _line(memory, 0, decode, lambda p: p["peak"] / GIB, "decode")
    _line(memory, 1, step, lambda p: p["peak"] / GIB, "training")
    _label(time, "routed experts, equal active parameters", "time [ms]", doubling=True)
    _label(memory, "routed experts, equal active parameters", "peak memory [GiB]")


def _context(figure: Figure, points: Points) -> None:
    time, step, memory = figure.subplots(1, 3)
    _line(time, 0, points, lambda p: p["prefill_seconds"] / p["x"] * 1e3, "prefill")
    _line(step, 1, points, lambda p: p["step_seconds"] * 1e3, "decode")
    _line(memory, 2, points, lambda p: p["prefill_peak"] / GIB, "prefill")
    _label(time, "context [tokens]", "prefill, time a token [ms]")
    _label(step, "context [tokens]", "decode, time a token [ms]")
    _label(memory, "context [tokens]", "peak memory [GiB]")


def _batch(figure: Figure, points: Points, limits: dict[int, dict[str, float]]) -> None:
    for axes, name in zip(figure.subplots(1, 2), ("float32", "bfloat16"), strict=True):
        chosen = _series(points, name)
        _line(axes, 0, chosen, lambda p: p["x"] / p["step_seconds"], "ours")
        batches = [point["x"] for point in chosen if name in limits.get(point["x"], {})]
        if batches:
            heights = [limits[batch][name] for batch in batches]
            axes.plot(batches, heights, "--", color="black", label="the machine's limit")
        _label(axes, f"sequences decoded at once, {name}", "tokens a second", doubling=True)


def _size(figure: Figure, points: Points) -> None:
    axes = figure.subplots(1, 1)
    for place, (name, text) in enumerate(
        (("layers", "4, 8, 16 layers"), ("width", "hidden size 256, 512, 1024"))
    ):
        chosen = _series(points, name)
        active = [point["active"] / 1e6 for point in chosen]
        heights = [_per_token("gradient_seconds")(point) for point in chosen]
        axes.plot(active, heights, label=text, color=COLOURS[place], marker=MARKERS[place])
    _label(axes, "active parameters [millions]", "forward and backward, a token [ms]")


def _memory(figure: Figure, points: Points) -> None:
    axes = figure.subplots(1, 1)
    for place, name in enumerate(("kept", "recomputed")):
        chosen = _series(points, name)
        _line(axes, place, chosen, lambda p: p["peak"] / GIB, f"{name}, measured")
        if chosen:
            xs, heights = zip(*[(p["x"], p["expected"] / GIB) for p in chosen], strict=True)
            axes.plot(xs, heights, "--", color=COLOURS[place], label=f"{name}, closed form")
    _label(axes, "sequences of 256 tokens in a training step", "peak memory [GiB]")


def _line(axes: Axes, place: int, points: Points, value: Value, label: str) -> None:
    if points:
        xs, heights = zip(*[(point["x"], value(point)) for point in points], strict=True)
        axes.plot(xs, heights, color=COLOURS[place], marker=MARKERS[place], label=label)


def _label(axes: Axes, x: str, y: str, *, doubling: bool = False) -> None:
    """Name the axes. Straight scales, so that what is linear looks it, or doubling steps in x."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if doubling:
        axes.set_xscale("log", base=2)
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)


def _series(points: Points, name: str) -> Points:
    return [point for point in points if point["series"] == name]


def _per_token(name: str) -> Value:
    return lambda point: float(point[name]) / float(point["tokens"]) * 1e3
