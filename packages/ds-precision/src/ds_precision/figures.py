"""Pictures of number formats and of what rounding does; needs the extra `plot`.

Colours are Okabe and Ito's, which can be told apart without colour vision; fields have perceptually
even maps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ds_precision.formats import E4M3, E5M2, Format, cast

__all__ = ["PALETTE", "plot_formats", "plot_rounding"]

PALETTE: dict[str, str] = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}
"""Okabe and Ito's colours by name; "red" is their vermilion."""


def plot_formats(formats: Sequence[Format] = (E4M3, E5M2)) -> Figure:
    """Draw the positive numbers that formats have, and the relative error of what lies between.

    Args:
        formats: Of `ds_precision`, at most eight.

    Returns:
        Two panels over magnitude, both axes logarithmic where they are numbers.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
    low = min(fmt.smallest_subnormal for fmt in formats)
    high = max(fmt.max for fmt in formats)
    x = np.geomspace(low / 4, high * 2, 4000, dtype=np.float32)
    for row, (fmt, colour) in enumerate(zip(formats, PALETTE.values(), strict=False)):
        numbers = _positive_numbers(fmt)
        upper.plot(numbers, np.full(numbers.shape, row), "|", color=colour, markersize=14)
        error = np.abs(np.asarray(cast(x, fmt), np.float32) - x) / x
        lower.plot(x, np.maximum(error, 1e-6), color=colour, linewidth=0.8, label=fmt.name)
    upper.set_yticks(range(len(formats)), [fmt.name for fmt in formats])
    upper.set_ylim(-0.7, len(formats) - 0.3)
    upper.set_title("The positive numbers of each format, and how far the rest is moved")
    lower.set_xscale("log", base=2)
    lower.set_yscale("log")
    lower.set_ylim(1e-4, 2)
    lower.set_xlabel("magnitude")
    lower.set_ylabel("relative error of rounding")
    lower.legend(frameon=False)
    lower.grid(alpha=0.3)
    return figure


def plot_rounding(x: Any, named: Mapping[str, Any]) -> Figure:
    """Draw where rounding errs, one map for each way to round, on one scale of colours.

    Args:
        x: `[rows, columns]`: what was rounded.
        named: What became of it, `[rows, columns]` each, by the name to show.

    Returns:
        Maps of `|rounded - x| / |x|`. Black: numbers other than zero that became zero; their share
        stands in the title.

    Raises:
        ValueError: A rounded array has another shape than `x`.
    """
    exact = np.abs(np.asarray(x, np.float64))
    figure = Figure(figsize=(3.4 * len(named) + 0.8, 3.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(named), sharey=True))
    norm = LogNorm(vmin=1e-3, vmax=1.0)
    for axis, (name, rounded) in zip(axes, named.items(), strict=True):
        found = np.asarray(rounded, np.float64)
        if found.shape != exact.shape:
            raise ValueError(f"{name} has shape {found.shape}; x has {exact.shape}")
        error = np.abs(np.abs(found) - exact) / np.where(exact > 0, exact, 1.0)
        lost = (found == 0) & (exact > 0)
        shown = np.ma.masked_where(lost, np.maximum(error, 1e-3))
        axis.set_facecolor("black")
        field = axis.imshow(shown, aspect="auto", cmap="viridis", norm=norm, interpolation="none")
        axis.set_title(f"{name}\n{lost.sum() / max((exact > 0).sum(), 1):.1%} became zero")
        axis.set_xlabel("column")
    axes[0].set_ylabel("row")
    figure.colorbar(field, ax=list(axes), label="relative error (black: lost)")
    return figure


def _positive_numbers(fmt: Format) -> np.ndarray:
    """All positive finite numbers of a format, from its description."""
    steps = 2**fmt.mantissa_bits
    subnormal = np.arange(1, steps) * fmt.smallest_subnormal
    powers = np.arange(np.log2(fmt.smallest_normal), np.log2(fmt.max) + 1)
    normal = (2.0 ** powers[:, None] * (1 + np.arange(steps) / steps)).ravel()
    return np.concatenate([subnormal, normal[normal <= fmt.max]])
