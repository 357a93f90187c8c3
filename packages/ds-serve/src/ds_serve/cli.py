"""The command `ds-serve`."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
import uvicorn
from rich.console import Console

from ds_serve.app import create_app
from ds_serve.chat import Chat, talk
from ds_serve.limits import Limits
from ds_serve.writing import Options, warm_up

if TYPE_CHECKING:
    from ds_model import CausalLM, Tokenizer

BAD_INPUT = 2
GRACE_SECONDS = 30  # what running answers get to end when the server is told to stop

app = typer.Typer(
    help="Serve a DeepSeek-V3 over HTTP, or chat with it here.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Hugging Face directory: config.json, safetensors, tokenizer.json."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON lines for a program to read.")]


@app.command()
def serve(
    directory: Directory,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="DIR's name")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; one more is answered 429.")
    ] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Serve DIR with OpenAI's API, one request at a time.

    Without a chat template in DIR (a base model) only /v1/completions answers.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        _fail(f"can't listen at {host} port {port}: {error.strerror or error}")
    with listener:
        tokenizer = _load_tokenizer(directory)
        model = _load_model(directory, tokenizer)
        limits = Limits(max_waiting=max_waiting, max_new_tokens=max_new_tokens)
        name = name or directory.resolve().name
        try:
            served = create_app(model, tokenizer, name, limits)
        except ValueError as error:
            _fail(f"{directory}: {error}")
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}/v1"
        chats = tokenizer.chat_template is not None
        if as_json:
            typer.echo(json.dumps({"url": url, "model": name, "chat": chats}))
        else:
            kind = "" if chats else " It has no chat template: use /v1/completions."
            typer.echo(f"Serving {name} at {url}, one request at a time.{kind} Ctrl-C stops.")
        config = uvicorn.Config(
            served, access_log=not as_json, timeout_graceful_shutdown=GRACE_SECONDS
        )
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            # uvicorn has shut down and passes Ctrl-C on.
            raise typer.Exit from None


@app.command()
def chat(
    directory: Directory,
    system: Annotated[
        str | None, typer.Option(help="Instruction that stands before the conversation.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue each line as it stands: for base models.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=2.0, help="0 takes the likeliest token.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens with this probability.")
    ] = 0.95,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="Same seed, same text.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Chat with DIR in the terminal; /reset starts anew, /exit ends.

    Reads lines from a pipe too: each line is a message.
    """
    if not 0 < top_p <= 1:
        _fail(f"--top-p is {top_p}; it must be above 0 and at most 1")
    if raw and system is not None:
        _fail("--system needs a conversation; leave out --raw")
    tokenizer = _load_tokenizer(directory)
    if tokenizer.chat_template is None and not raw:
        _fail(
            f"{directory} has no chat template: it is a base model, which continues text. Use "
            "--raw, or put a chat_template into its tokenizer_config.json"
        )
    model = _load_model(directory, tokenizer)
    options = Options(max_tokens, temperature, top_p, seed)
    ok = talk(Chat(model, tokenizer, options, system, raw=raw), as_json=as_json)
    raise typer.Exit(0 if ok else BAD_INPUT)


# TensorFlow takes seconds to import: `--help` and wrong options need not wait for it.


def _load_tokenizer(directory: Path) -> Tokenizer:
    if not directory.is_dir():
        _fail(f"{directory} is not a directory; give one with config.json and safetensors")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from ds_model import Tokenizer  # noqa: PLC0415 - see above

    try:
        return Tokenizer.from_pretrained(directory)
    except ValueError as error:  # of which ds_model's errors are kinds
        _fail(str(error))


def _load_model(directory: Path, tokenizer: Tokenizer) -> CausalLM:
    from ds_model import CausalLM  # noqa: PLC0415 - see above

    with Console(stderr=True).status(f"Loading {directory} and compiling ..."):
        try:
            model = CausalLM.from_pretrained(directory)
            warm_up(model, tokenizer)
        except ValueError as error:  # of which ds_model's errors are kinds
            _fail(str(error))
    return model


def _fail(message: str) -> NoReturn:
    typer.echo(f"ds-serve: {' '.join(message.split())}", err=True)
    raise typer.Exit(BAD_INPUT)


def main() -> None:
    """Run the command line."""
    app()
