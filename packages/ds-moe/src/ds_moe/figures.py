"""Pictures of routing: who gets how much, where each token goes; needs the extra `plot`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ds_moe.router import Routing

__all__ = ["plot_expert_load", "plot_flow", "plot_routing"]


def plot_expert_load(
    loads: Any, steps: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Draw each expert's load over steps, one panel a layer; white is an even share.

    Args:
        loads: `[steps, layers, experts]`, tokens.
        steps: Which optimizer steps; 1, 2, 3, ... if `None`.
        names: Of the layers.
    """
    loads_NLE = np.asarray(loads, np.float64)
    share_NLE = loads_NLE / np.maximum(loads_NLE.mean(axis=-1, keepdims=True), 1e-9)
    when = np.arange(1, len(loads_NLE) + 1) if steps is None else np.asarray(steps)
    names = _names(names, loads_NLE.shape[1])
    figure = Figure(figsize=(8, 1.2 + 1.6 * len(names)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(names), 1, sharex=True))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, float(np.quantile(share_NLE, 0.99))))
    for layer, (axis, name) in enumerate(zip(axes, names, strict=True)):
        field = axis.pcolormesh(
            when, np.arange(share_NLE.shape[-1]), share_NLE[:, layer].T, cmap="PuOr_r", norm=norm
        )
        axis.set_ylabel("expert")
        axis.set_title(name, loc="left", fontsize="medium")
    axes[-1].set_xlabel("optimizer step")
    figure.suptitle("Expert load")
    figure.colorbar(field, ax=list(axes), label="load / mean load")
    return figure


def plot_routing(
    routings: Sequence[Routing], words: Sequence[str], names: Sequence[str] | None = None
) -> Figure:
    """Draw which experts each token of one sequence goes to, one panel a layer.

    Args:
        routings: Of each expert layer, `indices [T, K]`; the first `len(words)` tokens are shown.
        words: What each token is.
        names: Of the layers.
    """
    experts = routings[0].scores.shape[-1]
    count = len(words)
    names = _names(names, len(routings))
    figure = Figure(figsize=(11, 1.5 + 0.13 * experts * len(names)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(names), 1, sharex=True))
    for axis, routing, name in zip(axes, routings, names, strict=True):
        gates_ET = np.full((experts, count), np.nan)
        columns = np.arange(count)[:, None]
        gates_ET[np.asarray(routing.indices)[:count], columns] = np.asarray(routing.gates)[:count]
        field = axis.imshow(gates_ET, aspect="auto", cmap="viridis", vmin=0, origin="lower")
        axis.set_ylabel("expert")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(name, loc="left", fontsize="medium")
    shown = [word.replace("\n", "\\n").replace("$", r"\$") for word in words]
    axes[-1].set_xticks(range(count), shown, rotation=90, fontsize="small")
    axes[-1].set_xlabel("token, in order")
    figure.suptitle("Routing: the experts that each token goes to (blank: not chosen)")
    figure.colorbar(field, ax=list(axes), label="gate (weight of the expert's output)")
    return figure


def plot_flow(routings: Sequence[Routing], names: Sequence[str] | None = None) -> Figure:
    """Draw how tokens move from their best expert in one layer to their best in the next.

    Args:
        routings: Of two or more expert layers, of the same tokens: `indices [T, K]`.
        names: Of the layers.

    Returns:
        A column a layer, split by how many tokens have an expert as their best; bands between
        columns are as wide as the number of tokens that take that way, coloured by their start.

    Raises:
        ValueError: There is only one layer.
    """
    if len(routings) < 2:
        raise ValueError(f"{len(routings)} layers have no way between them; give 2 or more")
    experts = routings[0].scores.shape[-1]
    best = [
        np.take_along_axis(
            np.asarray(r.indices), np.asarray(r.gates).argmax(axis=1)[:, None], axis=1
        )[:, 0]
        for r in routings
    ]
    total, gap = len(best[0]), 0.012 * len(best[0])
    names = _names(names, len(best))
    colours = colormaps["viridis"](np.linspace(0.05, 0.95, experts))
    figure = Figure(figsize=(2.6 * len(best) + 1, 5), layout="constrained")
    axis = figure.subplots()
    counts = [np.bincount(chosen, minlength=experts) for chosen in best]
    starts = [np.concatenate([[0], np.cumsum(count + gap)[:-1]]) for count in counts]
    along = np.linspace(0, 1, 40)
    smooth = along**2 * (3 - 2 * along)
    for layer in range(len(best) - 1):
        leave, arrive = starts[layer].copy(), starts[layer + 1].copy()
        ways = np.zeros((experts, experts), int)
        np.add.at(ways, (best[layer], best[layer + 1]), 1)
        for source, target in np.argwhere(ways):
            width = ways[source, target]
            low = leave[source] + (arrive[target] - leave[source]) * smooth
            x = layer + 0.06 + 0.88 * along
            axis.fill_between(x, low, low + width, color=colours[source], alpha=0.55, linewidth=0)
            leave[source] += width
            arrive[target] += width
    for layer, (count, start) in enumerate(zip(counts, starts, strict=True)):
        axis.bar(
            np.full(experts, layer), count, bottom=start, width=0.12, color=colours, linewidth=0
        )
        for expert in np.flatnonzero(count > 0.04 * total):
            middle = start[expert] + count[expert] / 2
            axis.text(layer, middle, str(expert), ha="center", va="center", color="white", size=8)
    axis.set_xticks(range(len(best)), names)
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_ylabel(f"{total} tokens, by their best expert")
    axis.set_title("How tokens move between experts from layer to layer")
    return figure


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    return [f"expert layer {i}" for i in range(count)] if names is None else list(names)
