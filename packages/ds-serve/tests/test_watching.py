"""What is noted of each answer: figures, log lines, traces."""

import json
import logging
import logging.config

import pytest
from fastapi.testclient import TestClient

from conftest import PROMPT, SMALL
from ds_serve import EngineOptions, create_app
from ds_serve.api.tracing import OpenTelemetry
from ds_serve.logs import log_config

BODY = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 6}


def figures(client):
    found = {}
    for line in client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def test_figures_add_up(model, tokenizer):
    options = EngineOptions(4, 8, 16, 4, draft=True)
    with TestClient(create_app(model, tokenizer, "tiny", options=options)) as client:
        texts = [PROMPT, "my fellow citizens of the union", PROMPT]
        used = [client.post("/v1/completions", json=BODY | {"prompt": t}).json() for t in texts]
        found = figures(client)
    usages = [answer["usage"] for answer in used]
    assert found["ds_serve_generated_tokens_total"] == 18
    assert found["ds_serve_prompt_tokens_total"] == sum(u["prompt_tokens"] for u in usages)
    cached = [u["prompt_tokens_details"]["cached_tokens"] for u in usages]
    assert found["ds_serve_prefix_cache_hit_tokens_total"] == sum(cached) > 0
    drafts = [u["completion_tokens_details"] for u in usages]
    right = sum(d["accepted_prediction_tokens"] for d in drafts)
    assert found["ds_serve_accepted_draft_tokens_total"] == right
    tried = right + sum(d["rejected_prediction_tokens"] for d in drafts)
    assert found["ds_serve_draft_tokens_total"] == tried > 0
    assert found['ds_serve_answers_total{finish_reason="length"}'] == 3
    assert found["ds_serve_time_to_first_token_seconds_count"] == 3
    assert found["ds_serve_request_seconds_count"] == 3
    assert found["ds_serve_requests_running"] == found["ds_serve_requests_waiting"] == 0
    # Each token that was read went to two of eight experts, in the one layer that has some.
    experts = [v for name, v in found.items() if name.startswith("ds_serve_expert_tokens_total")]
    assert len(experts) == 8
    assert sum(experts) == 2 * found["ds_serve_read_tokens_total"]
    busiest = found['ds_serve_expert_load_max_violation{layer="1"}']
    assert busiest == pytest.approx(max(experts) / (sum(experts) / 8) - 1)


def test_a_line_for_each_answer(client, caplog):
    with caplog.at_level(logging.INFO, logger="ds_serve.requests"):
        client.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"})
        client.post("/v1/completions", json=BODY | {"stream": True})
    whole, streamed = caplog.records
    assert (whole.request_id, whole.status, whole.finish_reason) == ("mine", 200, "length")
    assert (whole.completion_tokens, whole.key) == (6, "anyone")
    assert 0 < whole.first_token_seconds <= whole.seconds
    assert streamed.completion_tokens == 6


@pytest.mark.parametrize("kind", ["text", "json"])
def test_lines_are_for_people_or_for_a_collector(client, kind, capfd):
    config = log_config(kind)
    formatter = logging.config.BaseConfigurator(config)
    assert formatter.config["version"] == 1
    made = {}
    for name, form in config["formatters"].items():
        if "()" in form:
            from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415

            made[name] = JsonFormatter(form["fmt"], rename_fields=form["rename_fields"])
        else:
            made[name] = logging.Formatter(form["format"])
    handler = logging.StreamHandler()
    handler.setFormatter(made[config["handlers"]["answers"]["formatter"]])
    log = logging.getLogger("ds_serve.requests")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        client.post("/v1/completions", json=BODY, headers={"x-request-id": "abc"})
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    line = capfd.readouterr().err.strip().splitlines()[-1]
    if kind == "json":
        found = json.loads(line)
        assert (found["request_id"], found["completion_tokens"]) == ("abc", 6)
        assert {"time", "level", "logger"} <= set(found)
    else:
        assert " /v1/completions 200 abc key=anyone " in line
        assert "written=6" in line


def test_traces_of_a_request(model, tokenizer):
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="the extra otel is not installed")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: PLC0415
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: PLC0415
        InMemorySpanExporter,
    )

    provider, kept = sdk.TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracing = OpenTelemetry(provider, "tiny")
    app = create_app(model, tokenizer, "tiny", options=SMALL, tracing=tracing)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with TestClient(app) as client:
        client.post("/v1/completions", json=BODY, headers={"traceparent": parent})
        spans = {span.name: span for span in kept.get_finished_spans()}
    assert set(spans) == {"queue", "prefill", "decode", "/v1/completions"}
    whole = spans["/v1/completions"]
    assert format(whole.context.trace_id, "032x") == parent.split("-")[1]
    assert whole.attributes["gen_ai.usage.output_tokens"] == 6
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(part.parent.span_id == whole.context.span_id for part in parts)
    assert whole.start_time == parts[0].start_time
    assert parts[0].end_time <= parts[1].end_time <= parts[2].end_time <= whole.end_time
