"""The run's record: one JSON object a line, one line every few steps."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ds_train.callbacks import Callback, StepMetrics
from ds_train.stability import StabilityMetrics


class _Lines:
    """A JSON Lines file that grows; lines of steps that are not done are dropped first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def open(self, step: int) -> None:
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        part = self._path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        part.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class MetricsLog(Callback):
    """Writes `StepMetrics` to a JSON Lines file.

    A run that goes on from a checkpoint first drops the lines after it, so that every step
    stands there once.

    Args:
        path: The file.
        every: Steps between lines; the first and the last step are always written.
    """

    def __init__(self, path: Path, every: int) -> None:
        self._lines = _Lines(path)
        self._every = every
        self._steps = 0

    def on_start(self, step: int, steps: int) -> None:
        """Opens the file and drops lines of steps that are not done."""
        self._steps = steps
        self._lines.open(step)

    def on_step(self, metrics: StepMetrics) -> None:
        """Writes a line if it is time."""
        if not (metrics.step % self._every == 0 or metrics.step in (1, self._steps)):
            return
        row = asdict(metrics) | {
            "max_violation": [round(v, 4) for v in metrics.max_violation],
            "loads": metrics.loads.astype(int).tolist(),
            "tokens_per_second": round(metrics.tokens_per_second, 1),
        }
        self._lines.write(row)

    def on_end(self, step: int) -> None:  # noqa: ARG002 - the hook's signature
        """Closes the file."""
        self._lines.close()


class StabilityLog(Callback):
    """Writes `StabilityMetrics` to a JSON Lines file, a line a look; resumes as `MetricsLog`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._lines = _Lines(path)

    def on_start(self, step: int, steps: int) -> None:  # noqa: ARG002 - the hook's signature
        """Opens the file and drops lines of steps that are not done."""
        self._lines.open(step)

    def on_stability(self, metrics: StabilityMetrics) -> None:
        """Writes a line."""
        self._lines.write(metrics.as_json())

    def on_end(self, step: int) -> None:  # noqa: ARG002 - the hook's signature
        """Closes the file."""
        self._lines.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
