"""What training on many ranks costs: time, bytes and idle time, beside what they should be.

`python -m bench.ranks` trains a model wider than `mini` on meshes of this machine's processes, each
with one thread, writes docs/assets/ranks.json and the figures in docs/phases/3-distribution.md.

Per step: a run of few steps and one of more, and the difference of what both took. Bytes are those
that the kernel counted on the loopback device, headers and all; busy time is processor time. With
two processors more than two processes only take turns: what four show is that nothing breaks.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from pydantic import BaseModel, ConfigDict

from bench.growth import run_case
from bench.process import ROOT
from bench.ranks_report import publish
from bench.tasks import PRESET
from ds_model import ModelConfig, parameters_by_part
from ds_train import TrainConfig, training_memory
from ds_train.data import TokenFile, write_token_file
from ds_train.metrics_log import read_metrics
from ds_train.parallel import Layout, Mesh, make_schedule, published_bubble
from ds_train.parallel.launch import launch
from ds_train.parallel.schedules import Costs
from ds_train.parallel.worker import RankRun
from ds_train.plan import Recipe, make_plan, measure_cluster

DOCS = ROOT / "docs"
FEW, MANY = 4, 16
MICRO, SIZES = 6, (4, 12)  # micro-batches, and sequences of one, where memory is measured
SCHEDULES = ("1f1b", "zb1p", "dualpipev")
BATCH, SEQUENCE = 8, 256
# Without oneDNN TensorFlow takes the system's allocator, which gives whole pages back at once.
ONE_BY_ONE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_NUM_INTEROP_THREADS": "1",
}
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
MODEL = {
    "preset": "mini",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "vocab_size": 2048,
    "intermediate_size": 768,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
MESHES: dict[str, dict[str, Any]] = {
    "one process": {"accumulation": 1},
    "one process, 4 micro-batches": {"accumulation": 4},
    "dp2": {"dp": 2, "accumulation": 1},
    "dp2, ZeRO-1": {"dp": 2, "zero": 1, "accumulation": 1},
    "ep2": {"ep": 2, "accumulation": 1},
    "pp2, 1F1B": {"pp": 2, "accumulation": 4},
    "pp2, ZB1P": {"pp": 2, "schedule": "zb1p", "accumulation": 4},
    "pp2, DualPipe's V form": {"pp": 2, "schedule": "dualpipev", "accumulation": 4},
    "dp4": {"dp": 4, "accumulation": 1},
    "pp2 x ep2": {"pp": 2, "ep": 2, "accumulation": 4},
}


class Point(BaseModel):
    """One mesh.

    Attributes:
        ranks: processes.
        step_seconds: median of a step, once all is traced.
        processor_seconds: that all ranks together were busy in a step.
        bytes: that went over the loopback device in a step.
        least_bytes: that have to, in closed form.
        first_seconds: of the first step, tracing included.
        bubble: idle share of the schedule, by its formula; 0 without a pipeline.
    """

    model_config = ConfigDict(extra="forbid")

    mesh: str
    ranks: int
    step_seconds: float
    processor_seconds: float
    bytes: float
    least_bytes: float
    first_seconds: float
    bubble: float


class Held(BaseModel):
    """What one rank of a pipeline holds for each sequence of a micro-batch, bytes.

    Attributes:
        in_flight: micro-batches whose activations it holds at once, by the schedule.
        expected: by the closed form.
        tensors: peak memory with large micro-batches less that with small ones, where each tensor's
            memory comes from the system and goes back to it, one operation after the other.
        measured: the same as it comes, with the allocator that TensorFlow takes.
    """

    model_config = ConfigDict(extra="forbid")

    schedule: str
    rank: int
    in_flight: int
    expected: float
    tensors: float
    measured: float


class Found(BaseModel):
    """Everything that was measured.

    Attributes:
        here: of a step that was planned, see `measure_here`.
    """

    model_config = ConfigDict(extra="forbid")

    points: list[Point] = []
    held: list[Held] = []
    here: dict[str, float] | None = None


def measure_here() -> dict[str, float]:
    """Plan a step of preset `bench` on this machine, and do it: seconds of both."""
    cluster = measure_cluster()
    recipe = Recipe(devices=1, batch=8, sequence=256, micro_batch=8, precision="float32")
    plan = make_plan(ModelConfig.preset(PRESET), cluster, recipe)
    done = run_case("step", {"batch": 8, "length": 256})
    measured = done["gradient_seconds"] + done["optimizer_seconds"]
    return {"planned": round(plan.step_seconds, 3), "measured": round(measured, 3)}


def config_of(mesh: dict[str, Any], steps: int, batch: int = BATCH) -> TrainConfig:
    """Return a run of so many steps on a mesh."""
    parallel = {key: value for key, value in mesh.items() if key != "accumulation"}
    train = {"steps": steps, "batch_size": batch, "accumulation": mesh["accumulation"]}
    return TrainConfig.from_dict(
        {
            "model": MODEL,
            "data": {"sequence_length": SEQUENCE},
            "schedule": {"peak": 1e-4, "warmup_steps": 2},
            "train": {**train, "log_every": 1},
            "parallel": parallel,
            "checkpoint": {"every": steps},
        }
    )


def least_bytes(config: TrainConfig) -> float:
    """Return the fewest bytes that a step's exchanges have to carry, over all ranks, float32.

    Gradients: each rank sends its sum's parts once and gets the whole once, 2 (n - 1) / n of them;
    with ZeRO-1 new weights take the second half's place. Tokens: a copy to each rank that holds
    experts of its choice, there and back, forwards and backwards, if choices are even. Activations
    and their gradients: once over each cut of the pipeline. Numbers of rows and sums: left out.
    """
    table, model = config.parallel, config.model.build()
    parts = parameters_by_part(model)
    shared = sum(part.shared for part in parts.values())
    experts = sum(part.experts for part in parts.values())
    replicas = table.ep * table.dp
    # Each of `replicas` ranks sends 2 (n - 1) / n of what it holds; over all ranks together every
    # weight is so sent 2 (n - 1) times, and an expert's by its dp holders.
    moved = 2.0 * (replicas - 1) * shared + 2.0 * (table.dp - 1) * experts
    tokens = config.train.batch_size * config.data.sequence_length
    layers = sum(model.is_moe_layer(i) for i in range(model.num_hidden_layers))
    chosen = model.num_experts_per_tok or 0
    best = model.topk_group or 1
    copies = 0.0
    if table.ep > 1:
        # Groups lie on ranks: the choice is of `best` groups, evenly.
        reached = table.ep * (1 - (1 - 1 / table.ep) ** best) if best > 1 else 1.0
        copies = min(reached, chosen) * (1 - 1 / table.ep)
    moved += 4 * layers * tokens * copies * model.hidden_size
    cuts = make_schedule(table.schedule, table.pp, config.train.accumulation).stages - 1
    if table.schedule == "dualpipev" and table.pp > 1:
        cuts -= 1  # the turn of the V lies within one rank
    moved += 2 * cuts * tokens * model.hidden_size
    return 4.0 * moved


def idle_share(config: TrainConfig) -> float:
    """Return the schedule's idle share, with a backward pass of twice a forward one."""
    table, count = config.parallel, config.train.accumulation
    if table.pp == 1:
        return 0.0
    costs = Costs()
    bubble = published_bubble(table.schedule, table.pp, costs)
    halves = 2 if table.schedule == "dualpipev" else 1  # its stages are half as long
    return bubble / halves / (bubble / halves + 3 * count)


