"""The command line. `python3 dev.py bench -- WORDS` calls it with its environments."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.environments import PEERS, PeerError
from bench.found import OURS, TRANSFORMERS, Found, Missing
from bench.growth import GROUPS, measure_growth, run_case
from bench.guard import guard
from bench.machine import machine
from bench.measure import measure
from bench.process import ROOT
from bench.publish import keep, publish
from bench.shares import measure as measure_shares
from bench.shares import starting
from bench.startup import measure_startup
from bench.systems import System, ours, peer
from bench.tasks import TASKS, Task

MODEL = ROOT / "build" / "bench" / "model"
DOCS = ROOT / "docs"


def main(words: Sequence[str] | None = None) -> int:
    """Measure what the words ask for, and write the page and its figures."""
    given = parser().parse_args(words)
    data = given.out / "assets" / "benchmarks.json"
    if given.render:
        publish(read(data), given.out)
        return 0
    write_model()
    if given.guard:
        return guard(MODEL, given.threads, given.rounds, write=given.write)
    groups = [name for name in given.growth.split(",") if name]
    alone = groups or given.startup or given.kernels
    if alone or given.rows:  # renewed beside what the last run found
        found = read(data)
    else:
        found = blank("full" if given.full else "short", given.threads, given.rounds)
    if not alone:
        compare(given, found)
    for group in list(GROUPS) if given.full else groups:
        kept = [point for point in found.growth if point["group"] != group]
        found.growth = kept + measure_growth(str(MODEL), [group])
        keep(found, given.out)
    if given.full or given.kernels:
        found.kernels = run_case("operations", {}) | {
            "starting": starting(run_case),
            "shares": measure_shares(MODEL, run_case),
        }
        keep(found, given.out)
    if given.full or given.startup:
        found.startup = measure_startup(str(MODEL))
    publish(found, given.out)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line's."""
    made = argparse.ArgumentParser(prog="bench", description=__doc__)
    flag = made.add_argument
    flag("--full", action="store_true", help="all peers and rows, how cost grows, start-up")
    flag("--peers", help=f"comma-separated, instead of the usual: {', '.join(PEERS)}")
    flag("--rows", default="", help="comma-separated: renew only tasks whose names start so")
    flag("--growth", default="", help=f"renew only some of how cost grows: {','.join(GROUPS)}")
    flag("--startup", action="store_true", help="renew only start-up")
    flag("--kernels", action="store_true", help="renew only the operations alone")
    flag("--render", action="store_true", help="write the page again from its data and the notes")
    flag("--guard", action="store_true", help="no peers: hold us to the floors in floors.json")
    flag("--write", action="store_true", help="with --guard: renew the floors")
    flag("--rounds", type=int, default=5, help="pairs of runs for each peer [5]")
    flag("--threads", type=int, default=os.cpu_count(), help="for each system [all]")
    flag("--out", type=Path, default=DOCS, help="for benchmarks.md and assets/ [docs]")
    flag("--environments", type=Path, default=ROOT / ".nox" / "bench", help="where peers lie")
    return made


def compare(given: argparse.Namespace, found: Found) -> None:
    """Time us beside the peers that the words ask for."""
    usual = list(PEERS) if given.full else [TRANSFORMERS]
    names = usual if given.peers is None else [name for name in given.peers.split(",") if name]
    tasks = [
        task
        for task in TASKS
        if (given.full or not task.long or given.rows)
        and task.key.startswith(tuple(given.rows.split(",")))
    ]
    forget(found, tasks, names)
    limits = found.limits  # those that the rows of an earlier run are held to
    systems = prepare(names, given.environments, found)
    measure(systems, tasks, given.threads, found, lambda: keep(found, given.out))
    found.limits = limits or found.limits
    found.rows.sort(key=lambda row: TASKS.index(row.task))


def forget(found: Found, tasks: Sequence[Task], peers: Sequence[str]) -> None:
    """Take out what is about to be measured again."""
    precisions = {task.precision for task in tasks}
    again = {OURS, *peers}
    found.rows = [row for row in found.rows if row.task not in tasks]
    found.agreement = [
        line
        for line in found.agreement
        if line.precision not in precisions or line.system not in again
    ]
    found.missing = [
        line
        for line in found.missing
        if line.system not in again or line.precision not in {None, *precisions}
    ]


def prepare(names: Sequence[str], environments: Path, found: Found) -> list[System]:
    """Install the peers; one that can't be had is noted."""
    systems = [ours(MODEL)]
    for name in names:
        try:
            systems.append(peer(name, environments.resolve(), MODEL, found.threads))
        except PeerError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            found.missing.append(Missing(system=name, precision=None, reason=str(error)))
    return systems


def write_model() -> None:
    """Write the model that all are given."""
    print(f"writing the model to {MODEL.relative_to(ROOT)} ...", file=sys.stderr, flush=True)
    subprocess.run(
        [sys.executable, "-m", "bench.weights", str(MODEL)],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
        check=True,
    )


def blank(scope: str, threads: int, rounds: int) -> Found:
    """Return what is known before anything is measured."""
    return Found(
        scope=scope,
        date=dt.datetime.now(tz=dt.UTC).date().isoformat(),
        machine=machine() | {"python": platform.python_version()},
        threads=threads,
        rounds=rounds,
        versions={},
    )


def read(data: Path) -> Found:
    """Return what an earlier run found."""
    return Found.model_validate_json(data.read_text(encoding="utf-8"))


if __name__ == "__main__":
    # As an interrupt does: leave through the blocks that end the workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    started = time.monotonic()
    status = main()
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr)
    sys.exit(status)
