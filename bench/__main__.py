"""The command line. `python3 dev.py bench -- WORDS` calls it with its environments."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.environments import PEERS, PeerError
from bench.found import TRANSFORMERS, Found, Missing
from bench.measure import measure
from bench.process import ROOT
from bench.report import page, read_notes
from bench.systems import System, ours, peer
from bench.tasks import PRESET, TASKS
from ds_model import ModelConfig

MODEL = ROOT / "build" / "bench" / "model"
DOCS = ROOT / "docs"


def main(words: Sequence[str] | None = None) -> int:
    """Measure what the words ask for, and write the page and its figures."""
    given = parser().parse_args(words)
    data = given.out / "assets" / "benchmarks.json"
    if given.render:
        return render(Found.model_validate_json(data.read_text(encoding="utf-8")), given.out)
    names = given.peers.split(",") if given.peers is not None else None
    if names is None:
        names = list(PEERS) if given.full else [TRANSFORMERS]
    found = blank("full" if given.full else "short", given.threads, given.rounds)
    systems = prepare([name for name in names if name], given.environments, found)
    tasks = [
        task
        for task in TASKS
        if (given.full or not task.long or given.rows) and task.key.startswith(given.rows)
    ]
    measure(systems, tasks, given.threads, found)
    return render(found, given.out)


def parser() -> argparse.ArgumentParser:
    """Return the command line's."""
    made = argparse.ArgumentParser(prog="bench", description=__doc__)
    made.add_argument("--full", action="store_true", help="all peers, all rows")
    made.add_argument("--peers", help=f"comma-separated, instead of the usual: {', '.join(PEERS)}")
    made.add_argument("--rows", default="", help="only tasks whose name starts so: decode-1x512")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument("--out", type=Path, default=DOCS, help="for benchmarks.md and assets/")
    made.add_argument("--render", action="store_true", help="write the page again, measure nothing")
    made.add_argument("--environments", type=Path, default=ROOT / ".nox" / "bench")
    return made


def blank(scope: str, threads: int, rounds: int) -> Found:
    """Return what is known before anything is measured."""
    return Found(
        scope=scope,
        date=dt.datetime.now(tz=dt.UTC).date().isoformat(),
        machine={
            "processor": processor(),
            "processors": str(os.cpu_count()),
            "memory": f"{memory_gib():.0f} GiB",
            "system": platform.system(),
            "python": platform.python_version(),
        },
        threads=threads,
        rounds=rounds,
        versions={},
    )


def prepare(names: Sequence[str], environments: Path, found: Found) -> list[System]:
    """Write the model and install the peers; one that can't be had is noted."""
    print("writing the model ...", file=sys.stderr, flush=True)
    subprocess.run(
        [sys.executable, "-m", "bench.weights", str(MODEL)],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
        check=True,
    )
    systems = [ours(MODEL)]
    for name in names:
        try:
            systems.append(peer(name, environments.resolve(), MODEL, found.threads))
        except PeerError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            found.missing.append(Missing(system=name, precision=None, reason=str(error)))
    return systems


def render(found: Found, out: Path) -> int:
    """Write the data and the page."""
    (out / "assets").mkdir(parents=True, exist_ok=True)
    data = found.model_dump_json(indent=1) + "\n"
    (out / "assets" / "benchmarks.json").write_text(data, encoding="utf-8")
    text = page(found, ModelConfig.preset(PRESET), read_notes(ROOT / "bench" / "notes.md"))
    (out / "benchmarks.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def processor() -> str:
    """Return the processor's name and what matters here of what it can do."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    flags = fields.get("flags", "").split()
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    return " ".join(
        [fields.get("model name", platform.machine()), *(flag for flag in known if flag in flags)]
    )


def memory_gib() -> float:
    """Return how much memory the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr)
    sys.exit(status)
