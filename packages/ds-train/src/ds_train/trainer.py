"""The training run: batches in, checkpoints and metrics out, from wherever it stopped."""

import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ds_model import CausalLM, ModelConfig
from ds_moe import max_violation
from ds_train.average import ParameterAverage
from ds_train.callbacks import Callback, StepMetrics
from ds_train.checkpoint import Alone, CheckpointStore, Contents, whole_contents
from ds_train.config import TrainConfig
from ds_train.data import PackedSequences, TokenFile
from ds_train.errors import CheckpointError, TrainConfigError, TrainError
from ds_train.metrics_log import MetricsLog, StabilityLog
from ds_train.optimizer import AdamW
from ds_train.parallel.mesh import Mesh
from ds_train.parallel.share import RankShare
from ds_train.parallel.world import World
from ds_train.stability import StabilityProbe
from ds_train.step import StepOutput, TrainStep

# Tables whose values do not change the numbers of a run.
_FREE_TABLES = ("checkpoint", "parallel", "track")
_FREE_KEYS = {
    "train": ("accumulation", "log_every", "recompute", "watch_every", "nonfinite"),
    "data": ("suffixes", "held_out"),
}


class Stopped(Exception):  # noqa: N818 - not an error
    """The process, or another rank, was told to stop; what was done is saved."""


class Trainer:
    """Trains a model on packed tokens; a run with the same `out` goes on where it stopped.

    The model's weights, the order of the data and every step follow from the configuration
    and the tokens, so a run that was killed and resumed ends in the same bits as one that was
    not.

    Args:
        config: Everything that decides the run.
        tokens: A token file, or ids `[tokens]` of an unsigned integer type.
        out: Folder for `checkpoints/` and `metrics.jsonl`.
        model_config: The model, where it is not `config.model.build()` as it stands.
        callbacks: Who else hears of each step; on many ranks the first alone.
        world: This rank among the others, where `[parallel]` says that there are others.

    Attributes:
        model: The model in training, made from `config.train.seed`; of many ranks this one's part.
        optimizer: Its AdamW.
        average: The running average of its weights, where `[train] average_decay` asks for it.
        checkpoints: The run's checkpoints.

    Raises:
        DataError: If the text is too short for one sequence.
        TrainConfigError: If the model or the batch does not fit the mesh.
        TrainError: If a token is outside the model's vocabulary.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokens: TokenFile | np.ndarray,
        out: str | Path,
        model_config: ModelConfig | None = None,
        callbacks: Sequence[Callback] = (),
        world: World | None = None,
    ) -> None:
        mesh = Mesh(config.parallel.pp, config.parallel.ep, config.parallel.dp)
        if mesh.size > 1 and (world is None or world.mesh != mesh):
            msg = f"[parallel] describes {mesh.size} ranks ({mesh}); start it with ds-train launch"
            raise TrainConfigError(msg)
        self.config = config
        self.out = Path(out)
        ids = tokens.open() if isinstance(tokens, TokenFile) else tokens
        ids = ids[-math.ceil(config.data.latest * len(ids)) :]
        self._data = PackedSequences(ids, config.data.sequence_length, config.train.seed)
        self._model_config = model_config or config.model.build()
        if int(ids.max()) >= self._model_config.vocab_size:
            msg = (
                f"token id {int(ids.max())} in the data is outside the model's vocabulary; "
                f"vocab_size is {self._model_config.vocab_size}"
            )
            raise TrainError(msg)
        self._data_sha256 = tokens.sha256 if isinstance(tokens, TokenFile) else _digest(ids)
        keras.utils.set_random_seed(config.train.seed)
        table = config.optimizer
        self.optimizer = AdamW(
            config.learning_rate(),
            table.beta_1,
            table.beta_2,
            epsilon=table.epsilon,
            weight_decay=table.weight_decay,
            moments=table.moments,
        )
        whole = (config, self._model_config, self.optimizer)
        self._share = _WholeShare(*whole) if world is None else RankShare(*whole, world)
        self.model = self._share.model
        decay = config.train.average_decay
        weights = self.model.trainable_variables
        self.average = ParameterAverage(weights, decay) if decay else None
        everyone = self._share.everyone
        self.checkpoints = CheckpointStore(
            self.out / "checkpoints", config.checkpoint.keep, everyone
        )
        log: list[Callback] = [MetricsLog(self.out / "metrics.jsonl", config.train.log_every)]
        self._probe = None
        if config.train.watch_every and everyone.rank == 0:
            loss = config.loss
            self._probe = StabilityProbe(self.model, loss.mtp_weight, loss.balance_alpha)
            log.append(StabilityLog(self.out / "stability.jsonl"))
        self._skipped = 0
        self._callbacks = [*log, *callbacks] if everyone.rank == 0 else []

    def train(self, resume: bool = True) -> CausalLM:
        """Does the steps that are left and returns the trained model.

        Args:
            resume: Go on from the last checkpoint under `out`; else start at step 0, which
                is refused while there are checkpoints, so that nothing is lost.

        Raises:
            CheckpointError: If a checkpoint is broken, of another run, or cannot be written.
            Stopped: On many ranks, if one of them was sent SIGTERM; a checkpoint stands.
            TrainError: If the loss is no longer finite, or a rank is lost.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._share.check_same(self.config, self._data_sha256)
        step = self._restore(resume)
        steps = self.config.train.steps
        for callback in self._callbacks:
            callback.on_start(step, steps)
        try:
            with self._share.hears_of_stops():
                while step < steps:
                    self._one_step(step)
                    step += 1
                    asked = self._share.asked_to_stop()
                    if step % self.config.checkpoint.every == 0 or step == steps or asked:
                        self._save(step)
                    if asked and step < steps:
                        raise Stopped(f"told to stop; step {step} is saved")
        finally:
            for callback in self._callbacks:
                callback.on_end(step)
        return self.model

    def describe(self) -> str:
        """Return one line that says what of the model and of the mesh is here."""
        return self._share.describe()

    def _save(self, step: int) -> None:
        path = self.checkpoints.save(step, self._contents(to_save=True), self._state())
        for callback in self._callbacks:
            callback.on_checkpoint(path)

    def _contents(self, to_save: bool) -> Contents:
        return self._share.contents(to_save, [] if self.average is None else self.average.values)

    def _one_step(self, step: int) -> None:
        table = self.config.train
        batch = self._data.batch(step, table.batch_size)
        if self._probe is not None and (step + 1) % table.watch_every == 0:
            first = batch[: table.batch_size // table.accumulation]
            looked = self._probe.look(step + 1, tf.constant(first))
            for callback in self._callbacks:
                callback.on_stability(looked)
        start = time.perf_counter()
        output: StepOutput = self._share.run(batch, table.accumulation)
        scalars = {name: float(value) for name, value in output.scalars.items()}
        seconds = time.perf_counter() - start
        applied = scalars.pop("applied") > 0
        self._skipped += not applied
        finite = math.isfinite(scalars["loss"]) and math.isfinite(scalars["gradient_norm"])
        if applied and not finite:
            msg = (
                f"step {step + 1}: loss {scalars['loss']} and gradient norm "
                f"{scalars['gradient_norm']} must be finite; lower [schedule] peak "
                f"({self.config.schedule.peak}) and go on from the last checkpoint"
            )
            raise TrainError(msg)
        if self.average is not None and applied:
            self.average.update()
        metrics = StepMetrics(
            step=step + 1,
            tokens_per_second=batch[:, 1:].size / seconds,
            max_violation=tuple(max_violation(output.loads).numpy().tolist()),
            loads=output.loads.numpy(),
            skipped=self._skipped,
            **scalars,
        )
        for callback in self._callbacks:
            callback.on_step(metrics)

    def _restore(self, resume: bool) -> int:
        if not resume:
            self.checkpoints.refuse_any()
        steps = self.checkpoints.steps()
        if not steps:
            return 0
        state = self.checkpoints.read_state(steps[-1])
        self._check_same_run(state, self.checkpoints.path(steps[-1]))
        self.checkpoints.load(steps[-1], self._contents(to_save=False))
        scaling = state.get("loss_scaling", {})
        self._skipped = scaling.get("skipped", 0)
        self._share.loaded(scaling)
        return steps[-1]

    def _check_same_run(self, state: dict[str, Any], path: Path) -> None:
        now, before = self._state(), _decisive(_with_defaults(state.get("config", {})))
        for table, values in _decisive(now["config"]).items():
            was = before.get(table, {})
            for key in sorted(values.keys() | was.keys()):
                if values.get(key) != was.get(key):
                    msg = (
                        f"{path}: of another run: [{table}] {key} was {was.get(key)!r} and is "
                        f"now {values.get(key)!r}; set it back or choose another --out"
                    )
                    raise CheckpointError(msg)
        for key, what in (("model", "the model"), ("data_sha256", "the text")):
            if state.get(key) != now[key]:
                msg = f"{path}: of another run: {what} has changed; choose another --out"
                raise CheckpointError(msg)

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "model": _as_json(self._model_config.to_dict()),
            "data_sha256": self._data_sha256,
            "loss_scaling": {"skipped": self._skipped, **self._share.loss_scaling()},
            "versions": {name: _version(name) for name in ("tensorflow", "keras", "ds-train")},
        }


