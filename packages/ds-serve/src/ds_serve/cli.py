"""The command `ds-serve`."""

from __future__ import annotations

import gc
import json
import math
import os
import socket
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import uvicorn
from rich.console import Console
from rich.progress import Progress

from ds_serve.chat import Chat, talk
from ds_serve.logs import log_config
from ds_serve.offline import BAD_INPUT, capacity, export, fail
from ds_serve.writing import Options

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from ds_model import CausalLM, Tokenizer
    from ds_serve.api.keys import Keys
    from ds_serve.engine import Engine

SIZES, LIMITS, OUTSIDE = "How much at once", "Who may ask for what", "To the outside"


class Precision(StrEnum):
    """What is computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LogKind(StrEnum):
    """How lines of the log look."""

    text = "text"
    json = "json"


app = typer.Typer(
    help="Serve a DeepSeek-V3 over HTTP, chat with it here, export it, plan a service.",
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
    dtype: Annotated[
        Precision, typer.Option(help="What is computed in; bfloat16 halves weights and cache.")
    ] = Precision.float32,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Keep weights small: int8, int8_channel, int4, fp8, or 'stored' for what DIR has.",
            show_default="no",
        ),
    ] = None,
    draft: Annotated[
        bool,
        typer.Option("--draft", help="Let the MTP module guess a token ahead; see the docs."),
    ] = False,
    max_running: Annotated[
        int, typer.Option(min=1, help="Answers that are written at once.", rich_help_panel=SIZES)
    ] = 32,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=0, help="Answers that may wait; one more is answered 429.", rich_help_panel=SIZES
        ),
    ] = 256,
    step_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Most tokens of a step: more reads prompts faster, fewer delays others less.",
            rich_help_panel=SIZES,
        ),
    ] = 512,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that the cache holds.",
            show_default="max-running contexts, or 1 GiB",
            rich_help_panel=SIZES,
        ),
    ] = None,
    block_size: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of a block, the unit that is shared.", rich_help_panel=SIZES
        ),
    ] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of one answer.", rich_help_panel=LIMITS)
    ] = 1024,
    request_seconds: Annotated[
        float,
        typer.Option(min=0.1, help="After that an answer is given up.", rich_help_panel=LIMITS),
    ] = 600.0,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of keys and their limits; without, everybody may ask.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that running answers get at SIGTERM.", rich_help_panel=LIMITS
        ),
    ] = 30.0,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate (PEM): serve HTTPS.", rich_help_panel=OUTSIDE)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Its private key (PEM).", rich_help_panel=OUTSIDE)
    ] = None,
    log: Annotated[
        LogKind, typer.Option(help="Lines for people, or JSON.", rich_help_panel=OUTSIDE)
    ] = LogKind.text,
    otlp: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send traces there, by OTLP over HTTP; needs the extra otel.",
            rich_help_panel=OUTSIDE,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve DIR to many clients at once, with OpenAI's API and a page at /.

    Without a chat template in DIR (a base model) only /v1/completions answers.
    """
    if (tls_cert is None) != (tls_key is None):
        fail("--tls-cert and --tls-key belong together; give both, or neither")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        fail(f"can't listen at {host} port {port}: {error.strerror or error}")
    with listener:
        try:
            keys = None if api_keys is None else _keys(api_keys)
            tokenizer = _load_tokenizer(directory)
            model = _load_model(directory, dtype.value, quantize)
            from ds_serve.api.app import create_app  # noqa: PLC0415 - see below
            from ds_serve.api.limits import Limits  # noqa: PLC0415
            from ds_serve.api.tracing import OpenTelemetry  # noqa: PLC0415
            from ds_serve.engine import Engine, EngineOptions  # noqa: PLC0415

            name = name or directory.resolve().name
            engine = Engine(
                model,
                EngineOptions(
                    max_running, max_waiting, step_tokens, block_size, cache_tokens, draft
                ),
            )
            limits = Limits(max_new_tokens=max_new_tokens, request_seconds=request_seconds)
            tracing = None if otlp is None else OpenTelemetry.to(otlp, name)
            served = create_app(
                model, tokenizer, name, limits, keys=keys, tracing=tracing, engine=engine
            )
        except ValueError as error:  # of which ds_model's errors are kinds
            fail(f"{directory}: {error}")
        _warm_up(engine)
        address = f"[{host}]" if ":" in host else host
        scheme = "http" if tls_cert is None else "https"
        url = f"{scheme}://{address}:{listener.getsockname()[1]}"
        chats = tokenizer.chat_template is not None
        if as_json:
            told = {"url": f"{url}/v1", "model": name, "chat": chats}
            typer.echo(json.dumps(told | {"cache_tokens": engine.cache_tokens}))
        else:
            kind = "" if chats else " It has no chat template: use /v1/completions."
            size = engine.steps.cache.nbytes / 2**20
            typer.echo(
                f"Serving {name} at {url} (page) and {url}/v1 (API). Up to {max_running} answers "
                f"at once; the cache holds {engine.cache_tokens} tokens, {size:.0f} MiB.{kind} "
                "Ctrl-C stops."
            )
        _run(served, listener, grace, log, tls_cert, tls_key, quiet=as_json)


