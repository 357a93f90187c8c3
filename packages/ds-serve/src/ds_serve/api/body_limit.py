"""Bounds on the size of request bodies, whatever their headers claim, and on the time they take."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from ds_serve.api.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware that stops reading when a body grows too large, or comes too slowly.

    Args:
        app: the application.
        max_bytes: size that a body may have.
        seconds: time until it must be whole.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read, whole = 0, False
        until = asyncio.get_running_loop().time() + self._seconds

        async def counted() -> Message:
            nonlocal read, whole
            if whole:
                return await receive()  # waits for the client to go away
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(
                    f"The body was not whole after {self._seconds:g} s.",
                    code="body_too_slow",
                    status_code=HTTPStatus.REQUEST_TIMEOUT,
                ) from error
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self._max_bytes:
                raise ApiError(
                    f"The body has more than {self._max_bytes} bytes; send less.",
                    code="body_too_large",
                    status_code=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                )
            return message

        await self._app(scope, counted, send)
