"""The run itself: workers alive together, one at work at a time, timed pair by pair."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from bench.agreement import Reference, ask, compare
from bench.found import OURS, TRANSFORMERS, Agreement, Found, Missing, Row, Speed
from bench.limits import combine
from bench.process import Process, WorkerError
from bench.race import Race
from bench.ratios import Spread, speed_ratios
from bench.systems import System
from bench.tasks import PRECISIONS, Precision, Task


def measure(
    systems: Sequence[System],
    tasks: Sequence[Task],
    threads: int,
    found: Found,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Do all tasks with all systems, precision by precision; add what is found, and keep it."""
    reference: Reference | None = None
    if all(task.precision != "float32" for task in tasks):
        reference = _reference(systems, threads)
    for precision in PRECISIONS:
        todo = [task for task in tasks if task.precision == precision]
        if not todo:
            continue
        with ExitStack() as stack:
            workers = {}
            for name, process in _start(systems, precision, threads, found):
                workers[name] = stack.enter_context(process)
            train = next((task for task in todo if task.kind == "train"), None)
            reference = _agree(workers, precision, train, reference, found)
            found.limits = combine([found.limits, *_limits(workers)])
            for task in todo:
                found.rows.append(time_row(workers, task, found.rounds))
                keep()
            found.limits = combine([found.limits, *_limits(workers)])  # once may be a bad moment


def _reference(systems: Sequence[System], threads: int) -> Reference | None:
    """Ask transformers in float32 for what others are compared with, if it takes part."""
    for system in systems:
        if system.name == TRANSFORMERS:
            with system.start("float32", threads, thorough=False) as worker:
                return ask(worker, None)
    return None


def _start(
    systems: Sequence[System], precision: Precision, threads: int, found: Found
) -> Iterator[tuple[str, Process]]:
    """Start those that have the precision, one by one; a failure is noted."""
    for system in systems:
        if precision not in system.precisions:
            continue
        _say(f"starting {system.name}, {precision}")
        start = time.perf_counter()
        process = system.start(precision, threads, thorough=found.scope == "full")
        try:
            found.versions |= process.ask("versions")
            found.loading[f"{system.name}, {precision}"] = time.perf_counter() - start
        except WorkerError as error:
            process.close()
            found.missing.append(
                Missing(system=system.name, precision=precision, reason=str(error))
            )
            _say(f"{system.name}, {precision}: {error}")
            continue
        yield system.name, process


def _agree(
    workers: dict[str, Process],
    precision: Precision,
    train: Task | None,
    reference: Reference | None,
    found: Found,
) -> Reference | None:
    """Compare each worker with the reference, which transformers gives in float32."""
    if reference is None and precision == "float32" and TRANSFORMERS in workers:
        reference = ask(workers[TRANSFORMERS], train)
    if reference is None:
        return None
    for name, process in list(workers.items()):
        if (name, precision) == (TRANSFORMERS, "float32"):
            continue
        try:
            said = ask(process, train)
        except WorkerError as error:
            if not process.alive:
                del workers[name]
            reason = f"agreement not measured: {error}"
            found.missing.append(Missing(system=name, precision=precision, reason=reason))
            _say(f"{name}, {precision}: {reason}")
            continue
        agreement: Agreement = compare(name, precision, said, reference)
        found.agreement.append(agreement)
        _say(f"{name}, {precision}: {agreement}")
    return reference


def _limits(workers: dict[str, Process]) -> list[dict[str, float]]:
    """Ask those whose kernels set the limits."""
    return [workers[name].ask("limits") for name in (OURS, TRANSFORMERS) if name in workers]


def time_row(workers: dict[str, Process], task: Task, rounds: int) -> Row:
    """Warm everybody up for a task, then time pairs of us and each peer in turn.

    A worker that ends is taken out of `workers`.
    """
    speeds = {}
    for name, process in list(workers.items()):
        prepared = _prepare(process, task)
        _say(f"{task.key}: {name} {prepared}")
        if prepared["tried"]:
            speeds[name] = Speed.model_validate(prepared)
        if not process.alive:
            del workers[name]
    race = Race(workers, OURS, [name for name, speed in speeds.items() if speed.mode])
    for index in range(rounds):
        race.round(index)
    for name, reason in race.failed.items():
        speeds[name] = Speed(mode=None, tried={"run": reason})
        if not workers[name].alive:
            del workers[name]
    for name in race.runs.keys() - race.failed.keys():
        speeds[name].speed = Spread.of(race.runs[name])
        if race.pairs.get(name):
            speeds[name].ratio = speed_ratios(race.pairs[name])
    return Row(task=task, systems=speeds, others=race.others.share(), idle=race.idle_share())


def _prepare(process: Process, task: Task) -> dict[str, Any]:
    """Let a worker warm up; one that fails has no mode, and says why."""
    try:
        prepared: dict[str, Any] = process.ask("prepare", task=task.to_json())
    except WorkerError as error:
        return {"mode": None, "tried": {"warm-up": str(error)}}
    return prepared


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
