"""`ds-train`: pre-training from the command line.

Exit code 0 on success, 2 on bad input or a full disk, with one line on stderr that says what
to do; 130 when interrupted.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from subprocess import CalledProcessError
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ds_model import CheckpointError as ModelCheckpointError
from ds_model import ConfigError, ModelConfig
from ds_train.config import TrainConfig
from ds_train.data import read_files
from ds_train.errors import TrainConfigError, TrainError
from ds_train.memory_text import show_memory, show_ranks
from ds_train.new_notebook import new_notebook
from ds_train.parallel import Costs, Timetable, make_schedule, published_bubble
from ds_train.parallel.memory import memory_of_ranks
from ds_train.parallel.on_ray import train_on_ray
from ds_train.parallel.text import timetable_text
from ds_train.parallel.worker import leave
from ds_train.peak import measure_step
from ds_train.plan import Recipe, compare, make_plan, measure_cluster, read_cluster, search
from ds_train.plan.cluster import as_toml
from ds_train.plan.text import (
    error_line,
    plan_as_json,
    show_candidates,
    show_comparisons,
    show_plan,
)
from ds_train.pretrain import RunResult, pretrain, run_here
from ds_train.quickstart import STEPS, quickstart

app = typer.Typer(
    name="ds-train",
    help="Train a DeepSeek-V3 on text.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
Out = Annotated[
    Path, typer.Option(help="Folder of the run; the same folder again goes on where it stopped.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result for programs.")]


@app.command("quickstart")
def quickstart_command(
    out: Out = Path("quickstart"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of 1,024 tokens.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a small DeepSeek-V3 on the State of the Union addresses, measure it, let it write."""
    with _one_line_errors():
        result = quickstart(out, steps, seed, Console(stderr=True))
        _show(result, as_json)


@app.command("pretrain")
def pretrain_command(
    config: Annotated[Path, typer.Option(help="A TOML file; `init-config` prints one.")],
    data: Annotated[
        list[Path], typer.Option(help="Files or folders of text or code; may be given again.")
    ],
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="[PATH]...", help="More of them.")
    ] = None,
    out: Out = Path("run"),
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoint, or refuse if there is one.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Train on your own text or code: one file is one document, the last are held out."""
    console = Console(stderr=True)
    with _one_line_errors():
        settings = TrainConfig.from_file(config)
        found = read_files([*data, *(more or [])], settings.data.suffixes)
        console.print(
            f"{len(found.documents):,} documents; skipped {len(found.skipped)} binary or "
            f"non-UTF-8 and {len(found.empty)} empty files",
            highlight=False,
        )
        result = pretrain(settings, found.documents, out, resume, console=console)
        _show(result, as_json)


@app.command("launch")
def launch_command(
    config: Annotated[Path, typer.Option(help="A TOML file; `init-config` prints one.")],
    data: Annotated[
        list[Path], typer.Option(help="Files or folders of text or code; may be given again.")
    ],
    out: Out = Path("run"),
    nproc: Annotated[
        int | None,
        typer.Option(
            help="Processes to start here: pp x ep x dp. Left out where a scheduler does."
        ),
    ] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline ranks.")] = None,
    ep: Annotated[int | None, typer.Option(help="Ranks that share each layer's experts.")] = None,
    dp: Annotated[int | None, typer.Option(help="Replicas of all that.")] = None,
    zero: Annotated[int | None, typer.Option(help="1 deals AdamW's moments out.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="1f1b, zb1p, dualpipe or dualpipev; see `schedule`.")
    ] = None,
    ray: Annotated[
        int | None,
        typer.Option(
            metavar="RESTARTS",
            help="Let Ray start the ranks, and all anew up to so many times when one is lost.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoint, or refuse if there is one.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Train on many ranks; options win over the file's table [parallel].

    On one machine, with --nproc, the ranks are processes of it. On many, a scheduler starts this
    command once a rank, without --nproc, and says in TF_CONFIG, or in Slurm's variables, which
    rank it is; all need one file system.
    """
    console = Console(stderr=True)
    given = {"pp": pp, "ep": ep, "dp": dp, "zero": zero, "schedule": schedule}
    with _one_line_errors():
        settings = TrainConfig.from_file(config)
        values = settings.model_dump()
        values["parallel"] |= {key: value for key, value in given.items() if value is not None}
        settings = TrainConfig.from_dict(values, source=str(config))
        if ray is not None:
            train_on_ray(settings, data, out, resume, ray)
        found = read_files(data, settings.data.suffixes)
        if nproc is None and ray is None:
            leave(run_here(settings, found.documents, out, resume))
        if ray is None and nproc != settings.parallel.ranks:
            table = settings.parallel
            raise TrainConfigError(
                f"--nproc is {nproc}; pp x ep x dp is {table.pp} x {table.ep} x {table.dp} = "
                f"{table.ranks}"
            )
        if ray is not None:  # what is left is done here, in one process
            settings, resume = settings.in_one_process(), True
        result = pretrain(settings, found.documents, out, resume, console=console)
        _show(result, as_json)


