"""Pictures of attention: who looks at whom, and how much a latent holds; needs the extra `plot`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from ds_precision.figures import PALETTE

__all__ = ["plot_attention", "plot_latent_spectrum"]


def plot_attention(weights: Any, words: Sequence[str] | None = None, title: str = "") -> Figure:
    """Draw each head's attention weights.

    Args:
        weights: `[heads, queries, keys]`, as `attention_weights` gives for one sequence.
        words: What stands at each position, shown where there are at most 40.
        title: Above all panels.

    Returns:
        One panel a head. Colours follow the square root of the weight, so that faint ones show.
    """
    weights_HQK = np.asarray(weights, np.float32)
    heads, queries, keys = weights_HQK.shape
    across = min(heads, 4)
    down = math.ceil(heads / across)
    figure = Figure(figsize=(2.3 * across + 1, 2.3 * down + 0.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(down, across, sharex=True, sharey=True)).ravel()
    for head, axis in enumerate(axes):
        if head >= heads:
            axis.set_axis_off()
            continue
        field = axis.imshow(weights_HQK[head], cmap="viridis", norm=PowerNorm(0.5, 0, 1))
        axis.set_title(f"head {head}", fontsize="medium")
        if words is not None and max(queries, keys) <= 40:
            shown = [word.replace("\n", "\\n").replace("$", r"\$") for word in words]
            size = 8 if keys <= 12 else 5
            axis.set_xticks(range(keys), shown[-keys:], rotation=90, fontsize=size)
            axis.set_yticks(range(queries), shown[-queries:], fontsize=size)
    figure.supxlabel("key: the token looked at", fontsize="medium")
    figure.supylabel("query: the token that looks", fontsize="medium")
    figure.suptitle(title or "Attention weights")
    figure.colorbar(field, ax=list(axes), label="weight")
    return figure


def plot_latent_spectrum(latent: Any, label: str = "") -> Figure:
    """Draw how the variance of vectors spreads over directions: how far they could be compressed.

    Args:
        latent: `[tokens, width]`, or several such by name.
        label: What a lone one is called.

    Returns:
        The share of the variance that the best `n` directions hold, over `n`; dots where it passes
        90% and 99%.
    """
    named = latent if isinstance(latent, Mapping) else {label or "latent": latent}
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axis = figure.subplots()
    for (name, values), colour in zip(named.items(), PALETTE.values(), strict=False):
        x = np.asarray(values, np.float64)
        singular = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
        share = np.cumsum(singular**2) / np.sum(singular**2)
        counts = np.arange(1, share.size + 1)
        ranks = [int(np.searchsorted(share, level)) for level in (0.90, 0.99)]
        axis.plot(
            counts,
            100 * share,
            color=colour,
            label=f"{name}: {ranks[0] + 1} of {x.shape[1]} for 90%, {ranks[1] + 1} for 99%",
        )
        axis.plot(counts[ranks], 100 * share[ranks], "o", color=colour, markersize=5)
    axis.set_xlabel("directions kept")
    axis.set_ylabel("variance held [%]")
    axis.set_ylim(0, 102)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    return figure
