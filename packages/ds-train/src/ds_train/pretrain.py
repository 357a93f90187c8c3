"""A whole pre-training run: text in, a trained model with its figures out.

Stages: tokenizer, token file, training, evaluation, plots, text, Hugging Face directory. Each
leaves its files under one folder, and a run with the same folder takes up where it stopped.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ds_model import CausalLM, ModelConfig, Tokenizer
from ds_train.config import TrainConfig
from ds_train.data import Document, TokenFile, count_bytes, hold_out
from ds_train.errors import TrainConfigError
from ds_train.evaluation.report import Report, evaluate
from ds_train.metrics_log import read_metrics
from ds_train.parallel.launch import launch
from ds_train.parallel.mesh import Mesh
from ds_train.parallel.worker import Progress, RankRun, guarded, train_rank
from ds_train.parallel.world import World
from ds_train.prepare import pack, train_tokenizer
from ds_train.progress import Stages, TrainingProgress
from ds_train.tracking import Tracker, TrackerCallback, open_tracker
from ds_train.trainer import Trainer
from ds_train.writing import WritingSample, write

_PROMPT_CHARACTERS = 80
_NEW_TOKENS = 64


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        out: Its folder.
        model: The Hugging Face directory: weights, `config.json`, tokenizer.
        steps: Optimizer steps done, in this process and those before it.
        report: Bits per byte; None if nothing was held out.
        samples: Text of the trained model.
        plots: The pictures; none without matplotlib.
        seconds: Wall-clock time of each stage in this process.
    """

    out: Path
    model: Path
    steps: int
    report: Report | None
    samples: tuple[WritingSample, ...]
    plots: tuple[Path, ...]
    seconds: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain JSON types."""
        found = asdict(self)
        found["out"], found["model"] = str(self.out), str(self.model)
        found["plots"] = [str(path) for path in self.plots]
        return found


def pretrain(
    config: TrainConfig,
    documents: Sequence[Document],
    out: str | Path,
    resume: bool = True,
    prompts: Sequence[str] = (),
    console: Console | None = None,
) -> RunResult:
    """Train a model on documents and say how good it is.

    Where `[parallel]` describes several ranks, they are processes of this machine while training
    lasts.

    Args:
        config: Everything that decides the run.
        documents: In an order that means something: the last are held out.
        out: Folder of the run; the same folder again goes on from its last checkpoint.
        resume: False refuses a folder that has checkpoints.
        prompts: What the model continues at the end; held-out documents' first words if empty.
        console: Where progress is shown; nowhere if None.

    Raises:
        TrainError: A `DataError` (no text, other text than before, vocabulary too small), a
            `CheckpointError` (broken, of another run, disk full), a `TrainConfigError` (the tracker
            is not installed), or a loss that is not finite.
        ds_model.ConfigError: If the model's fields do not fit.
    """
    out = Path(out)
    try:
        tracker = open_tracker(config.track.tracker, out, out.resolve().name)
    except ValueError as error:
        raise TrainConfigError(f"[track] {error}") from error
    try:
        tracker.params(config.model_dump(mode="json"))
        stages = Stages(console or Console(quiet=True), 7)
        return _run(config, documents, out, resume, prompts, stages, tracker)
    finally:
        tracker.close()


def _run(
    config: TrainConfig,
    documents: Sequence[Document],
    out: Path,
    resume: bool,
    prompts: Sequence[str],
    stages: Stages,
    tracker: Tracker,
) -> RunResult:
    training, held_out = hold_out(documents, config.data.held_out)
    vocab_size = config.model.build().vocab_size
    with stages.stage("tokenizer") as stage:
        tokenizer = train_tokenizer(training, out, vocab_size)
        stage.summary = f"byte-level BPE of {tokenizer.vocab_size:,} tokens"
    with stages.stage("packing") as stage:
        tokens = pack(training, tokenizer, out, stage.report)
        stage.summary = (
            f"{len(training):,} documents, {count_bytes(training):,} bytes, "
            f"{tokens.tokens:,} tokens; {len(held_out)} documents held out"
        )
    with stages.stage("training") as stage:
        model_config = _model_config(config, tokenizer)
        if config.parallel.ranks > 1:
            run = RankRun(config, model_config, tokens.path, out, resume)
            launch(run, stage.report, stages.say)
            # What follows is done here, from the ranks' last checkpoint.
            config, resume = config.in_one_process(), True
        heard = [TrainingProgress(stage), TrackerCallback(tracker, config.train.log_every)]
        trainer = Trainer(config, tokens, out, model_config, heard)
        model = trainer.train(resume)
        stage.summary = _training_summary(config, model, tokens)
    context = config.data.sequence_length
    with stages.stage("evaluation") as stage:
        report = None
        if held_out:
            key = {"checkpoint": _checkpoint_key(trainer)}
            report = Report.read(out / "report.json", **key)
            if report is None:
                report = evaluate(model, tokenizer, training, held_out, context, stage.report)
                report.save(out / "report.json", **key)
            stage.summary = f"{report.model:.3f} bits per byte on {report.bytes:,} held-out bytes"
    probe = (held_out or training)[-1].text
    with stages.stage("plots") as stage:
        plots = _plots(model, tokenizer, out, probe, tracker)
        stage.summary = ", ".join(path.name for path in plots) or _NO_PLOTS
    with stages.stage("writing") as stage:
        chosen = prompts or _openings(held_out or training)
        samples = write(model, tokenizer, chosen, _NEW_TOKENS)
        accepted, drafted = sum(s.accepted for s in samples), sum(s.drafted for s in samples)
        stage.summary = f"{accepted} of {drafted} drafts accepted"
    with stages.stage("saving") as stage:
        folder = out / "model"
        _save(model, tokenizer, folder)
        stage.summary = str(folder)
        if trainer.average is not None:
            with trainer.average.in_place():
                _save(model, tokenizer, out / "model-average")
            stage.summary += f", {out / 'model-average'}"
    return RunResult(
        out, folder, config.train.steps, report, tuple(samples), tuple(plots), stages.seconds
    )


def run_here(
    config: TrainConfig, documents: Sequence[Document], out: str | Path, resume: bool = True
) -> int:
    """Train one rank, the one that a scheduler's environment says this process is.

    Rank 0 makes tokenizer and token file for all. What follows training is `pretrain`'s, with the
    same `out`, in one process.

    Args:
        config: everything that decides the run.
        documents: as for `pretrain`.
        out: folder of the run, on a file system that all ranks share.
        resume: as for `pretrain`.

    Returns:
        The process's exit code; see `ds_train.parallel.worker`.
    """
    out, name = Path(out), "rank ?"

    def work() -> None:
        nonlocal name
        table = config.parallel
        world = World.join(Mesh(table.pp, table.ep, table.dp))
        name = f"rank {world.rank}"
        training, _ = hold_out(documents, config.data.held_out)
        for turn in (True, False):  # rank 0 writes, then the others find what is there
            if turn == (world.rank == 0):
                tokenizer = train_tokenizer(training, out, config.model.build().vocab_size)
                tokens = pack(training, tokenizer, out, lambda *_: None)
            world.wait_for_all()
        run = RankRun(config, _model_config(config, tokenizer), tokens.path, out, resume)
        train_rank(run, world, tokens, [Progress()])
        world.leave_together()

    return guarded(lambda: name, work)


_NO_PLOTS = "left out: pip install 'ds-train[plot]'"


def _model_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configured model with the tokenizer's special ids."""
    found = config.model.build()
    length = max(found.max_position_embeddings, config.data.sequence_length)
    return found.replace(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=length,
    )