@app.command("schedule")
def schedule_command(
    pp: Annotated[int, typer.Option(help="Pipeline ranks.")] = 8,
    microbatches: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 20,
    name: Annotated[
        str, typer.Option("--schedule", help="1f1b, zb1p, dualpipe or dualpipev.")
    ] = "dualpipe",
    forward: Annotated[float, typer.Option(help="Time of F, in any unit.")] = 1.0,
    backward: Annotated[float, typer.Option(help="Time of B, the whole backward pass.")] = 2.0,
    weights: Annotated[float, typer.Option(help="Time of W, its weights' half.")] = 1.0,
    overlapped: Annotated[
        float | None, typer.Option(help="Time of F&B at once; F + B if left out.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file as well.")] = None,
) -> None:
    """Show who does what when in a pipeline, and how long ranks are idle; nothing is run.

    A column is a unit of time: a digit is a forward pass's micro-batch (its last digit), a letter
    a backward one's (a is 0), w its half for the weights, a dot idle. Overlapped pairs alternate.
    """
    with _one_line_errors():
        costs = Costs(
            forward, backward, weights, forward + backward if overlapped is None else overlapped
        )
        try:
            made = make_schedule(name, pp, microbatches)
        except ValueError as error:
            raise TrainConfigError(str(error)) from error
        timetable = Timetable.of(made, costs)
        typer.echo(timetable_text(made, timetable, costs))
        published = published_bubble(name, pp, costs)
        typer.echo(
            f"{timetable.length:g} in all, idle at most {timetable.bubble:g} "
            f"({timetable.bubble / timetable.length:.1%}); the paper's formula gives {published:g}"
        )
        if plot is not None:
            figure = _figures().plot_schedule(made, timetable)
            figure.savefig(plot, dpi=150)
            typer.echo(str(plot))


