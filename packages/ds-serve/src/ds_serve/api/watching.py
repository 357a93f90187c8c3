"""What is noted of each answer: metrics, a line in the log, a trace."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import Request

    from ds_serve.api.generation import Generation, Piece
    from ds_serve.api.keys import Keys
    from ds_serve.api.metrics import Metrics
    from ds_serve.api.tracing import Tracing

_log = logging.getLogger("ds_serve.requests")


@dataclass
class Watch:
    """Follows one request's answers.

    Attributes:
        request: of the client.
        metrics: of the server.
        keys: of the server.
        tracing: of the server.
        release: gives up the place that the request has among its key's.
    """

    request: Request
    metrics: Metrics
    keys: Keys
    tracing: Tracing
    release: Callable[[], None]
    _begun: float = field(default_factory=time.monotonic)
    _first: float | None = None
    _last: dict[int, float] = field(default_factory=dict)
    _reasons: list[str] = field(default_factory=list)

    async def pieces(self, generation: Generation) -> AsyncIterator[Piece]:
        """Yield a generation's pieces, and note when they come."""
        async for piece in generation:
            now = time.monotonic()
            if piece.tokens:
                if piece.index in self._last:
                    spent = (now - self._last[piece.index]) / len(piece.tokens)
                    for _ in piece.tokens:
                        self.metrics.between_tokens.observe(spent)
                else:
                    self.metrics.first_token.observe(now - self._begun)
                    self._first = self._first or now
                self._last[piece.index] = now
            if piece.finish_reason is not None:
                self._reasons.append(piece.finish_reason)
                self.metrics.finished.labels(piece.finish_reason).inc()
            yield piece

    def ended(self, generation: Generation, status: int) -> None:
        """Note the whole of it."""
        self.release()
        now, used = time.monotonic(), generation.usage
        route, key = self.request.url.path, self.request.state.key
        self.keys.spent(key, used.prompt + used.completion)
        self.metrics.whole.observe(now - self._begun)
        started = [text.started for text in generation.texts if text.started is not None]
        if started:
            self.metrics.queued.observe(max(0.0, min(started) - self._begun))
        first = None if self._first is None else round(self._first - self._begun, 6)
        facts = {
            "request_id": self.request.state.request_id,
            "route": route,
            "key": key,
            "status": status,
            "finish_reason": ",".join(self._reasons) or "none",
            "prompt_tokens": used.prompt,
            "cached_tokens": used.cached,
            "completion_tokens": used.completion,
            "drafted_tokens": used.drafted,
            "accepted_tokens": used.accepted,
            "first_token_seconds": first,
            "seconds": round(now - self._begun, 6),
        }
        _log.info("answered", extra=facts)
        self.tracing.answered(self.request.headers, facts, min(started, default=None))
