"""How the driver and a worker talk: one line of JSON each way, over stdin and stdout.

A request is `{"call": name, "with": {...}}`; the answer `{"value": ...}` or `{"error": text}`.
A worker that waits for a line sleeps, so that those not being timed cost nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any

Handlers = Mapping[str, Callable[..., Any]]


def private_stdout() -> IO[str]:
    """Return the real stdout, and send to stderr whatever else the process prints."""
    kept = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return kept


def serve(handlers: Handlers, requests: IO[str], answers: IO[str]) -> None:
    """Answer each line until the input ends."""
    for line in requests:
        answers.write(json.dumps(answer(handlers, json.loads(line))) + "\n")
        answers.flush()


def answer(handlers: Handlers, request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request asks; an exception becomes one line of text."""
    try:
        return {"value": handlers[request["call"]](**request.get("with", {}))}
    except Exception as error:  # noqa: BLE001 - a peer may raise anything; the row then says so
        return {"error": one_line(error)}


def one_line(error: BaseException, most: int = 200) -> str:
    """Return an exception's kind and the start of its message, on one line."""
    words = " ".join(str(error).split())
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
