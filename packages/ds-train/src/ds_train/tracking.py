"""Where a run's numbers go to be looked at: TensorBoard, MLflow or Weights & Biases.

One small interface; each service's package is an extra and is imported when it is asked for. All
three work without a network: files lie beside the run unless the service's own variables
(`MLFLOW_TRACKING_URI`, `WANDB_MODE`) say otherwise.
"""

import io
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tensorflow as tf

from ds_train.callbacks import Callback, StepMetrics
from ds_train.stability import StabilityMetrics

PROJECT = "deepseek-v3"
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
KINDS = ("none", "auto", *PACKAGES)


class Tracker:
    """What a run tells a service; this one tells nobody. Subclass it for another service."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Note what the run was made with, by name; nested mappings are allowed."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Note numbers of a step, by name."""

    def figure(self, name: str, figure: Any, step: int = 0) -> None:
        """Keep a matplotlib figure."""

    def artifact(self, path: Path) -> None:
        """Keep a file."""

    def close(self) -> None:
        """Write out what waits; nothing may follow."""


def open_tracker(kind: str, folder: str | Path, name: str) -> Tracker:
    """Return the tracker of one run.

    Args:
        kind: "tensorboard", "mlflow", "wandb"; "auto" is TensorBoard where it is installed and
            "none" elsewhere.
        folder: The run's; files of the tracker go below it.
        name: Of the run.

    Raises:
        ValueError: The kind is unknown, or its package is not installed; says what to type.
    """
    if kind not in KINDS:
        raise ValueError(f"tracker is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind == "auto":
        kind = "tensorboard" if find_spec("tensorboard") else "none"
    if kind == "none":
        return Tracker()
    if find_spec(PACKAGES[kind]) is None:
        raise ValueError(f"tracker is {kind!r}, which is not here: pip install 'ds-train[{kind}]'")
    folder = Path(folder)
    if kind == "tensorboard":
        return _TensorBoard(folder)
    return _MLflow(folder, name) if kind == "mlflow" else _Wandb(folder, name)


class TrackerCallback(Callback):
    """Sends a training run's metrics to a tracker.

    Args:
        tracker: Whoever opened it closes it.
        every: Steps between reports.
    """

    def __init__(self, tracker: Tracker, every: int = 1) -> None:
        self._tracker, self._every = tracker, every

    def on_step(self, metrics: StepMetrics) -> None:
        """Send losses, rates and balance."""
        if metrics.step != 1 and metrics.step % self._every:
            return
        values = {
            f"train/{name}": getattr(metrics, name)
            for name in (
                "loss",
                "cross_entropy",
                "mtp_cross_entropy",
                "balance_loss",
                "gradient_norm",
                "learning_rate",
                "tokens_per_second",
                "skipped",
                "loss_scale",
            )
        }
        for layer, violation in enumerate(metrics.max_violation):
            values[f"balance/max_violation_{layer}"] = violation
        self._tracker.metrics(metrics.step, values)

    def on_stability(self, metrics: StabilityMetrics) -> None:
        """Send what rounding did, and gradient norms."""
        values = {f"gradient_norm/{path}": norm for path, norm in metrics.gradient_norms.items()}
        for name, stats in metrics.operands.items():
            for field in ("amax", "underflow", "overflow", "drift"):
                values[f"fp8_{field}/{name}"] = getattr(stats, field)
        self._tracker.metrics(metrics.step, values)


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested mappings as one, names joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


class _TensorBoard(Tracker):
    """Event files under `FOLDER/tensorboard`; a run that goes on adds one."""

    def __init__(self, folder: Path) -> None:
        self._writer = tf.summary.create_file_writer(str(folder / "tensorboard"))

    def params(self, values: Mapping[str, Any]) -> None:
        rows = "".join(f"| {name} | {value} |\n" for name, value in flat(values).items())
        with self._writer.as_default(step=0):
            tf.summary.text("params", f"| name | value |\n|---|---|\n{rows}")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        with self._writer.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)

    def figure(self, name: str, figure: Any, step: int = 0) -> None:
        pixels = tf.io.decode_png(_png(figure), channels=4)
        with self._writer.as_default(step=step):
            tf.summary.image(name, pixels[None])

    def close(self) -> None:
        self._writer.close()


class _MLflow(Tracker):
    """A run of MLflow: in `FOLDER/mlflow.db` unless `MLFLOW_TRACKING_URI` is set."""

    def __init__(self, folder: Path, name: str) -> None:
        from mlflow import MlflowClient  # noqa: PLC0415 - an extra

        where, files = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not where:
            folder.mkdir(parents=True, exist_ok=True)
            where = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
            files = (folder / "mlartifacts").resolve().as_uri()
        self._client = MlflowClient(where)
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(PROJECT, files)
        )
        self._run = self._client.create_run(experiment, run_name=name).info.run_id

    def params(self, values: Mapping[str, Any]) -> None:
        for name, value in flat(values).items():
            self._client.log_param(self._run, name, value)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def figure(self, name: str, figure: Any, step: int = 0) -> None:
        self._client.log_figure(self._run, figure, f"figures/{name}-{step}.png")

    def artifact(self, path: Path) -> None:
        self._client.log_artifact(self._run, str(path))

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Wandb(Tracker):
    """A run of Weights & Biases: offline, under `FOLDER/wandb`, unless `WANDB_MODE` is set."""

    def __init__(self, folder: Path, name: str) -> None:
        import wandb  # noqa: PLC0415 - an extra

        folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "offline")
        self._image = wandb.Image
        self._run = wandb.init(
            project=PROJECT, name=name, dir=folder, mode=mode, reinit="create_new"
        )

    def params(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(flat(values))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def figure(self, name: str, figure: Any, step: int = 0) -> None:
        self._run.log({name: self._image(figure)}, step=step)

    def artifact(self, path: Path) -> None:
        self._run.save(str(path), base_path=str(path.parent))

    def close(self) -> None:
        self._run.finish()
