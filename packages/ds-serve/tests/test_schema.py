"""Requests made from the server's own OpenAPI description, right and wrong: never a 500."""

import json
import threading

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import PROMPT, SMALL, wait_for
from ds_serve import Engine, Limits, create_app
from ds_serve.api.fields import REFUSED
from ds_serve.api.requests import ChatRequest, CompletionRequest

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")


@pytest.fixture(scope="module")
def served(model, tokenizer):
    engine = Engine(model, SMALL)
    limits = Limits(max_new_tokens=8)
    app = create_app(model, tokenizer, "tiny", limits, engine=engine)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, engine
        wait_for(lambda: engine.texts == 0)
        assert engine.scheduler.pool.free == engine.scheduler.pool.blocks


@pytest.fixture(scope="module")
def api_schema(model, tokenizer, live):
    limits = Limits(max_new_tokens=8)
    server = live(create_app(model, tokenizer, "tiny", limits, SMALL))
    return schemathesis.openapi.from_url(server.url.replace("/v1", "/openapi.json"))


def test_the_description_holds(api_schema):
    for found in api_schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case):
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"
            response = case.call()
            assert response.status_code < 500, response.text
            if response.status_code >= 400 and case.path.startswith("/v1"):
                assert response.json()["error"]["message"]

        check()


REAL = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | REAL | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *REFUSED} - {"model"})
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(ROUTES), st.dictionaries(FIELDS, VALUES, max_size=4))
def test_odd_values_of_known_fields_are_answered_or_refused(served, route, fields):
    base = {
        "model": "tiny",
        "/v1/completions": {"prompt": PROMPT, "max_tokens": 2},
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 2,
        },
        "/v1/embeddings": {"input": PROMPT},
    }
    body = {"model": "tiny"} | base[route] | fields
    response = served[0].post(route, json=body)
    assert response.status_code in {200, 400}, response.text
    if response.status_code == 400:
        assert response.json()["error"]["message"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(ROUTES), st.binary(max_size=60), st.booleans())
def test_bodies_that_are_nothing_are_refused(served, route, noise, spliced):
    whole = json.dumps({"model": "tiny", "prompt": PROMPT, "input": "a", "messages": []}).encode()
    at = len(noise) % len(whole)
    content = whole[:at] + noise + whole[at:] if spliced else noise
    headers = {"content-type": "application/json"}
    response = served[0].post(route, content=content, headers=headers)
    assert response.status_code in {200, 400, 404}, response.text


def test_more_than_there_is_room_for_is_answered_or_refused(model, tokenizer):
    """Four times as many clients as places: each gets its answer, or 429 and when to come back."""
    engine = Engine(model, SMALL)
    app = create_app(model, tokenizer, "tiny", engine=engine)
    statuses, lock = [], threading.Lock()
    with TestClient(app) as client:

        def ask(number):
            body = {"model": "tiny", "prompt": f"{number} {PROMPT}", "max_tokens": 12}
            response = client.post("/v1/completions", json=body | {"stream": number % 2 == 0})
            with lock:
                statuses.append(response.status_code)
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
            elif number % 2 == 0:
                assert response.text.endswith("data: [DONE]\n\n")
            else:
                assert response.json()["usage"]["completion_tokens"] <= 12

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(48)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(statuses) == 48
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= SMALL.max_running + SMALL.max_waiting
        wait_for(lambda: engine.texts == 0)
        assert engine.scheduler.pool.free == engine.scheduler.pool.blocks
