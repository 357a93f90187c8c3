"""The figures of docs/phases/6-quantization.md: tables between two marks, and two plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.found import OURS
from bench.growth_plots import COLOURS, MARKERS
from bench.marks import replaced
from bench.tables import DASH

LLAMA = "llama.cpp"
NAMES = {
    (OURS, "float32"): "float32",
    (OURS, "bfloat16"): "BF16",
    (OURS, "fp8"): "fp8",
    (OURS, "int8"): "int8",
    (OURS, "int8_channel"): "int8_channel",
    (OURS, "int4"): "int4",
    (LLAMA, "float32"): "llama.cpp F32",
    (LLAMA, "bfloat16"): "llama.cpp BF16",
    (LLAMA, "int8"): "llama.cpp Q8_0",
    (LLAMA, "int4"): "llama.cpp Q4_0",
}
FORMS = ("int8", "llama.cpp Q8_0", "int8_channel", "fp8", "int4", "llama.cpp Q4_0")


def publish(found: Mapping[str, Any], out: Path) -> None:
    """Put tables into the page under `out` and draw its plots."""
    page = out / "phases" / "6-quantization.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(replaced(text, figures(found)), encoding="utf-8")
    draw(found, out / "assets" / "quantization.png")


def figures(found: Mapping[str, Any]) -> str:
    """Return the tables."""
    parts = [quality_table(found), errors_table(found["errors"])]
    if found["missing"]:
        parts.append("\n".join(["Not measured:", "", *(f"- {line}" for line in found["missing"])]))
    return "\n\n".join(parts)


def quality_table(found: Mapping[str, Any]) -> str:
    """Return one row a form of the weights."""
    titles = ["weights", "bits a weight", "file", "bits per byte", "divergence [nats]"]
    titles += ["same best token", "tokens a second, `mini`", "`bench`", "times llama.cpp, `bench`"]
    head = (
        f"Preset `mini`, trained; {found['parameters']:,} parameters, {found['tokens']:,} tokens "
        "that it never saw. Divergence: from our float32's distribution of each next token, the "
        "mean. Speed: one stream, median."
    )
    lines = [head, "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    by_form = {(line["system"], line["precision"]): line for line in found["quality"]}
    for form, name in NAMES.items():
        if line := by_form.get(form):
            lines.append(f"| {name} | {' | '.join(cells(line, found))} |")
    return "\n".join(lines)


def cells(line: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return what stands beside a form's name."""
    system, precision = line["system"], line["precision"]
    large = speed(found, "bench", precision, system)
    ratio = speed(found, "bench", precision, LLAMA).get("ratio") if system == OURS else None
    return [
        f"{line['file_bytes'] * 8 / found['parameters']:.2f}",
        f"{line['file_bytes'] / 1e6:.2f} MB",
        f"{line['bits_per_byte']:.4f}",
        f"{line['divergence']:.1e}",
        f"{line['same']:.2%}",
        median(speed(found, "mini", precision, system)),
        median(large),
        f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
        if ratio
        else DASH,
    ]


def speed(found: Mapping[str, Any], model: str, precision: str, system: str) -> dict[str, Any]:
    """Return one system's `Speed` at one precision; empty if it was not timed."""
    for row in found["speeds"].get(model, []):
        if row["task"]["precision"] == precision:
            return dict(row["systems"].get(system) or {})
    return {}


def median(found: Mapping[str, Any]) -> str:
    """Return tokens a second, or a dash."""
    return f"{found['speed']['median']:,.0f}" if found.get("speed") else DASH


def errors_table(errors: Mapping[str, Mapping[str, float]]) -> str:
    """Return one row a form: what rounding changes in each kind of a real model's matrices."""
    if not errors:
        return ""
    kinds = list(dict.fromkeys(name.split(".")[-2] for name in next(iter(errors.values()))))
    count = len(next(iter(errors.values())))
    titles = ["weights", *(f"`{kind}`" for kind in kinds), "worst"]
    head = (
        f"SmolLM2-135M's {count} matrices, as its published file of 4 bits means them: the norm of "
        "what rounding changes over the matrix's own, mean of the layers."
    )
    lines = [head, "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for form in FORMS:
        if found := errors.get(form):
            means = [
                statistics.fmean(v for name, v in found.items() if name.split(".")[-2] == kind)
                for kind in kinds
            ]
            shown = [f"{value:.2%}" for value in means]
            lines.append(f"| {form} | {' | '.join([*shown, f'{max(found.values()):.2%}'])} |")
    return "\n".join(lines)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw divergence over bits, and the errors of all matrices."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    cost, spread = figure.subplots(1, 2)
    for place, system in enumerate((OURS, LLAMA)):
        points: Sequence[Any] = [
            line
            for line in found["quality"]
            if line["system"] == system and line["precision"] not in ("float32", "bfloat16")
        ]
        bits = [line["file_bytes"] * 8 / found["parameters"] for line in points]
        apart = [line["divergence"] for line in points]
        cost.plot(bits, apart, MARKERS[place], color=COLOURS[place], label=system, markersize=8)
        for line, x, y in zip(points, bits, apart, strict=True):
            name = NAMES[(system, line["precision"])].removeprefix("llama.cpp ")
            cost.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    cost.set_yscale("log")
    cost.set_xlabel("bits a weight, of the file")
    cost.set_ylabel("divergence from float32 [nats a token]")
    cost.grid(alpha=0.3)
    cost.legend(frameon=False)
    for place, form in enumerate(FORMS):
        values = sorted(found["errors"].get(form, {}).values())
        theirs = form.startswith(LLAMA)
        colour = COLOURS[1 if theirs else 0]
        spread.plot(values, [place] * len(values), "|", color=colour, alpha=0.5)
    spread.set_xscale("log")
    spread.set_yticks(range(len(FORMS)), FORMS, fontsize=8)
    spread.invert_yaxis()
    spread.set_xlabel("error of a matrix of SmolLM2-135M, a mark a matrix")
    spread.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
