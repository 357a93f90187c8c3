"""`ds-model`: look at checkpoints and convert them.

Exit code 0 on success, 2 on bad input with one line on stderr.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ds_model.checkpoint.convert import ExpertSlice, to_hf, to_keras
from ds_model.checkpoint.journal import verify
from ds_model.checkpoint.saving import DTypeName
from ds_model.errors import CheckpointError, ConfigError, TokenizerError
from ds_model.inspection import Inspection, inspect

GB = 10**9
app = typer.Typer(
    name="ds-model",
    help="Look at DeepSeek checkpoints, convert and quantize them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)


Experts = Annotated[
    str | None,
    typer.Option(metavar="RANK/OF", help="Only one rank's routed experts, and all else."),
]
Check = Annotated[bool, typer.Option(help="Hold SRC to its SHA256SUMS first, if it has any.")]


class Form(StrEnum):
    """What `convert` writes."""

    HF = "hf"
    KERAS = "keras"


class StoredDType(StrEnum):
    """Dtypes that `convert` writes."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    FP8 = "fp8"


@app.command("inspect")
def inspect_command(
    target: Annotated[str, typer.Argument(metavar="DIR|PRESET", help="Checkpoint or preset.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what a checkpoint is: family, parameters, dtypes, bytes. Reads no weights."""
    with _one_line_errors():
        found = inspect(target)
    if as_json:
        parameters = found.parameters._asdict()
        values = asdict(found) | {"parameters": parameters, "cache_saving": found.cache_saving}
        typer.echo(json.dumps(values, indent=2))
    else:
        Console().print(_table(found))


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory, or a .keras file.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New directory or .keras file.")],
    dtype: Annotated[
        StoredDType | None, typer.Option(help="Of the weights; as they are if not given.")
    ] = None,
    to: Annotated[
        Form, typer.Option(help="hf: released layout; keras: one .keras file.")
    ] = Form.HF,
    experts: Experts = None,
    check: Check = True,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Write a checkpoint in another dtype or form. DST appears only when it is whole.

    A conversion that was stopped goes on where it was when it is called again. DST gets a
    SHA256SUMS, which `sha256sum --check` reads.
    """
    with _one_line_errors():
        if check:
            _hold_to_checksums(source)
    with _one_line_errors(), _progress_bar(source.name) as progress:
        if to is Form.HF:
            wanted = cast("DTypeName | Literal['fp8'] | None", dtype and dtype.value)
            share = None if experts is None else ExpertSlice.parse(experts)
            to_hf(source, target, wanted, progress=progress, experts=share)
        elif experts is not None:
            raise CheckpointError("--experts is the released layout's: leave out --to keras")
        elif dtype is StoredDType.FP8:
            raise CheckpointError("--dtype fp8 is the released layout's: leave out --to keras")
        else:
            to_keras(source, target, cast("DTypeName | None", dtype and dtype.value))
    if as_json:
        typer.echo(json.dumps({"source": str(source), "target": str(target), "form": to.value}))
    else:
        following = f" Try: ds-model inspect {target}" if to is Form.HF else ""
        typer.echo(f"{target}: written.{following}")


class Mode(StrEnum):
    """What `quantize` writes."""

    INT4 = "int4"
    INT8 = "int8"
    INT8_CHANNEL = "int8_channel"
    FP8 = "fp8"


@app.command("quantize")
def quantize_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory, of any dtype.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New directory.")],
    mode: Annotated[
        Mode,
        typer.Option(
            help="int4, int8: 32 weights a scale; int8_channel: one scale an output; "
            "fp8: blocks of 128x128, the released form."
        ),
    ] = Mode.INT8,
    experts: Experts = None,
    check: Check = True,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: every matrix.")] = False,
) -> None:
    """Write a checkpoint with small weights, for serving, and say what rounding changed.

    Experts and projections become small; embedding, norms and routers are bfloat16. Whole numbers
    are stored as compressed-tensors does ("pack-quantized"). Stopped, it goes on when it is called
    again. Load DST with CausalLM.from_pretrained(DST, quantize="stored"), or without for floats.
    """
    errors: dict[str, float] = {}
    with _one_line_errors():
        if check:
            _hold_to_checksums(source)
        share = None if experts is None else ExpertSlice.parse(experts)
        with _progress_bar(source.name) as progress:
            to_hf(
                source,
                target,
                mode.value,
                progress=progress,
                experts=share,
                heard=errors.__setitem__,
            )
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    if as_json:
        said = {"source": str(source), "target": str(target), "mode": mode.value}
        typer.echo(json.dumps(said | {"bytes": size, "relative_errors": errors}))
        return
    if errors:
        Console().print(_error_table(errors, mode.value))
    typer.echo(f"{target}: written, {size:,} bytes. Try: ds-model inspect {target}")


def main() -> None:
    """Run the command line."""
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (CheckpointError, ConfigError, TokenizerError, OSError) as error:
        typer.echo(f"ds-model: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


def _hold_to_checksums(source: Path) -> None:
    with _progress_bar(f"{source.name}, checksums") as progress:
        verify(source, progress)


@contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None  # noqa: ARG005 - nobody watches
        return
    columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _error_table(errors: dict[str, float], mode: str) -> Table:
    """What rounding changed, by the kind of matrix."""
    kinds: dict[str, list[float]] = {}
    for name, error in errors.items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(error)
    table = Table(title=f"{mode}: norm of the change over the matrix's own")
    for title in ("matrices", "how many", "mean", "worst"):
        table.add_column(title, justify="left" if title == "matrices" else "right")
    for kind, found in kinds.items():
        mean = sum(found) / len(found)
        table.add_row(kind, f"{len(found):,}", f"{mean:.2%}", f"{max(found):.2%}")
    return table


def _table(found: Inspection) -> Table:
    counts, saving = found.parameters, f"{found.cache_saving:.1%} less"
    table = Table(title=found.name, show_header=False)
    table.add_row("family", f"{found.family}, {found.layers} layers, MTP depth {found.mtp_depth}")
    table.add_row("parameters", f"{counts.main:,}")
    table.add_row("router biases", f"{counts.router_bias:,}")
    table.add_row("MTP parameters", f"{counts.mtp:,}")
    table.add_row("active", f"{counts.active:,}\n[dim]{found.active_rule}[/dim]")
    stored = ", ".join(f"{dtype} {count:,}" for dtype, count in found.dtypes.items())
    table.add_row("stored", stored or "nothing: a preset")
    where = "on disk" if found.dtypes else "in BF16"
    table.add_row("weights", f"{found.weight_bytes:,} bytes {where}")
    cache = f"{found.cache_bytes_per_token:,} bytes a token in {found.cache_dtype}"
    table.add_row("cache", f"{cache}, MHA {found.mha_cache_bytes_per_token:,}: {saving}")
    held = (f"{size / GB:,.2f} GB in {way}" for way, size in found.serving.items())
    tokens = GB // found.cache_bytes_per_token
    table.add_row("serving", f"{', '.join(held)};\n{tokens:,.0f} tokens of cache a GB")
    table.add_row("loads", "-" if not found.dtypes else found.problem or "yes")
    return table