@app.command("plan")
def plan_command(
    model: Annotated[
        str, typer.Option(help="A preset (tiny, mini, bench, v2-lite, v3-671b) or a folder.")
    ] = "v3-671b",
    cluster: Annotated[
        str, typer.Option(help="h800, h100, or a TOML file such as --measure prints.")
    ] = "h800",
    devices: Annotated[int, typer.Option(help="How many: pp x ep x dp.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences of a step, over all devices.")] = 15360,
    sequence: Annotated[int, typer.Option(help="Tokens of one.")] = 4096,
    tokens: Annotated[float | None, typer.Option(help="Of the whole run, for its price.")] = None,
    pp: Annotated[
        int | None, typer.Option(help="Pipeline ranks; searched for if left out.")
    ] = None,
    ep: Annotated[
        int | None, typer.Option(help="Ranks that share a layer's experts; needs --pp.")
    ] = None,
    schedule: Annotated[str, typer.Option(help="With --pp: of the pipeline.")] = "dualpipe",
    micro_batch: Annotated[int, typer.Option(help="With --pp: sequences of a micro-batch.")] = 1,
    recompute: Annotated[str, typer.Option(help="With --pp: none, parts or block.")] = "parts",
    zero: Annotated[int, typer.Option(help="With --pp: 1 deals moments out.")] = 1,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or fp8.")] = "fp8",
    check: Annotated[
        bool, typer.Option("--check", help="Compare with published runs, and do nothing else.")
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Print this machine as a cluster, and do nothing else."),
    ] = False,
    memory: Annotated[float | None, typer.Option(help="With --measure: of a GPU, GiB.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what training on a cluster needs and takes; without --pp, which mesh does it best.

    Memory of a device, time of a step, price of a run, from what each part moves and computes. How
    far that is from published runs stands below it. Nothing is trained.
    """
    console = Console()
    with _one_line_errors():
        if measure:
            typer.echo(as_toml(measure_cluster(memory=memory)), nl=False)
            return
        compared = compare()
        if check:
            show_comparisons(console, compared)
            return
        config = _model(model)
        where = read_cluster(cluster)
        given: dict[str, Any] = {"devices": devices, "batch": batch, "sequence": sequence}
        given["precision"] = precision
        if pp is None:
            plans = search(config, where, **given)
        else:
            given |= {"pp": pp, "ep": ep or 1, "micro_batch": micro_batch, "zero": zero}
            given |= {"schedule": schedule, "recompute": recompute}
            plans = [make_plan(config, where, Recipe(**given))]
        best = plans[0]
        if as_json:
            typer.echo(json.dumps(plan_as_json(best, tokens), indent=2))
        else:
            if len(plans) > 1:
                show_candidates(console, plans)
            show_plan(console, best, tokens)
            console.print(error_line(compared), highlight=False, soft_wrap=True)
        if plot is not None:
            _figures().plot_plan(best).savefig(plot, dpi=150)
            typer.echo(str(plot), err=as_json)


@app.command("init-config")
def init_config_command() -> None:
    """Print a configuration file with every key and what it means."""
    text = resources.files("ds_train").joinpath("example.toml").read_text(encoding="utf-8")
    typer.echo(text, nl=False)


@app.command("memory")
def memory_command(
    config: Annotated[Path, typer.Option(help="A TOML file; `init-config` prints one.")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Do two steps on random tokens and compare (Linux).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a training step holds in memory, part by part; nothing is trained.

    Of a run on many ranks, what each pipeline rank holds.
    """
    with _one_line_errors():
        settings = TrainConfig.from_file(config)
        if measure and settings.parallel.ranks > 1:
            raise TrainConfigError(f"{config}: --measure is for one process; [parallel] has more")
        try:
            batch, found = memory_of_ranks(settings)
        except ValueError as error:
            raise TrainConfigError(f"{config}: no closed form for this: {error}") from error
        measured = measure_step(settings) if measure else None
    if as_json:
        values = [asdict(rank) | {"step": rank.step, "peak": rank.peak} for rank in found]
        only = values[0] | {"measured": measured}
        typer.echo(json.dumps(only if len(found) == 1 else {"ranks": values}, indent=2))
        return
    title = f"{batch} x {settings.data.sequence_length} tokens at a time"
    if len(found) == 1:
        show_memory(found[0], measured, title)
    else:
        show_ranks(found, title)


@app.command("new-notebook")
def new_notebook_command(
    kind: Annotated[
        str,
        typer.Argument(
            help="component: is it right, what does it cost. experiment: a hypothesis, and runs."
        ),
    ],
    name: Annotated[str, typer.Argument(help="As in mla-study; the file's name too.")],
    folder: Annotated[Path, typer.Option(help="Where it goes.")] = Path(),
) -> None:
    """Write a notebook that runs as it is, to change; open it in JupyterLab or VS Code."""
    with _one_line_errors():
        path = new_notebook(kind, name, folder)
    typer.echo(
        f"{path}\n"
        "  needs    pip install 'ds-train[notebook]'\n"
        f"  run      jupytext --to ipynb --execute {path}\n"
        f"  open     jupyter lab {path}   (right click, open with: Notebook)"
    )


@app.command("restore-environment")
def restore_environment_command(
    snapshot: Annotated[Path, typer.Argument(help="An experiment's environment.json.")],
    folder: Annotated[
        Path | None, typer.Option(help="Make a virtual environment there with the same packages.")
    ] = None,
) -> None:
    """Say how an experiment's environment differs from this one, or make it again."""
    with _one_line_errors():
        # psutil is of the extra `notebook`.
        try:
            from ds_train.notebook.environment import Environment  # noqa: PLC0415
        except ImportError as error:
            raise TrainError(f"{error}: pip install 'ds-train[notebook]'") from error
        try:
            found = Environment.read(snapshot)
            if folder is None:
                lines = found.differences(Environment.current())
                typer.echo("\n".join(lines) or "nothing differs")
                return
            typer.echo(str(found.restore(folder)))
        except (ValueError, CalledProcessError) as error:
            raise TrainError(str(error)) from error


def main() -> None:
    """Run the command line."""
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        said = "interrupted; the same command goes on from the last checkpoint"
        typer.echo(f"ds-train: {said}", err=True)
        raise typer.Exit(130) from None
    except (TrainError, ConfigError, ModelCheckpointError, OSError) as error:
        typer.echo(f"ds-train: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


def _model(name: str) -> ModelConfig:
    """Return a preset, or what a folder's config.json describes."""
    return ModelConfig.from_pretrained(name) if Path(name).exists() else ModelConfig.preset(name)


def _figures() -> Any:
    """Return the module that draws, if its extra is here."""
    try:
        from ds_train import figures  # noqa: PLC0415 - matplotlib is an extra
    except ImportError as error:
        raise TrainError(f"{error}: pip install 'ds-train[plot]'") from error
    return figures


def _show(result: RunResult, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2))
        return
    console = Console()
    if result.report is not None:
        report = result.report
        title = f"{report.documents} held-out documents, {report.bytes:,} bytes"
        table = Table("coder", "bits per byte (less is better)", title=title)
        for name, bits in report.rows():
            style = "bold" if name == "this model" else ""
            table.add_row(name, f"{bits:.3f}", style=style)
        console.print(table)
        if not report.beats_all:
            console.print("The model does not beat every yardstick yet: train longer.")
    for sample in result.samples:
        same = "the same text" if sample.identical else "NOT the same text"
        drafting = (
            f"  With MTP drafting: {same}, {sample.tokens} tokens in {sample.passes} passes, "
            f"{sample.accepted} of {sample.drafted} drafts accepted"
        )
        for way, added in (("greedy", sample.text), ("drawn", sample.drawn)):
            text = Text.assemble((sample.prompt, "bold"), added)
            console.print(Panel(text, title=way, title_align="left"))
        console.print(drafting, highlight=False, soft_wrap=True)
    console.print(_next_steps(result), markup=False, highlight=False)


def _next_steps(result: RunResult) -> str:
    pictures = f"look at      {result.out / 'plots'}\n" if result.plots else ""
    return (
        "\nWhat to try next\n"
        f"{pictures}"
        f"let it write ds-serve chat --raw {result.model}\n"
        f"serve it     ds-serve serve {result.model}\n"
        f"inspect it   ds-model inspect {result.model}\n"
        "your text    ds-train init-config > train.toml\n"
        "             ds-train pretrain --config train.toml --data YOUR_FOLDER"
    )
