"""From a generation to the bytes of an answer, and an end to those whose client has gone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ds_serve.api.errors import ApiError, error_body
from ds_serve.api.generation import AnswerTimeoutError, Generation
from ds_serve.api.responses import Format, event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from ds_serve.api.generation import Piece
    from ds_serve.api.watching import Watch

_log = logging.getLogger(__name__)
CLIENT_GONE = 499  # nginx' code for it; nobody reads the answer


@contextlib.asynccontextmanager
async def cancelled_when_gone(request: Request, generation: Generation) -> AsyncIterator[None]:
    """End a generation when its client goes away, or its work is done."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except AnswerTimeoutError as error:
        raise _late() from error
    finally:
        watcher.cancel()
        generation.cancel()


async def whole_answer(
    request: Request, generation: Generation, form: Format, watch: Watch
) -> Response:
    """Wait for all of the text; give up when the client goes away."""
    pieces: list[list[Piece]] = [[] for _ in generation.texts]
    status = int(HTTPStatus.INTERNAL_SERVER_ERROR)
    try:
        async with cancelled_when_gone(request, generation):
            async for piece in watch.pieces(generation):
                pieces[piece.index].append(piece)
        done = all(parts and parts[-1].finish_reason for parts in pieces)
        status = int(HTTPStatus.OK) if done else CLIENT_GONE
    except ApiError as error:
        status = error.status_code
        raise
    finally:
        watch.ended(generation, status)
    if status == CLIENT_GONE:
        return Response(status_code=CLIENT_GONE)
    return JSONResponse(form.whole(pieces, generation.usage))


async def embeddings(
    request: Request, generation: Generation, model: str, encoding: str, watch: Watch
) -> Response:
    """Wait for the hidden states of all texts, and return them scaled to length 1."""
    found: dict[int, np.ndarray] = {}
    status = int(HTTPStatus.INTERNAL_SERVER_ERROR)
    try:
        async with cancelled_when_gone(request, generation):
            async for index, update in generation.updates():
                if update.hidden is not None:
                    found[index] = update.hidden
        status = int(HTTPStatus.OK) if len(found) == len(generation.texts) else CLIENT_GONE
    except ApiError as error:
        status = error.status_code
        raise
    finally:
        watch.ended(generation, status)
    if status == CLIENT_GONE:
        return Response(status_code=CLIENT_GONE)
    data = []
    for index in range(len(found)):
        vector = (found[index] / max(np.linalg.norm(found[index]), 1e-12)).astype("<f4")
        told = vector.tolist()
        if encoding == "base64":
            told = base64.b64encode(vector.tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": told})
    tokens = generation.usage.prompt
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": model, "usage": used})


class StreamedAnswer(StreamingResponse):
    """Server-sent events, one for each piece that has something to tell, then `[DONE]`.

    Starlette cancels the stream when the client goes away; with it ends the generation.

    Args:
        generation: the answers.
        form: how chunks look.
        watch: what notes their course.
        include_usage: whether the last chunk states the usage.
    """

    def __init__(
        self, generation: Generation, form: Format, watch: Watch, *, include_usage: bool
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = self._events(form, include_usage=include_usage)
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._generation, self._watch = generation, watch
        self._status = CLIENT_GONE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; however that ends, so does the generation."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()
            self._watch.ended(self._generation, self._status)

    async def _events(self, form: Format, *, include_usage: bool) -> AsyncIterator[str]:
        for body in form.opening(len(self._generation.texts)):
            yield event(body)
        try:
            async for piece in self._watch.pieces(self._generation):
                for body in form.chunk(piece):
                    yield event(body)
        except AnswerTimeoutError:
            self._status = int(HTTPStatus.GATEWAY_TIMEOUT)
            late = _late()
            yield event(error_body(late.detail, self._status, None, late.code))
            return
        except Exception as error:  # noqa: BLE001 - status 200 is out: an event must tell any failure
            _log.exception("a streamed answer failed")
            self._status = int(HTTPStatus.INTERNAL_SERVER_ERROR)
            message = f"The server failed with {type(error).__name__}; its log says more."
            yield event(error_body(message, self._status, None, None))
            return
        if include_usage:
            yield event(form.closing(self._generation.usage))
        self._status = int(HTTPStatus.OK)
        yield event("[DONE]")


def _late() -> ApiError:
    return ApiError(
        "The answer was not ready in its time; ask for fewer tokens, or try again later.",
        code="timeout",
        status_code=HTTPStatus.GATEWAY_TIMEOUT,
    )