def measure(mesh: str, tokens: TokenFile) -> Point:
    """Train a few steps, and more, on one mesh."""
    taken = []
    for steps in (FEW, MANY):
        config = config_of(MESHES[mesh], steps)
        with tempfile.TemporaryDirectory() as folder:
            before = resource.getrusage(resource.RUSAGE_CHILDREN), sent()
            run = RankRun(config, config.model.build(), tokens.path, Path(folder), resume=False)
            launch(run, lambda *_: None, lambda _: None)
            after = resource.getrusage(resource.RUSAGE_CHILDREN), sent()
            rows = read_metrics(Path(folder) / "metrics.jsonl")
        busy = sum(getattr(after[0], k) - getattr(before[0], k) for k in ("ru_utime", "ru_stime"))
        times = [BATCH * SEQUENCE / row["tokens_per_second"] for row in rows]
        taken.append((busy, after[1] - before[1], times))
    few, many = taken
    more = MANY - FEW
    return Point(
        mesh=mesh,
        ranks=config.parallel.ranks,
        step_seconds=round(statistics.median(many[2][2:]), 4),
        processor_seconds=round((many[0] - few[0]) / more, 4),
        bytes=round((many[1] - few[1]) / more),
        least_bytes=least_bytes(config),
        first_seconds=round(many[2][0], 2),
        bubble=round(idle_share(config), 4),
    )


