"""One typed TOML file for a training run.

Defaults are DeepSeek-V3's (arXiv 2412.19437, section 4.2) where a run of any size can use
them; phases are fractions of the run, as 14.8T tokens would not fit. `ds-train init-config`
prints a file with every key.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from keras.dtype_policies import DTypePolicy
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ds_model import ConfigError, ModelConfig, Recompute
from ds_precision import Fp8Policy, Fp8Recipe
from ds_train.errors import TrainConfigError
from ds_train.schedule import WarmupConstantCosine

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ModelTable(_Table):
    """`[model]`: a preset, and any field of `config.json` to set otherwise."""

    model_config = ConfigDict(frozen=True, extra="allow")

    preset: str = "mini"

    def build(self) -> ModelConfig:
        """Returns the model's configuration.

        Raises:
            ds_model.ConfigError: If the preset or a field is unknown, or a value is bad.
        """
        return ModelConfig.preset(self.preset).replace(**(self.model_extra or {}))


class DataTable(_Table):
    """`[data]`: which files are documents, how they are packed, which are held out.

    `latest`: which part of the training text, at its end, is trained on; the tokenizer learns from
    all of it. Below 1 where documents stand in order of time and the newest matter most.
    """

    suffixes: tuple[str, ...] = ()
    sequence_length: Positive = 256
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    latest: Annotated[float, Field(gt=0, le=1)] = 1.0


class OptimizerTable(_Table):
    """`[optimizer]`: AdamW and gradient clipping.

    `moments`: what both moments are kept in; DeepSeek-V3 was trained with bfloat16.
    """

    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    moments: Literal["float32", "bfloat16"] = "float32"


class ScheduleTable(_Table):
    """`[schedule]`: warm-up, constant, cosine, two tails; ends as fractions of the run."""

    peak: Annotated[float, Field(gt=0)] = 2.2e-4
    floor: Annotated[float, Field(ge=0)] = 2.2e-5
    final: Annotated[float, Field(ge=0)] = 7.3e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    constant_until: Fraction = 0.676
    cosine_until: Fraction = 0.966
    tail_until: Fraction = 0.989

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.constant_until <= self.cosine_until <= self.tail_until:
            msg = "the phases must end in order: constant_until <= cosine_until <= tail_until"
            raise ValueError(msg)
        return self


class LossTable(_Table):
    """`[loss]`: multi-token prediction, and the two ways of balancing experts."""

    mtp_weight: Annotated[float, Field(ge=0)] = 0.3
    mtp_weight_late: Annotated[float, Field(ge=0)] = 0.1
    mtp_late_from: Fraction = 0.676
    balance_alpha: Annotated[float, Field(ge=0)] = 1e-4
    bias_update_speed: Annotated[float, Field(ge=0)] = 1e-3
    bias_update_until: Fraction = 0.966


class TrainTable(_Table):
    """`[train]`: how long, how much at a time, in what precision, what is held meanwhile.

    `nonfinite`: what a step does whose gradient is not finite: end the run, or change nothing and
    be counted. In float16, whose loss is scaled to find out how far it may be, such steps are
    always skipped. `watch_every`: steps between looks at what rounding does; 0 is never.
    `average_decay`: how much a step leaves of the weights' running average; 0 keeps none.
    """

    steps: Positive = 1000
    batch_size: Positive = 8
    accumulation: Positive = 1
    seed: Annotated[int, Field(ge=0)] = 0
    dtype_policy: Literal["float32", "mixed_bfloat16", "mixed_float16", "fp8"] = "float32"
    nonfinite: Literal["stop", "skip"] = "stop"
    watch_every: Annotated[int, Field(ge=0)] = 0
    recompute: Recompute = "none"
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    log_every: Positive = 10


class Fp8Table(_Table):
    """`[fp8]`: how `dtype_policy = "fp8"` rounds; see `ds_precision.Fp8Recipe`."""

    tile: int = 128
    scaling: str = "block"
    gradient_format: str = "E4M3"
    power_of_two: bool = False
    accumulator_bits: int = 0
    promote_every: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        Fp8Recipe(**self.model_dump())  # says what is wrong, and what would be right
        return self


class ParallelTable(_Table):
    """`[parallel]`: how many ranks share the work in which way; see `ds_train.parallel`.

    `pp`: pipeline ranks; `ep`: ranks that share a layer's experts; `dp`: replicas of that. `zero`:
    1 deals AdamW's moments out to who holds the same weights, 0 does not. `schedule`: in what order
    a pipeline rank does its work. `[train] accumulation` is the micro-batches of each pipeline.
    """

    pp: Positive = 1
    ep: Positive = 1
    dp: Positive = 1
    zero: Literal[0, 1] = 0
    schedule: Literal["1f1b", "zb1p", "dualpipe", "dualpipev"] = "1f1b"

    @property
    def ranks(self) -> int:
        """How many there are in all."""
        return self.pp * self.ep * self.dp


class CheckpointTable(_Table):
    """`[checkpoint]`: how often, and how many are kept."""

    every: Positive = 100
    keep: Positive = 2


class TrackTable(_Table):
    """`[track]`: who else hears of the run; see `open_tracker`."""

    tracker: Literal["auto", "none", "tensorboard", "mlflow", "wandb"] = "auto"


class TrainConfig(_Table):
    """Everything that decides a training run, beside its text.

    Attributes:
        model: Which model.
        data: Documents and packing.
        optimizer: AdamW and clipping.
        schedule: Learning rate.
        loss: Weights of the losses, and the bias update.
        train: Steps, batch, seed, precision.
        fp8: Rounding, where the precision is FP8.
        parallel: Ranks, and how they share the work.
        checkpoint: How often to save.
        track: Where metrics go besides `metrics.jsonl`.
    """

    model: ModelTable = ModelTable()
    data: DataTable = DataTable()
    optimizer: OptimizerTable = OptimizerTable()
    schedule: ScheduleTable = ScheduleTable()
    loss: LossTable = LossTable()
    train: TrainTable = TrainTable()
    fp8: Fp8Table = Fp8Table()
    parallel: ParallelTable = ParallelTable()
    checkpoint: CheckpointTable = CheckpointTable()
    track: TrackTable = TrackTable()

    @model_validator(mode="after")
    def _deals_out(self) -> Self:
        table, train = self.parallel, self.train
        if table.ranks == 1 and train.batch_size % train.accumulation:
            msg = (
                f"[train] accumulation = {train.accumulation} must divide batch_size = "
                f"{train.batch_size} (sequences an optimizer step, over all micro-batches)"
            )
            raise ValueError(msg)
        if train.batch_size < train.accumulation * table.ep * table.dp:
            msg = (
                f"batch_size = {train.batch_size} of [train] must be at least accumulation x ep x "
                f"dp = {train.accumulation} x {table.ep} x {table.dp}: each micro-batch needs a "
                "sequence"
            )
            raise ValueError(msg)
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a TOML file.

        Raises:
            TrainConfigError: If the file is missing or not TOML, a key is unknown, or a value
                is bad; one line that says what would be right.
        """
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            msg = f"{path}: cannot be read ({error.strerror}); `ds-train init-config` prints one"
            raise TrainConfigError(msg) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            msg = f"{path}: not a TOML file: {error}"
            raise TrainConfigError(msg) from error
        return cls.from_dict(tables, source=str(path))

    @classmethod
    def from_dict(cls, tables: dict[str, Any], source: str = "config") -> Self:
        """Checks nested tables, the model's fields included; as `from_file` otherwise."""
        try:
            config = cls.model_validate(tables)
        except ValidationError as error:
            raise TrainConfigError(f"{source}: {_first_line(cls, error)}") from error
        known = [field.name for field in dataclasses.fields(ModelConfig)]
        for key in config.model.model_extra or {}:
            if key not in known:
                msg = (
                    f"{source}: [model] {key}: unknown key; known here: preset, {', '.join(known)}"
                )
                raise TrainConfigError(msg)
        try:
            config.model.build()
        except ConfigError as error:
            raise TrainConfigError(f"{source}: [model] {error}") from error
        return config

    def in_one_process(self) -> Self:
        """Return the same run on one rank, in micro-batches of the same size or a little less."""
        size, pieces = self.train.batch_size, self.train.accumulation * self.parallel.ep
        pieces *= self.parallel.dp
        pieces = next(n for n in range(pieces, size + 1) if size % n == 0)
        train = self.train.model_copy(update={"accumulation": pieces})
        return self.model_copy(update={"parallel": ParallelTable(), "train": train})

    def policy(self) -> DTypePolicy:
        """Returns what the model's layers compute in."""
        if self.train.dtype_policy == "fp8":
            return Fp8Policy("mixed_bfloat16", self.fp8.model_dump())
        return DTypePolicy(self.train.dtype_policy)

    def learning_rate(self) -> WarmupConstantCosine:
        """Returns the schedule in steps of this run; warm-up never passes its first phase."""
        table, steps = self.schedule, self.train.steps
        constant_until = max(round(table.constant_until * steps), min(table.warmup_steps, steps))
        cosine_until = max(round(table.cosine_until * steps), constant_until)
        return WarmupConstantCosine(
            peak=table.peak,
            floor=table.floor,
            final=table.final,
            warmup_steps=min(table.warmup_steps, constant_until),
            constant_until=constant_until,
            cosine_until=cosine_until,
            tail_until=max(round(table.tail_until * steps), cosine_until),
        )


def _first_line(cls: type[BaseModel], error: ValidationError) -> str:
    """Says the first thing that is wrong: table, key, value, what would be right."""
    first = error.errors()[0]
    if not first["loc"]:  # two tables do not fit each other
        return str(first["ctx"]["error"])
    *tables, key = [str(part) for part in first["loc"]]
    where = f"[{'.'.join(tables)}] {key}" if tables else f"[{key}]"
    if first["type"] == "extra_forbidden":
        known: dict[str, Any] = cls.model_fields
        for name in tables:
            known = known[name].annotation.model_fields
        return f"{where}: unknown key; known here: {', '.join(known)}"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    said = first["msg"].replace("Input should", "should")
    return f"{where} = {first['input']!r}: {said}"
