"""From a running job to the bytes of an answer, and an end to jobs whose client has gone."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ds_serve.errors import error_body
from ds_serve.responses import Format, event, usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from ds_serve.line import Job
    from ds_serve.writing import Piece

_log = logging.getLogger(__name__)
_CLIENT_GONE = 499  # nginx' code for it; nobody reads the answer


async def whole_answer(
    request: Request, job: Job[Piece], form: Format, prompt_tokens: int
) -> Response:
    """Wait for all of the text; give up when the client goes away."""

    async def cancel_when_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watcher = asyncio.create_task(cancel_when_gone())
    try:
        pieces = [piece async for piece in job]
    finally:
        watcher.cancel()
        job.cancel()
    if not pieces or pieces[-1].finish_reason is None:
        return Response(status_code=_CLIENT_GONE)
    used = usage(prompt_tokens, pieces[-1].tokens)
    text = "".join(piece.text for piece in pieces)
    return JSONResponse(form.whole(text, pieces[-1].finish_reason, used))


class StreamedAnswer(StreamingResponse):
    """Server-sent events, one for each piece that has text, then `[DONE]`.

    Starlette cancels the stream when the client goes away; with it ends the job.

    Args:
        job: the work.
        form: how chunks look.
        prompt_tokens: for the usage.
        include_usage: whether the last chunk states the usage.
    """

    def __init__(
        self, job: Job[Piece], form: Format, prompt_tokens: int, *, include_usage: bool
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(job, form, prompt_tokens, include_usage=include_usage)
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; however that ends, so does the job."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _events(
    job: Job[Piece], form: Format, prompt_tokens: int, *, include_usage: bool
) -> AsyncIterator[str]:
    for body in form.opening():
        yield event(body)
    tokens = 0
    try:
        async for piece in job:
            tokens = piece.tokens
            if piece.text or piece.finish_reason:
                yield event(form.chunk(piece.text, piece.finish_reason))
    except Exception as error:  # noqa: BLE001 - status 200 is out: an event must tell any failure
        _log.exception("a streamed answer failed")
        message = f"The server failed with {type(error).__name__}; its log says more."
        yield event(error_body(message, HTTPStatus.INTERNAL_SERVER_ERROR, None, None))
        return
    if include_usage:
        yield event(form.closing(usage(prompt_tokens, tokens)))
    yield event("[DONE]")
