"""The tables behind the page's first: limits, agreement, every system, first runs, conditions."""

from __future__ import annotations

from bench.found import Agreement, Found
from bench.ratios import Spread
from bench.tasks import AGREEMENT_ROWS, CONTEXT, GREEDY_TOKENS

DASH = "-"
LIMITS = """## The machine's own limits

Measured in the same run: the best that TensorFlow's or torch's own kernels reach. Training and
prefill are held to the products that trained weights take part in (6 and 2 for a weight and token;
attention's scores are left out, so the share is understated), decoding to the slower of its
products and its reads from memory: the weights that a step touches, each expert once, and the
cache.

| limit | |
|---|---|"""
AGREEMENT = f"""## Do they compute the same?

Each beside transformers in float32, before any timing. Logits: the largest difference, over the
largest logit, at the last positions of {AGREEMENT_ROWS} prompts of {CONTEXT} tokens. Text: of
{GREEDY_TOKENS} tokens written greedily after a prompt, those before the first that differs; with
random weights a near tie ends it early. Loss and gradient norm: relative difference at the first
training step. In BF16, transformers' own line shows what rounding does, routes that flip included.
llama.cpp's flash attention, its default, rounds to 16 bits whatever the weights are.

| system | precision | logits | next token equal | text equal | loss | gradient norm |
|---|---|---|---|---|---|---|"""


def limits_table(found: Found) -> str:
    """Return what the machine could do at best."""
    known = {
        "gemm_float32": ("float32 products, 2048 x 2048 x 2048", "GFLOP/s"),
        "gemm_bfloat16": ("BF16 products, 2048 x 2048 x 2048", "GFLOP/s"),
        "read_1024mb": ("reads of 1 GiB, past every cache", "GB/s"),
        "read_100mb": ("reads of 100 MiB, again and again", "GB/s"),
    }
    if not found.limits:
        return ""
    lines = [LIMITS]
    lines += [
        f"| {known[name][0]} | {value:,.0f} {known[name][1]} |"
        for name, value in sorted(found.limits.items())
    ]
    return "\n".join(lines)


def agreement_table(found: Found) -> str:
    """Return how far each system computes what transformers computes."""
    if not found.agreement:
        return ""
    lines = [AGREEMENT]
    lines += [_agrees(line) for line in found.agreement]
    return "\n".join(lines)


def _agrees(line: Agreement) -> str:
    cells = [
        line.system,
        line.precision,
        f"{line.logits:.0e}",
        f"{line.first_tokens} of {AGREEMENT_ROWS}",
        f"{line.greedy} of {GREEDY_TOKENS}",
        f"{line.loss:.0e}" if line.loss is not None else DASH,
        f"{line.gradient_norm:.0e}" if line.gradient_norm is not None else DASH,
    ]
    return f"| {' | '.join(cells)} |"


def speeds_table(found: Found) -> str:
    """Return every speed with its range, and who did not take part."""
    names = list(dict.fromkeys(name for row in found.rows for name in row.systems))
    lines = [
        "## Every system",
        "",
        "Tokens a second, median and range.",
        "",
        f"| task | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in found.rows:
        cells = [
            spread_range(row.systems[name].speed) if name in row.systems else DASH for name in names
        ]
        lines.append(f"| {row.task.title} | {' | '.join(cells)} |")
    gone = [
        f"- {missing.system}{', ' + missing.precision if missing.precision else ''}: "
        f"{missing.reason}"
        for missing in found.missing
    ]
    gone += [
        f"- {name}, {row.task.title}: {'; '.join(map(str, speed.tried.values()))}"
        for row in found.rows
        for name, speed in row.systems.items()
        if speed.mode is None
    ]
    return "\n".join(lines + (["", "Did not take part:", "", *gone] if gone else []))


def first_runs_table(found: Found) -> str:
    """Return how long first runs took."""
    names = list(dict.fromkeys(name for row in found.rows for name in row.systems))
    lines = [
        "## First runs",
        "",
        "Seconds of a task's first run, compilation included; it is not part of the speeds above.",
        "",
        f"| task | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in found.rows:
        firsts = [
            row.systems[name].first_seconds if name in row.systems else None for name in names
        ]
        cells = [DASH if first is None else f"{first:.1f}" for first in firsts]
        lines.append(f"| {row.task.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conditions(found: Found) -> str:
    """Return where, when and beside what the figures were taken."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found.versions.items()))
    machine = ", ".join(f"{name}: {value}" for name, value in found.machine.items())
    others = max((row.others for row in found.rows), default=0.0)
    idle = max((row.idle for row in found.rows), default=0.0)
    return f"""## Conditions

{machine}. {found.date}, {found.rounds} rounds. While a row was timed, other processes took at most
{others:.0%} of the processors, and the waiting workers at most {idle:.0%} of one. Versions:
{versions}."""


def number(spread: Spread | None) -> str:
    """Return a median, or a dash."""
    return DASH if spread is None else f"{spread.median:,.0f}"


def spread_range(spread: Spread | None) -> str:
    """Return a median with its range, or a dash."""
    if spread is None:
        return DASH
    return f"{spread.median:,.0f} ({spread.lowest:,.0f} to {spread.highest:,.0f})"


def ratio(spread: Spread | None) -> str:
    """Return a ratio with its range, or a dash."""
    if spread is None:
        return DASH
    return f"{spread.median:.2f} ({spread.lowest:.2f} to {spread.highest:.2f})"
