"""OpenTelemetry traces of requests; needs the extra `otel`.

A request is one span, child of the caller's where the header `traceparent` names one, with the
attributes that OpenTelemetry has for generative models; below it one span for the time in the
queue, one until the first token, one until the last.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


class Tracing:
    """Sends no traces: what a server without `--otlp` has."""

    def answered(
        self, headers: Mapping[str, str], facts: Mapping[str, Any], started: float | None
    ) -> None:
        """Tell of a request.

        Args:
            headers: of the request.
            facts: what the log says of it.
            started: when its first step began, by `time.monotonic`.
        """

    def close(self) -> None:
        """Send what is left."""


class OpenTelemetry(Tracing):
    """Sends traces.

    Args:
        provider: OpenTelemetry's `TracerProvider`.
        model: what clients call it.
    """

    def __init__(self, provider: Any, model: str) -> None:
        self._provider, self._model = provider, model
        self._tracer = provider.get_tracer("ds_serve")

    @classmethod
    def to(cls, endpoint: str, model: str) -> OpenTelemetry:
        """Send by OTLP over HTTP.

        Args:
            endpoint: such as `http://localhost:4318/v1/traces`.
            model: what clients call it.

        Raises:
            ValueError: the extra is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ImportError as error:
            raise ValueError(
                "traces need the extra `otel`: pip install 'ds-serve[otel]'"
            ) from error
        provider = TracerProvider(resource=Resource.create({"service.name": "ds-serve"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider, model)

    def answered(
        self, headers: Mapping[str, str], facts: Mapping[str, Any], started: float | None
    ) -> None:
        """Make the spans of a request that is done."""
        from opentelemetry import trace  # noqa: PLC0415 - of the extra
        from opentelemetry.propagate import extract  # noqa: PLC0415

        now, clock = time.time_ns(), time.monotonic()
        begun = now - int(facts["seconds"] * 1e9)
        attributes = {
            "gen_ai.system": "deepseek",
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": facts["prompt_tokens"],
            "gen_ai.usage.output_tokens": facts["completion_tokens"],
            "gen_ai.response.finish_reasons": facts["finish_reason"].split(","),
            "http.route": facts["route"],
            "http.response.status_code": facts["status"],
            "ds_serve.cached_tokens": facts["cached_tokens"],
            "ds_serve.request_id": facts["request_id"],
        }
        whole = self._tracer.start_span(
            facts["route"], extract(dict(headers)), start_time=begun, attributes=attributes
        )
        inside = trace.set_span_in_context(whole)
        marks = [begun]
        if started is not None:
            marks.append(now - int((clock - started) * 1e9))
        if facts["first_token_seconds"] is not None:
            marks.append(begun + int(facts["first_token_seconds"] * 1e9))
        marks.append(now)
        names = ("queue", "prefill", "decode")[: len(marks) - 1]
        for name, first, last in zip(names, marks, marks[1:], strict=False):
            span = self._tracer.start_span(name, inside, start_time=first)
            span.end(max(first, last))
        whole.end(now)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
