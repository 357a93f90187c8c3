"""The three pictures of a run: loss, expert load over time, where each token goes.

Colours: Okabe and Ito's palette for lines, perceptually even maps for fields; both can be
told apart without colour vision.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from ds_model import CausalLM, Tokenizer

_BLUE, _ORANGE, _GREEN = "#0072B2", "#E69F00", "#009E73"


def plot_loss(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw cross-entropies and learning rate over steps.

    Args:
        rows: Of `read_metrics`.
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


def plot_expert_load(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Figure:
    """Draw each expert's load over steps, one panel a layer; white is an even share.

    Args:
        rows: Of `read_metrics`.
        names: Of the expert layers.
    """
    loads_NLE = np.asarray([row["loads"] for row in rows], np.float64)
    share_NLE = loads_NLE / np.maximum(loads_NLE.mean(axis=-1, keepdims=True), 1e-9)
    steps = np.asarray([row["step"] for row in rows])
    figure = Figure(figsize=(8, 1.2 + 1.6 * len(names)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(names), 1, sharex=True))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, float(np.quantile(share_NLE, 0.99))))
    for layer, (axis, name) in enumerate(zip(axes, names, strict=True)):
        field = axis.pcolormesh(
            steps, np.arange(share_NLE.shape[-1]), share_NLE[:, layer].T, cmap="PuOr_r", norm=norm
        )
        axis.set_ylabel("expert")
        axis.set_title(name, loc="left", fontsize="medium")
    axes[-1].set_xlabel("optimizer step")
    figure.suptitle("Expert load")
    figure.colorbar(field, ax=list(axes), label="load / mean load")
    return figure


def plot_routing(model: CausalLM, tokenizer: Tokenizer, text: str, names: Sequence[str]) -> Figure:
    """Draw which experts each token of a text goes to, one panel a layer of the main model.

    Args:
        model: With experts.
        tokenizer: Its tokenizer.
        text: The first 40 tokens are shown.
        names: Of the expert layers.
    """
    ids = tokenizer.encode(text)[:40]
    output = model.forward(np.asarray([ids], np.int32))
    shown = list(zip(output.routings, names, strict=False))
    experts = output.routings[0].scores.shape[-1]
    figure = Figure(figsize=(11, 1.5 + 0.13 * experts * len(shown)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(shown), 1, sharex=True))
    for axis, (routing, name) in zip(axes, shown, strict=True):
        gates_ET = np.full((experts, len(ids)), np.nan)
        columns = np.arange(len(ids))[:, None]
        gates_ET[routing.indices.numpy(), columns] = routing.gates.numpy()
        field = axis.imshow(gates_ET, aspect="auto", cmap="viridis", vmin=0, origin="lower")
        axis.set_ylabel("expert")
        axis.set_title(name, loc="left", fontsize="medium")
    words = [tokenizer.decode([token]).replace("\n", "\\n").replace("$", r"\$") for token in ids]
    axes[-1].set_xticks(range(len(ids)), words, rotation=90, fontsize="small")
    axes[-1].set_xlabel("token, in order")
    figure.suptitle("Routing: the experts that each token goes to (blank: not chosen)")
    figure.colorbar(field, ax=list(axes), label="gate (weight of the expert's output)")
    return figure


def plot_stability(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw what rounding does over steps, and each layer's gradient norm.

    Operands are drawn by kind, the worst of each at every look: inputs, weights, gradients.

    Args:
        rows: Of `read_metrics`, from `stability.jsonl`.
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


def expert_layer_names(model: CausalLM) -> list[str]:
    """Return what to call the layers of `model.moe_layers`, in that order."""
    names = [f"layer {i}" for i, block in enumerate(model.blocks) if block.moe]
    return names + [f"MTP module {k}" for k, m in enumerate(model.mtp, start=1) if m.block.moe]
