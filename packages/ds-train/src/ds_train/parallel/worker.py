"""One rank as a process: what `ds-train launch` starts, and what a scheduler starts.

Exit codes: 0 all steps are done; 2 bad input; 3 another rank is gone; 4 told to stop, and stopped
after a checkpoint.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ds_model import ConfigError, ModelConfig
from ds_train.callbacks import Callback, StepMetrics
from ds_train.config import TrainConfig
from ds_train.data import TokenFile, open_token_file
from ds_train.errors import TrainError
from ds_train.parallel.mesh import Mesh
from ds_train.parallel.world import LOST, LostRankError, World
from ds_train.trainer import Stopped, Trainer

DONE, BAD_INPUT, STOPPED = 0, 2, 4
PROGRESS = "progress "  # starts a line that is for the launcher
_SECONDS_BETWEEN = 0.1


class RankRun(NamedTuple):
    """What all ranks of a run are told, as JSON in a file.

    Attributes:
        config: of the run.
        model: of the whole model.
        tokens: folder of the token file.
        out: folder of the run.
        resume: whether to go on where it stopped.
    """

    config: TrainConfig
    model: ModelConfig
    tokens: Path
    out: Path
    resume: bool

    def write(self, path: Path) -> None:
        """Write the file."""
        values: dict[str, Any] = {
            "config": self.config.model_dump(mode="json"),
            "model": self.model.to_dict(),
            "tokens": str(self.tokens.resolve()),
            "out": str(self.out.resolve()),
            "resume": self.resume,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> RankRun:
        """Read what `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            TrainConfig.from_dict(values["config"]),
            ModelConfig.from_dict(values["model"]),
            Path(values["tokens"]),
            Path(values["out"]),
            values["resume"],
        )


class Progress(Callback):
    """Tells the launcher how far the run is, now and then."""

    def __init__(self) -> None:
        self._steps = 0
        self._said = 0.0

    def on_start(self, step: int, steps: int) -> None:
        """Say where the run starts."""
        self._steps = steps
        self._say(step, f"from step {step}" if step else "")

    def on_step(self, metrics: StepMetrics) -> None:
        """Say loss and speed."""
        if time.monotonic() - self._said > _SECONDS_BETWEEN or metrics.step == self._steps:
            note = f"loss {metrics.loss:.3f}  {metrics.tokens_per_second:,.0f} tokens/s"
            self._say(metrics.step, note)

    def _say(self, step: int, note: str) -> None:
        self._said = time.monotonic()
        say(PROGRESS + json.dumps([step, self._steps, note]))


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201 - to the launcher, or a scheduler's log


def train_rank(run: RankRun, world: World, tokens: TokenFile, callbacks: list[Callback]) -> None:
    """Train one rank's share until all steps are done.

    Args:
        run: what to train.
        world: this rank's.
        tokens: of the run's text.
        callbacks: who hears of each step, on rank 0.

    Raises:
        Stopped: a rank was told to stop; a checkpoint stands.
        TrainError: as `Trainer` raises, and for a lost rank.
    """
    trainer = Trainer(run.config, tokens, run.out, run.model, callbacks, world)
    say(trainer.describe())
    trainer.train(run.resume)


def guarded(rank: Callable[[], str], do: Callable[[], None]) -> int:
    """Run one rank and return its exit code; what went wrong is said in one line.

    Args:
        rank: names this rank, once it knows.
        do: the work.
    """
    try:
        do()
    except Stopped as stopped:
        say(f"{rank()}: {stopped}")
        return STOPPED
    except LostRankError as error:
        say(f"{rank()}: {error}")
        return LOST
    except (TrainError, ConfigError, OSError) as error:
        say(f"{rank()}: {' '.join(str(error).split())}")
        return BAD_INPUT
    return DONE


def leave(code: int) -> None:
    """End the process at once.

    TensorFlow's runtime would first wait for ranks that are gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(path: str) -> int:
    """Train the rank that the environment says this is.

    Args:
        path: of the file that a `RankRun` wrote.
    """
    name = "rank ?"
    run = RankRun.read(Path(path))
    table = run.config.parallel

    def work() -> None:
        nonlocal name
        world = World.join(Mesh(table.pp, table.ep, table.dp))
        name = f"rank {world.rank}"
        train_rank(run, world, open_token_file(run.tokens), [Progress()])
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        say(f"{name}: done; held {most:,.0f} MiB at most")
        world.leave_together()

    return guarded(lambda: name, work)
