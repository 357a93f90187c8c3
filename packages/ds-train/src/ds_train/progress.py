"""Progress of a run, stage by stage: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ds_train.callbacks import Callback, StepMetrics

_SECONDS_BETWEEN_LINES = 10.0


class Stage:
    """One stage in progress.

    Attributes:
        summary: What its last line will say; set it before the stage ends.
    """

    def __init__(self, name: str, console: Console, bar: Progress | None) -> None:
        self.summary = ""
        self._name = name
        self._console = console
        self._bar = bar
        self._task = None if bar is None else bar.add_task(name, total=None, note="")
        self._said = time.monotonic()

    def report(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` pieces are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            line = f"  {self._name} {done:,}/{total:,}  {note}"
            self._console.print(line, highlight=False, soft_wrap=True)


class Stages:
    """The stages of a run.

    Args:
        console: Where to show them.
        count: How many there will be.
    """

    def __init__(self, console: Console, count: int) -> None:
        self._console = console
        self._count = count
        self._index = 0
        self.seconds: dict[str, float] = {}

    def say(self, line: str) -> None:
        """Show a line of its own."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Run the body as the next stage and say at its end what it did and how long it took."""
        self._index += 1
        start = time.perf_counter()
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self._console, transient=True) as bar:
                stage = Stage(name, self._console, bar)
                yield stage
        else:
            stage = Stage(name, self._console, None)
            yield stage
        self.seconds[name] = time.perf_counter() - start
        head = f"[{self._index}/{self._count}] {name}"
        line = f"{head:<18} {self.seconds[name]:6.1f} s  {stage.summary}"
        self.say(line)


class TrainingProgress(Callback):
    """Shows a stage how training goes.

    Args:
        stage: Where to show it.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._steps = 0

    def on_start(self, step: int, steps: int) -> None:
        """Show where the run starts."""
        self._steps = steps
        self._stage.report(step, steps, f"from step {step}" if step else "")

    def on_step(self, metrics: StepMetrics) -> None:
        """Show loss and speed."""
        note = (
            f"loss {metrics.loss:.3f}  next token {metrics.cross_entropy:.3f} nats  "
            f"rate {metrics.learning_rate:.1e}  {metrics.tokens_per_second:,.0f} tokens/s"
        )
        self._stage.report(metrics.step, self._steps, note)
