"""The page docs/benchmarks.md, from what was found and from the notes; nothing is measured here."""

from __future__ import annotations

from pathlib import Path

from bench.cost import limit_speed
from bench.found import OURS, TRANSFORMERS, Found, Row, Speed
from bench.growth_report import growth_section
from bench.kernels import kernels_table
from bench.shares import shares_table
from bench.startup_report import startup_section
from bench.tables import (
    DASH,
    agreement_table,
    conditions,
    first_runs_table,
    limits_table,
    number,
    ratio,
    speeds_table,
)
from bench.targets import TARGETS, Target
from ds_model import ModelConfig, parameter_counts

BESIDE = """## Beside the peers

Tokens a second, medians. A ratio is the median over pairs of runs, one right after the other, with
its range in brackets. The share is of the speed that the machine's limits below allow. Prefill
gives the logits of the last position, as a server needs; decode is counted from the moment every
row has its first new token.

| task | ours | transformers | best peer | x transformers | x best peer | of the limit | target |
|---|---|---|---|---|---|---|---|"""


def page(found: Found, config: ModelConfig, notes: dict[str, str]) -> str:
    """Return the whole page.

    Args:
        found: what was measured.
        config: the model that was measured.
        notes: text by heading; see bench/notes.md.
    """
    sections = [
        _head(found, config),
        _rows(found, config, notes),
        limits_table(found),
        agreement_table(found),
        kernels_table(found),
        shares_table(found),
        speeds_table(found),
        first_runs_table(found),
        growth_section(found.growth, notes),
        startup_section(found.startup, notes),
        conditions(found),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def read_notes(path: Path) -> dict[str, str]:
    """Return the notes by heading (`## KEY`); what stands before the first is for their writer."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            lines = found.setdefault(line[3:].strip(), [])
        elif found:
            lines.append(line)
    return {key: "\n".join(lines).strip() for key, lines in found.items()}


def best_peer(row: Row) -> str | None:
    """Return the fastest system that is not ours, by its median."""
    speeds = {
        name: speed.speed.median
        for name, speed in row.systems.items()
        if name != OURS and speed.speed
    }
    return max(speeds, key=lambda name: speeds[name]) if speeds else None


def share(row: Row, found: Found, config: ModelConfig) -> float | None:
    """Return our speed as a share of what the machine's limits allow."""
    ours = row.systems.get(OURS)
    limit = limit_speed(config, row.task, found.limits)
    return ours.speed.median / limit if ours and ours.speed and limit else None


def verdict(
    target: Target | None, transformers: float | None, best: float | None, roofline: float | None
) -> str:
    """Return "met", or by how much each part falls short."""
    if target is None:
        return DASH
    parts = (
        ("of transformers", target.transformers, transformers, "x"),
        ("of the best peer", target.best, best, "x"),
        ("of the limit", target.roofline, roofline, "%"),
    )
    missed, unknown = [], []
    for what, wanted, got, unit in parts:
        if wanted is None:
            continue
        if got is None:
            unknown.append(what)
        elif got < wanted:
            missed.append(f"{_in(unit, got)} {what} for {_in(unit, wanted)}")
    said = []
    if missed:
        said.append(f"short: {'; '.join(missed)}")
    if unknown:
        said.append(f"not measured: {'; '.join(unknown)}")
    return ". ".join(said) or "met"


def _in(unit: str, value: float) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:.2f}"


def _head(found: Found, config: ModelConfig) -> str:
    counts = parameter_counts(config)
    command = "python3 dev.py bench" + (" -- --full" if found.scope == "full" else "")
    return f"""# Benchmarks

Written by `{command}`, on one machine, with {found.threads} threads for each system. Each ratio is
of runs in turn, one right after the other. Preset `bench` ({counts.main / 1e6:.1f}M parameters,
{counts.active / 1e6:.1f}M active), random weights; all systems read the same weights and the same
tokens. Compare the ratios, not the seconds."""


def _rows(found: Found, config: ModelConfig, notes: dict[str, str]) -> str:
    lines = [BESIDE]
    remarks = [notes["general"]] if notes.get("general") else []
    for row in found.rows:
        lines.append(_row(row, found, config))
        if notes.get(row.task.key):
            remarks += [f"**{row.task.title}.** {notes[row.task.key]}"]
    text = "\n".join(lines)
    return "\n\n".join([text, *remarks])


def _row(row: Row, found: Found, config: ModelConfig) -> str:
    nobody = Speed(mode=None, tried={})
    ours, peer = row.systems.get(OURS, nobody), row.systems.get(TRANSFORMERS, nobody)
    name = best_peer(row)
    best = row.systems[name] if name else nobody
    part = share(row, found, config)
    said = verdict(
        TARGETS.get(row.task.key),
        peer.ratio.median if peer.ratio else None,
        best.ratio.median if best.ratio else None,
        part,
    )
    if ours.speed is None:
        said = f"ours: {_why_absent(found, row)}"
    cells = [
        row.task.title,
        number(ours.speed),
        f"{number(peer.speed)} ({peer.mode})" if peer.speed else DASH,
        f"{number(best.speed)} ({name})" if best.speed else DASH,
        ratio(peer.ratio),
        ratio(best.ratio),
        f"{part:.0%}" if part is not None else DASH,
        said,
    ]
    return f"| {' | '.join(cells)} |"


def _why_absent(found: Found, row: Row) -> str:
    if OURS in row.systems:
        return "; ".join(str(value) for value in row.systems[OURS].tried.values())
    reasons = [
        missing.reason
        for missing in found.missing
        if missing.system == OURS and missing.precision in (None, row.task.precision)
    ]
    return reasons[0] if reasons else "not measured"
