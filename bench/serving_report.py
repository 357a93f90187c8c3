"""The figures of serving in docs/phases/6-serving.md, and their plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from bench.marks import replaced
from ds_serve.capacity import published

OURS, VLLM, LLAMA, GENERATE = "ours", "vLLM", "llama-server", "transformers"
GIB = 2**30
# What the issue that asked for these figures wants, at BF16 and at float32 alike.
SPEED_GOALS = {1: (LLAMA, 1.0), 8: (VLLM, 1.1), 32: (VLLM, 1.1)}


def publish(found: dict[str, Any], out: Path) -> None:
    """Put tables and plot into the page under `out`."""
    page = out / "phases" / "6-serving.md"
    text = page.read_text(encoding="utf-8")
    parts = [crowds(found), goals(found), alone(found), drafted(found), endured(found)]
    figures = "\n\n".join(part for part in parts if part) or "Nothing is measured yet."
    if found["peers"]:
        plot(found["peers"], out / "assets" / "serving.png")
        figures = "![tokens a second and time to the first token](../assets/serving.png)\n\n" + (
            figures
        )
    page.write_text(replaced(text, figures), encoding="utf-8")
    other = out / "how-to" / "deploy.md"
    text = replaced(other.read_text(encoding="utf-8"), capacities(), of="capacity")
    other.write_text(text, encoding="utf-8")


def capacities() -> str:
    """Return published figures beside the plan of a service."""
    lines = ["| tokens/s a node | published | planned | error | source |", "|---|---|---|---|---|"]
    for run in published():
        error = f"{100 * run.error:+.0f}%" + (", fitted" if run.fitted else "")
        cells = [run.what, f"{run.value:,.0f}", f"{run.planned:,.0f}", error, run.source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def crowds(found: dict[str, Any]) -> str:
    """Return a table of all servers and crowds."""
    if not found["peers"]:
        return ""
    titles = ["precision", "clients", "server", "tokens/s", "first token", "95%", "next token"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for precision, servers in found["peers"].items():
        counts = sorted({int(count) for kept in servers.values() for count in kept["crowds"]})
        for count in counts:
            for name, kept in servers.items():
                crowd = _crowd(kept, count)
                if crowd is None or not crowd["speed"]:
                    continue
                cells = [precision, str(count), name, f"{_mid(crowd['speed']):.0f}"]
                cells += [_ms(crowd[key]) for key in ("first", "late")]
                cells.append(_ms(crowd["between"], digits=1))
                lines.append(f"| {' | '.join(cells)} |")
    head = (
        f"{found['machine'].get('processor', '')}, {found['machine'].get('processors', '')} "
        "processors. Prompts of 512 random tokens, each client its own; 128 new tokens; medians."
    )
    return f"{head}\n\n" + "\n".join(lines)


def goals(found: dict[str, Any]) -> str:
    """Return what was aimed at, and what came of it."""
    rows: list[tuple[str, str, bool]] = []
    for precision, servers in found["peers"].items():
        if OURS in servers:
            rows += _beside_peers(precision, servers)
    engine = found["engine"]
    if engine:
        prefix = engine["prefix"]
        gain = prefix["cold"] / prefix["warm"]
        goal = f"first token, {prefix['shared']} shared tokens: 10 times sooner"
        rows.append((goal, f"{gain:.1f} times", gain >= 10))
        for case in engine["overhead"]:
            more = case["step"] / case["bare"] - 1
            goal = f"a step of {case['clients']} clients: below 10% above the bare graph"
            rows.append((goal, f"{100 * more:.0f}%", more < 0.1))
    if not rows:
        return ""
    lines = ["| goal | measured | |", "|---|---|---|"]
    lines += [f"| {goal} | {value} | {'met' if met else 'missed'} |" for goal, value, met in rows]
    return "\n".join(lines)


def _beside_peers(precision: str, servers: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return the goals that name another server."""
    rows = []
    mine, theirs = servers[OURS], servers.get(VLLM)
    for count, (peer, factor) in SPEED_GOALS.items():
        ratio = _ratio(mine, servers.get(peer), count, "speed")
        if ratio:
            goal = f"{precision}, {count} clients: tokens/s, {factor} of {peer}"
            rows.append((goal, f"{ratio:.2f}", ratio >= factor))
        ratio = _ratio(mine, theirs, count, "first")
        if ratio:
            goal = f"{precision}, {count} clients: first token not above vLLM's"
            rows.append((goal, f"{ratio:.2f} of it", ratio <= 1))
    if theirs and theirs["memory"]:
        held, other = _mid(mine["memory"]) / GIB, _mid(theirs["memory"]) / GIB
        goal = f"{precision}: memory, a third of vLLM's"
        rows.append((goal, f"{held:.1f} of {other:.1f} GiB", held <= other / 3))
        start, other = _mid(mine["start_seconds"]), _mid(theirs["start_seconds"])
        goal = f"{precision}: start-up, a tenth of vLLM's"
        rows.append((goal, f"{start:.1f} of {other:.1f} s", start <= other / 10))
    return rows


