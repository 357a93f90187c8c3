"""A bound on the size of request bodies, whatever their headers claim."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from ds_serve.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware that stops reading, and answers 413, when a body grows too large.

    Args:
        app: the application.
        max_bytes: size that a body may have.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                raise ApiError(
                    f"The body has more than {self._max_bytes} bytes; send less.",
                    code="body_too_large",
                    status_code=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                )
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)
