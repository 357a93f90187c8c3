"""The small form with no peers: have we become slower, beside this machine's own limits?

Each round measures the limits and a task one right after the other; a row's figure is its best
speed as a share of the best limits, as strangers only ever slow things down. It is held to a floor
in floors.json, which `--guard --write` renews. Shares, not seconds, so that another machine can
hold them too; but caches and processors differ, so floors are good for machines like the one that
wrote them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.cost import limit_speed
from bench.found import OURS
from bench.limits import combine
from bench.process import ROOT
from bench.systems import ours
from bench.tasks import PRECISIONS, PRESET, TASKS, Task
from ds_model import ModelConfig

FLOORS = ROOT / "bench" / "floors.json"
MARGIN = 0.25  # of the floor: what a busy machine takes off
TASKS_GUARDED = tuple(task for task in TASKS if not task.long)


def guard(model: Path, threads: int, rounds: int, *, write: bool) -> int:
    """Measure, and compare with the floors or write them.

    Returns:
        The exit status: 1 if a row is below its floor by more than the margin.
    """
    shares = measure_shares(model, threads, rounds)
    if write:
        rounded = {name: round(share, 3) for name, share in shares.items()}
        FLOORS.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {len(shares)} floors to {FLOORS.relative_to(ROOT)}")
        return 0
    floors = json.loads(FLOORS.read_text(encoding="utf-8"))
    for name, share in shares.items():
        print(f"{name}: {share:.1%} of the limit, floor {floors.get(name, 0):.1%}")
    slower = below(shares, floors)
    for line in slower:
        print(line, file=sys.stderr)
    return 1 if slower else 0


def measure_shares(model: Path, threads: int, rounds: int) -> dict[str, float]:
    """Return each guarded task's share of the limits measured between its runs."""
    config = ModelConfig.preset(PRESET)
    shares: dict[str, float] = {}
    for precision in PRECISIONS:
        tasks = [task for task in TASKS_GUARDED if task.precision == precision]
        if not tasks:
            continue
        with ours(model).start(precision, threads, thorough=False) as worker:
            for task in tasks:
                prepared = worker.ask("prepare", task=task.to_json())
                if prepared["mode"] is None:
                    raise RuntimeError(f"{OURS} can't do {task.key}: {prepared['tried']}")
                limits: list[dict[str, float]] = []
                speeds = []
                for _ in range(rounds):
                    limits.append(worker.ask("limits"))
                    seconds, tokens = worker.ask("run")
                    speeds.append(tokens / seconds)
                shares[task.key] = best_share(config, task, speeds, limits)
    return shares


def best_share(
    config: ModelConfig, task: Task, speeds: list[float], limits: list[dict[str, float]]
) -> float:
    """Return the best speed as a share of what the best limits of all rounds allow."""
    limit = limit_speed(config, task, combine(limits))
    if limit is None:
        raise ValueError(f"limits are {limits}; expected products and reads")
    return max(speeds) / limit


def below(shares: Mapping[str, float], floors: Mapping[str, float]) -> list[str]:
    """Return one line for each row that is below its floor by more than the margin."""
    return [
        f"{name} is slower: {share:.1%} of the limit, floor {floors[name]:.1%} less {MARGIN:.0%}"
        for name, share in shares.items()
        if name in floors and share < floors[name] * (1 - MARGIN)
    ]
