"""The page's section on growth, from what `growth` measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Points = Sequence[dict[str, Any]]
GIB = 2**30
FLAT = 0.15  # how far from flat the cost of more experts may go
HEADINGS = {
    "experts": """### Experts

Equal active parameters, 128 tokens for each expert in training. Decoding, and forward with
backward, are to stay within 15% of flat; the optimizer has to touch every expert, and stands
apart.""",
    "context": """### Context

One sequence, float32. Memory is the peak of reading the prompt.""",
    "batch": """### Batch

Sequences decoded at once after 512 tokens each, beside what the machine's limits allow.""",
    "size": """### Layers and width

Training 8 x 256 in float32; the last column should stay level.""",
    "memory": """### Memory of training

Steps on sequences of 256 tokens in float32, beside the closed form: 16 bytes a parameter (weight,
gradient, two moments) and the activations; "recomputed" keeps each block's input only.""",
}


def growth_section(points: Points, notes: dict[str, str]) -> str:
    """Return the section on growth, with a table and a picture for each group measured."""
    if not points:
        return ""
    parts = ["## How cost grows", "Each point is measured in a fresh process."]
    for group, heading in HEADINGS.items():
        chosen = [point for point in points if point["group"] == group]
        if not chosen:
            continue
        good = [point for point in chosen if "failed" not in point]
        parts += [heading, _table(group, good)]
        parts += [
            f"- {point['series']}, {point['x']:,}: {point['failed']}"
            for point in chosen
            if "failed" in point
        ]
        if good:
            parts.append(f"![{group}](assets/benchmarks-{group}.png)")
        if notes.get(group):
            parts.append(notes[group])
    return "\n\n".join(part for part in parts if part)


def _table(group: str, points: Points) -> str:
    if not points:
        return ""
    rows = {
        "experts": _experts,
        "context": _context,
        "batch": _batch,
        "size": _size,
        "memory": _memory,
    }[group](points)
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body)])


def _experts(points: Points) -> list[list[str]]:
    rows = [["experts", "parameters", "decode, ms a token", "forward and backward, ms a token"]]
    rows[0] += ["optimizer, ms a step", "decode, GiB", "training, GiB"]
    decode = {point["x"]: point for point in points if point["series"] == "decode"}
    step = {point["x"]: point for point in points if point["series"] == "step"}
    written = {x: point["step_seconds"] * 1e3 for x, point in decode.items()}
    trained = {x: point["gradient_seconds"] / point["tokens"] * 1e3 for x, point in step.items()}
    for x in sorted(decode.keys() | step.keys()):
        either = decode.get(x) or step[x]
        row = [str(x), f"{either['parameters'] / 1e6:,.0f}M"]
        row += [_flat(written, x), _flat(trained, x)]
        row += [f"{step[x]['optimizer_seconds'] * 1e3:,.0f}" if x in step else "-"]
        row += [f"{found[x]['peak'] / GIB:.1f}" if x in found else "-" for found in (decode, step)]
        rows.append(row)
    return rows


def _flat(values: dict[int, float], x: int) -> str:
    """Return a value beside the first of its curve, and whether it is flat enough."""
    if x not in values:
        return "-"
    change = values[x] / values[min(values)] - 1
    word = "" if abs(change) <= FLAT else ", not flat"
    return f"{values[x]:.2f} ({change:+.0%}{word})"


def _context(points: Points) -> list[list[str]]:
    rows = [["context", "prefill, s", "prefill, ms a token", "decode, ms a token", "peak, GiB"]]
    for point in points:
        seconds = point["prefill_seconds"]
        rows.append(
            [
                f"{point['x']:,}",
                f"{seconds:.2f}",
                f"{seconds / point['x'] * 1e3:.2f}",
                f"{point['step_seconds'] * 1e3:.2f}",
                f"{point['prefill_peak'] / GIB:.2f}",
            ]
        )
    return rows


def _batch(points: Points) -> list[list[str]]:
    rows = [["batch", "precision", "tokens a second", "peak, GiB"]]
    for point in points:
        speed = point["x"] / point["step_seconds"]
        rows.append(
            [str(point["x"]), point["series"], f"{speed:,.0f}", f"{point['peak'] / GIB:.2f}"]
        )
    return rows


def _size(points: Points) -> list[list[str]]:
    rows = [["", "active parameters", "forward and backward, ms a token", "GFLOP/s"]]
    for point in points:
        seconds = point["gradient_seconds"] / point["tokens"]
        rows.append(
            [
                f"{point['x']} {'layers' if point['series'] == 'layers' else 'wide'}",
                f"{point['active'] / 1e6:.1f}M",
                f"{seconds * 1e3:.2f}",
                f"{6 * point['active'] / seconds / 1e9:,.0f}",
            ]
        )
    return rows


def _memory(points: Points) -> list[list[str]]:
    rows = [["sequences", "activations", "measured, GiB", "closed form, GiB", "tokens a second"]]
    rows += [
        [
            str(point["x"]),
            point["series"],
            f"{point['peak'] / GIB:.2f}",
            f"{point['expected'] / GIB:.2f}",
            f"{point['tokens'] / point['seconds']:,.0f}",
        ]
        for point in points
    ]
    return rows