class _WholeShare:
    """What one process trains: everything. `RankShare` is its form on many ranks."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig, optimizer: AdamW) -> None:
        self.everyone = Alone()
        self.model = CausalLM(model_config, dtype=config.policy())
        self._optimizer = optimizer
        self._step = TrainStep(self.model, optimizer, config)

    def run(self, batch: np.ndarray, accumulation: int) -> StepOutput:
        return self._step.compiled(tf.constant(batch.reshape(accumulation, -1, batch.shape[-1])))

    def contents(
        self,
        to_save: bool,  # noqa: ARG002 - all is read, all is written
        average: Sequence[keras.Variable] = (),
    ) -> Contents:
        return whole_contents(self.model, self._optimizer, average)

    def loss_scaling(self) -> dict[str, float]:
        return self._step.scaling.state()

    def loaded(self, loss_scaling: dict[str, float]) -> None:
        self._step.scaling.restore(loss_scaling)

    def check_same(self, config: TrainConfig, data_sha256: str) -> None:
        """See that all ranks mean the same run: there is one."""

    def hears_of_stops(self) -> AbstractContextManager[None]:
        return nullcontext()  # a signal ends the process as it always does

    def asked_to_stop(self) -> bool:
        return False

    def describe(self) -> str:
        return f"one process, {self.model.count_params():,} parameters"


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What a run was begun with: a key that did not exist then had what is its default now."""
    defaults = TrainConfig().model_dump(mode="json")
    return {table: values | config.get(table, {}) for table, values in defaults.items()}


def _decisive(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        table: {k: v for k, v in values.items() if k not in _FREE_KEYS.get(table, ())}
        for table, values in config.items()
        if table not in _FREE_TABLES
    }


def _digest(ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """As it reads back from JSON: tuples become lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return "source"