def measure_held(schedule: str, tokens: TokenFile) -> list[Held]:
    """Train on two pipeline ranks, with micro-batches of two sizes."""
    made = make_schedule(schedule, 2, MICRO)
    tensors, measured = (peaks_apart(schedule, tokens, given) for given in (ONE_BY_ONE, {}))
    model = config_of(MESHES["one process"], 1).model.build()
    layout = Layout(model, Mesh(pp=2), made)
    points = []
    for rank in range(2):
        part = layout.memory_part(rank)
        held = [training_memory(model, size, SEQUENCE, part=part) for size in SIZES]
        few, many = (found.step + found.scratch for found in held)
        points.append(
            Held(
                schedule=schedule,
                rank=rank,
                in_flight=made.peak_activations(rank),
                expected=(many - few) / (SIZES[1] - SIZES[0]),
                tensors=tensors[rank],
                measured=measured[rank],
            )
        )
    return points


def peaks_apart(schedule: str, tokens: TokenFile, given: dict[str, str]) -> dict[int, float]:
    """Return for each rank what one more sequence in each micro-batch adds to its peak memory.

    Args:
        schedule: of the pipeline.
        tokens: to train on.
        given: variables of the ranks' environment.
    """
    peaks = []
    with patch.dict(os.environ, given):
        for size in SIZES:
            mesh = {"pp": 2, "schedule": schedule, "accumulation": MICRO}
            config = config_of(mesh, 3, MICRO * size)
            said: list[str] = []
            with tempfile.TemporaryDirectory() as folder:
                run = RankRun(config, config.model.build(), tokens.path, Path(folder), resume=False)
                launch(run, lambda *_: None, said.append)
            lines = (
                re.fullmatch(r"rank (\d+): done; held ([\d,]+) MiB at most", line) for line in said
            )
            peaks.append({int(m[1]): int(m[2].replace(",", "")) * 2**20 for m in lines if m})
    few, many = peaks
    return {rank: (many[rank] - few[rank]) / (SIZES[1] - SIZES[0]) for rank in few}


def sent() -> int:
    """Return the bytes that have gone over the loopback device so far."""
    return int(LOOPBACK.read_text(encoding="ascii"))


def main(words: Sequence[str] | None = None) -> int:
    """Measure all meshes, write the page."""
    made = argparse.ArgumentParser(prog="bench.ranks", description=__doc__)
    made.add_argument("--render", action="store_true", help="write the page again from its data")
    made.add_argument("--meshes", default="", help="semicolon-separated: renew only these")
    made.add_argument("--memory", action="store_true", help="renew only what schedules hold")
    made.add_argument("--plan", action="store_true", help="renew only the plan's figures")
    made.add_argument("--out", type=Path, default=DOCS, help="the folder of the page [docs]")
    given = made.parse_args(words)
    data: Path = given.out / "assets" / "ranks.json"
    found = Found()
    if data.exists():
        found = Found.model_validate_json(data.read_text(encoding="utf-8"))
    if not given.render:
        some = given.meshes or given.memory or given.plan
        wanted = [name for name in given.meshes.split(";") if name]
        wanted = wanted if some else list(MESHES)
        if given.plan or not some:
            found.here = measure_here()
            keep(found, data)
        vocab = config_of(MESHES["dp2"], 1).model.build().vocab_size
        ids = np.random.default_rng(0).integers(2, vocab, 50_000)
        with tempfile.TemporaryDirectory() as folder:
            tokens = write_token_file(Path(folder), [ids.tolist()], vocab, None, None)
            for mesh in wanted:
                print(mesh, file=sys.stderr, flush=True)
                point = measure(mesh, tokens)
                found.points = [p for p in found.points if p.mesh != mesh] + [point]
                keep(found, data)
            for schedule in SCHEDULES if given.memory or not some else ():
                print(f"memory of {schedule}", file=sys.stderr, flush=True)
                held = measure_held(schedule, tokens)
                found.held = [h for h in found.held if h.schedule != schedule] + held
                keep(found, data)
    found.points.sort(key=lambda point: list(MESHES).index(point.mesh))
    publish(found.model_dump(), given.out)
    return 0


def keep(found: Found, data: Path) -> None:
    """Write the data; nothing measured is lost."""
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