def _run(
    served: FastAPI,
    listener: socket.socket,
    grace: float,
    log: LogKind,
    tls_cert: Path | None,
    tls_key: Path | None,
    *,
    quiet: bool,
) -> None:
    """Serve until a signal; running answers get their grace."""
    # The engine's thread must get the interpreter back at once when a step is done: by default
    # Python lets the other thread go on for 5 ms.
    sys.setswitchinterval(0.0005)
    config = uvicorn.Config(
        served,
        access_log=False,
        log_config=log_config(log.value, quiet=quiet),
        timeout_graceful_shutdown=math.ceil(grace),
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )
    server = uvicorn.Server(config)
    stop = server.handle_exit

    def refuse_and_stop(number: int, frame: FrameType | None) -> None:
        served.state.engine.refuse()  # new requests on open connections are told so
        stop(number, frame)

    server.handle_exit = refuse_and_stop
    try:
        server.run(sockets=[listener])
    except OSError as error:  # a certificate that can't be read
        fail(f"can't serve HTTPS with {tls_cert} and {tls_key}: {error.strerror or error}")
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
    dtype: Annotated[Precision, typer.Option(help="What is computed in.")] = Precision.float32,
    as_json: AsJson = False,
) -> None:
    """Chat with DIR in the terminal; /reset starts anew, /exit ends.

    Reads lines from a pipe too: each line is a message.
    """
    if not 0 < top_p <= 1:
        fail(f"--top-p is {top_p}; it must be above 0 and at most 1")
    if raw and system is not None:
        fail("--system needs a conversation; leave out --raw")
    tokenizer = _load_tokenizer(directory)
    if tokenizer.chat_template is None and not raw:
        fail(
            f"{directory} has no chat template: it is a base model, which continues text. Use "
            "--raw, or put a chat_template into its tokenizer_config.json"
        )
    model = _load_model(directory, dtype.value)
    options = Options(max_tokens, temperature, top_p, seed)
    ok = talk(Chat(model, tokenizer, options, system, raw=raw), as_json=as_json)
    raise typer.Exit(0 if ok else BAD_INPUT)


# TensorFlow takes seconds to import: `--help` and wrong options need not wait for it.


def _load_tokenizer(directory: Path) -> Tokenizer:
    if not directory.is_dir():
        fail(f"{directory} is not a directory; give one with config.json and safetensors")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from ds_model import Tokenizer  # noqa: PLC0415 - see above

    try:
        return Tokenizer.from_pretrained(directory)
    except ValueError as error:  # of which ds_model's errors are kinds
        fail(str(error))


def _load_model(directory: Path, dtype: str, quantize: str | None = None) -> CausalLM:
    from ds_model import CausalLM  # noqa: PLC0415 - see above

    policy = {"float32": "float32", "bfloat16": "bfloat16"}[dtype]
    with Console(stderr=True).status(f"Loading {directory} ..."):
        try:
            return CausalLM.from_pretrained(directory, quantize=quantize, dtype=policy)
        except ValueError as error:  # of which ds_model's errors are kinds
            fail(str(error))


def _warm_up(engine: Engine) -> None:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Warming up", total=1.0)
        for share in engine.warm_up():
            progress.update(task, completed=share)
    # What is there stays: else each collection of garbage walks through all of TensorFlow's graphs.
    gc.collect()
    gc.freeze()


def _keys(path: Path) -> Keys:
    from ds_serve.api.keys import Keys  # noqa: PLC0415 - see above

    try:
        return Keys.from_file(path)
    except ValueError as error:
        fail(str(error))


app.command()(export)
app.command()(capacity)


def main() -> None:
    """Run the command line."""
    app()