def _ratio(mine: dict[str, Any], theirs: dict[str, Any] | None, count: int, key: str) -> float:
    one, other = _crowd(mine, count), _crowd(theirs, count)
    if not (one and other and one[key] and other[key]):
        return 0.0
    return _mid(one[key]) / _mid(other[key])


def alone(found: dict[str, Any]) -> str:
    """Return the engine beside itself with parts turned off."""
    engine = found["engine"]
    if not engine:
        return ""
    both, prefix = engine["together"], engine["prefix"]
    rows = [
        ("preset `bench`, BF16", "without", "with"),
        ("---", "---", "---"),
        (
            f"{both['clients']} clients share steps, tokens/s",
            f"{both['in turn']:.0f}",
            f"{both['together']:.0f}",
        ),
        (
            f"{prefix['shared']} tokens of the prompt in the cache, first token",
            f"{1000 * prefix['cold']:.0f} ms",
            f"{1000 * prefix['warm']:.1f} ms",
        ),
    ]
    for case in engine["overhead"]:
        what = f"one thread starts a step's operations, {case['clients']} clients"
        rows.append((what, f"{1000 * case['handed']:.1f} ms", f"{1000 * case['bare']:.1f} ms"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def drafted(found: dict[str, Any]) -> str:
    """Return what drafts gain."""
    if not found["drafts"]:
        return ""
    lines = [
        "| `mini`, trained, float32 | accepted | tokens/s without | with | ratio | same text |",
        "|---|---|---|---|---|---|",
    ]
    for clients, case in found["drafts"].items():
        for name in ("greedy", "drawn"):
            one = case[name]
            cells = [f"{clients} clients, {name}", f"{100 * one['accepted']:.0f}%"]
            cells += [f"{one['without']:.0f}", f"{one['with']:.0f}"]
            cells += [f"{one['with'] / one['without']:.2f}", "yes" if one["same"] else "no"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def endured(found: dict[str, Any]) -> str:
    """Return what became of many requests."""
    one = found["endurance"]
    if not one:
        return ""
    ends = ", ".join(f"{count:,} {reason}" for reason, count in sorted(one["ended"].items()))
    memory = one["memory_mib"]
    free = "All blocks were free at the end" if one["all_blocks_free"] else "Blocks were lost"
    return (
        f"{one['requests']:,} random requests in {one['seconds']:.0f} s, a third of them given up: "
        f"{ends}; {one['preemptions']:,} preemptions. {free}, and the books balanced after each "
        f"step ({one['faults']} faults). Memory in MiB, from beginning to end: "
        f"{', '.join(map(str, memory))}."
    )


def plot(peers: dict[str, Any], path: Path) -> None:
    """Draw tokens a second and the time to the first token by clients."""
    figure, axes = plt.subplots(2, len(peers), figsize=(5 * len(peers), 6.4), squeeze=False)
    for column, (precision, servers) in enumerate(peers.items()):
        for name, kept in servers.items():
            counts = sorted(int(count) for count in kept["crowds"])
            for row, (key, factor) in enumerate((("speed", 1), ("first", 1000))):
                values = [(n, _crowd(kept, n)) for n in counts]
                points = [(n, factor * _mid(c[key])) for n, c in values if c and c[key]]
                if points:
                    axes[row][column].plot(*zip(*points, strict=True), marker="o", label=name)
        for row, label in enumerate(("tokens/s", "first token, ms")):
            axes[row][column].set(xscale="log", yscale="log", xlabel="clients", ylabel=label)
            axes[row][column].grid(visible=True, alpha=0.3)
        axes[0][column].set_title(precision)
        axes[0][column].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _crowd(kept: dict[str, Any] | None, count: int) -> dict[str, Any] | None:
    if kept is None:
        return None
    crowds = kept["crowds"]
    found = crowds.get(count, crowds.get(str(count)))
    return found if found and found["speed"] else None


def _mid(values: list[float]) -> float:
    return float(statistics.median(values))


def _ms(values: list[float], digits: int = 0) -> str:
    return f"{1000 * _mid(values):.{digits}f} ms" if values else ""
