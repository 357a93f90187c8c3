"""An id for each request, and a count of how requests end."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ds_serve.api.metrics import Metrics

_LONGEST = 128


class Naming:
    """ASGI middleware: takes the client's `X-Request-Id` or makes one, and sends it back.

    Args:
        app: the application.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        fine = 0 < len(given) <= _LONGEST and given.isascii() and given.isprintable()
        name = given if fine else uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = name

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = name
                route = getattr(scope.get("route"), "path", "other")
                key = state.get("key", "nobody")
                self._metrics.requests.labels(route, key, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, named)
