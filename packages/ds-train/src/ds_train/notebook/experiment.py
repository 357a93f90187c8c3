"""An experiment: one line to begin it, and everything about it in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from IPython import get_ipython
from IPython.core.pylabtools import select_figure_formats
from IPython.display import HTML, display
from matplotlib.figure import Figure

from ds_train.notebook.environment import Environment
from ds_train.tracking import open_tracker

SHOWN = ("tensorflow", "keras", "ds-precision", "ds-attention", "ds-moe", "ds-model", "ds-train")


def start(
    name: str,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    out: str | Path = "experiments",
    tracker: str = "tensorboard",
) -> Experiment:
    """Begin an experiment: seeds, devices, figures in the notebook, a folder, a tracker.

    Seeds Python, NumPy and TensorFlow; lets TensorFlow take a GPU's memory as it needs it; lets a
    `Figure` at the end of a cell show itself; shows a table of machine, versions, commit, seed and
    configuration, and writes it down.

    Args:
        name: Of the experiment; its folder's too.
        seed: Of all random numbers.
        config: What the experiment is about, name by name; written down.
        out: Where folders of experiments lie.
        tracker: "tensorboard", "mlflow", "wandb" or "none": see `ds_train.open_tracker`.

    Raises:
        ValueError: The tracker is unknown, or its package is not installed.
    """
    for gpu in tf.config.list_physical_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(gpu, enable=True)
        except RuntimeError:  # TensorFlow uses it already: as it is
            break
    keras.utils.set_random_seed(seed)
    if (shell := get_ipython()) is not None:
        select_figure_formats(shell, {"png"}, bbox_inches=None)
    when = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]
    experiment = Experiment(name, Path(out) / name / when, seed, dict(config or {}), tracker)
    display(HTML(experiment.as_html()))
    return experiment


class Experiment:
    """What `start` returns.

    Args:
        name: As of `start`.
        folder: As of `start`, with name and time.
        seed: As of `start`.
        config: As of `start`.
        tracker: As of `start`.

    Attributes:
        folder: Everything that is written: `environment.json`, `config.json`, figures,
            `results.json`, the tracker's own files.
        environment: What it runs on.
        results: What `log` was given without a step, and `finish`.
    """

    def __init__(
        self, name: str, folder: Path, seed: int, config: dict[str, Any], tracker: str = "none"
    ) -> None:
        self.name, self.folder, self.seed, self.config = name, folder, seed, config
        self.environment = Environment.current()
        self.results: dict[str, Any] = {}
        folder.mkdir(parents=True)
        self.environment.save(folder / "environment.json")
        _write(folder / "config.json", {"name": name, "seed": seed, **config})
        self._tracker = open_tracker(tracker, folder, name)
        self._tracker.params({"seed": seed, **config})

    def log(self, step: int | None = None, **numbers: float) -> None:
        """Note numbers, of a step or of the whole.

        Args:
            step: Which; none for what describes the whole experiment.
            **numbers: By name.
        """
        values = {key: float(value) for key, value in numbers.items()}
        self._tracker.metrics(0 if step is None else step, values)
        if step is None:
            self.results |= values

    def figure(self, name: str, figure: Figure) -> Figure:
        """Keep a figure as `NAME.png` and return it, so that the cell shows it."""
        figure.savefig(self.folder / f"{name}.png", dpi=120)
        self._tracker.figure(name, figure)
        return figure

    def finish(self, **results: Any) -> dict[str, Any]:
        """Write `results.json` with what was logged and what is given here, and return it.

        Args:
            **results: Plain JSON types, NumPy's and TensorFlow's numbers.
        """
        self.results |= {key: _plain(value) for key, value in results.items()}
        _write(self.folder / "results.json", self.results)
        self._tracker.artifact(self.folder / "results.json")
        self._tracker.close()
        return self.results

    def as_html(self) -> str:
        """Return the table that `start` shows."""
        found = self.environment
        versions = [
            f"{name} {found.packages[name].partition(' @ ')[0]}"
            for name in SHOWN
            if name in found.packages
        ]
        rows = {
            "experiment": self.name,
            "machine": f"{found.processor}, {found.processors} processors, "
            f"{found.memory / 2**30:.0f} GiB",
            "devices": ", ".join(found.devices),
            "versions": f"Python {found.python}, {', '.join(versions)}",
            "commit": found.commit or "not in git",
            "seed": str(self.seed),
            **{key: str(value) for key, value in self.config.items()},
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(key)}</th>"
            f"<td style='text-align:left'>{escape(value)}</td></tr>"
            for key, value in rows.items()
        )
        return f"<table>{cells}</table>"


def _write(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps({key: _plain(value) for key, value in values.items()}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Return plain JSON types for NumPy's and TensorFlow's; text for what else there is."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "numpy"):
        value = value.numpy()
    return value.tolist() if hasattr(value, "tolist") else str(value)
