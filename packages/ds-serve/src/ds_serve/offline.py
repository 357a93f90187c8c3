"""The commands that start no server: `ds-serve export` and `ds-serve capacity`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ds_serve.capacity import DEVICES, Demand, Published, Unit, deploy, published

BAD_INPUT = 2


def export(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Hugging Face directory of the model.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Write DIR as a SavedModel that runs where TensorFlow alone is.

    It has two signatures, prefill and decode; see the docs for how they are called.
    """
    if dtype not in {"float32", "bfloat16"}:
        fail(f"--dtype is {dtype}; it must be float32 or bfloat16")
    if not directory.is_dir():
        fail(f"{directory} is not a directory; give one with config.json and safetensors")
    from ds_model import CausalLM  # noqa: PLC0415 - brings TensorFlow
    from ds_serve.export import export_saved_model  # noqa: PLC0415 - the same

    with Console(stderr=True).status(f"Writing {out} ..."):
        try:
            export_saved_model(CausalLM.from_pretrained(directory, dtype=dtype), out)
        except ValueError as error:  # of which ds_model's errors are kinds
            fail(str(error))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    typer.echo(f"{out}: signatures prefill and decode, {size / 2**20:.0f} MiB")


def capacity(
    tokens_in: Annotated[float, typer.Option(min=0, help="Of prompts, a second.")] = 7e6,
    tokens_out: Annotated[float, typer.Option(min=0, help="Written, a second.")] = 1.9e6,
    hits: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of prompts' tokens in the cache.")
    ] = 0.5,
    context: Annotated[
        float, typer.Option(min=1, help="Tokens of a text while it is written, on average.")
    ] = 4000,
    speed: Annotated[
        float, typer.Option(min=0.1, help="Tokens a second that each text is to get.")
    ] = 20.0,
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "H800",
    prefill_nodes: Annotated[int, typer.Option(min=1, help="Of a prefill unit.")] = 4,
    decode_nodes: Annotated[int, typer.Option(min=1, help="Of a decode unit.")] = 18,
    model: Annotated[
        Path | None, typer.Option(help="config.json or its directory.", show_default="V3's")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Show published figures beside the plan, and no more.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For a program to read.")] = False,
) -> None:
    """Plan a service with prefill and decode on different machines, as the paper serves V3."""
    if device not in DEVICES:
        fail(f"--device is {device}; known are {', '.join(DEVICES)}")
    if check:
        runs = list(published())
        typer.echo(json.dumps([_facts(run) for run in runs])) if as_json else _show(runs)
        return
    from ds_model import ModelConfig  # noqa: PLC0415 - brings TensorFlow

    try:
        if model is None:
            config = ModelConfig.preset("v3-671b")
        else:
            folder = model if model.is_dir() else model.parent
            config = ModelConfig.from_pretrained(folder)
        demand = Demand(tokens_in, tokens_out, hits, context, speed)
        units = Unit(prefill_nodes), Unit(decode_nodes)
        found = deploy(config, DEVICES[device], demand, *units)
    except ValueError as error:  # of which ds_model's errors are kinds
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
        return
    table = Table(title=f"{tokens_in:,.0f} tokens/s in, {tokens_out:,.0f} out, on {device}")
    for title in ("", "prefill", "decode"):
        table.add_column(title, justify="left" if not title else "right")
    table.add_row("nodes of 8", str(found.prefill_nodes), str(found.decode_nodes))
    table.add_row("tokens/s a node", f"{found.prefill_speed:,.0f}", f"{found.decode_speed:,.0f}")
    table.add_row("texts a GPU", "", str(found.batch))
    table.add_row("tokens/s a text", "", f"{found.speed:.1f}")
    Console().print(table)
    million = f"${found.dollars_a_million:.2f} a million tokens written"
    typer.echo(f"${found.dollars_a_day:,.0f} a day, {million}")


def _facts(run: Published) -> dict[str, object]:
    return dataclasses.asdict(run) | {"error": run.error}


def _show(runs: list[Published]) -> None:
    table = Table(title="tokens a second and node")
    for title in ("run", "published", "planned", "error", "source"):
        table.add_column(title)
    for run in runs:
        error = f"{100 * run.error:+.0f}%" + (", fitted" if run.fitted else "")
        table.add_row(run.what, f"{run.value:,.0f}", f"{run.planned:,.0f}", error, run.source)
    Console().print(table)


def fail(message: str) -> NoReturn:
    """End with one line on stderr."""
    typer.echo(f"ds-serve: {' '.join(message.split())}", err=True)
    raise typer.Exit(BAD_INPUT)