def _training_summary(config: TrainConfig, model: CausalLM, tokens: TokenFile) -> str:
    table = config.train
    seen = table.steps * table.batch_size * config.data.sequence_length
    part = f" over the latest {config.data.latest:.0%}" if config.data.latest < 1 else ""
    return (
        f"{model.count_params() / 1e6:.1f}M parameters, {table.steps:,} steps, {seen:,} tokens "
        f"({seen / (tokens.tokens * config.data.latest):.2f} passes{part})"
    )


def _save(model: CausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _checkpoint_key(trainer: Trainer) -> str:
    """What the figures belong to: the SHA-256 of the last checkpoint's manifest."""
    last = trainer.checkpoints.steps()[-1]
    raw = (trainer.checkpoints.path(last) / "manifest.json").read_bytes()
    return hashlib.sha256(raw).hexdigest()


def _plots(
    model: CausalLM, tokenizer: Tokenizer, out: Path, text: str, tracker: Tracker
) -> list[Path]:
    if find_spec("matplotlib") is None:
        return []
    # matplotlib is an extra: a run without it still trains.
    from ds_moe.figures import plot_expert_load, plot_routing  # noqa: PLC0415
    from ds_train import figures  # noqa: PLC0415

    rows = read_metrics(out / "metrics.jsonl")
    folder = out / "plots"
    folder.mkdir(exist_ok=True)
    drawn = {"loss.png": figures.plot_loss(rows)}
    if names := figures.expert_layer_names(model):
        loads, steps = [row["loads"] for row in rows], [row["step"] for row in rows]
        drawn["expert_load.png"] = plot_expert_load(loads, steps, names)
        ids = tokenizer.encode(text)[:40]
        routings = model.forward(np.asarray([ids], np.int32)).routings
        words = [tokenizer.decode([token]) for token in ids]
        drawn["routing.png"] = plot_routing(routings, words, names[: len(routings)])
    if len(looks := read_metrics(out / "stability.jsonl")) > 1:
        drawn["stability.png"] = figures.plot_stability(looks)
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=120)
        tracker.figure(name.removesuffix(".png"), figure, rows[-1]["step"])
    return [folder / name for name in drawn]


def _openings(documents: Sequence[Document]) -> list[str]:
    openings = []
    for document in documents[-2:]:
        start = document.text.lstrip()[:_PROMPT_CHARACTERS]
        openings.append(start.rsplit(" ", 1)[0] or start)
    return openings
