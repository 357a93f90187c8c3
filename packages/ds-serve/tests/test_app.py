"""The HTTP interface over a tiny random model."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from conftest import PROMPT, as_document, wait_for
from ds_serve import Limits, create_app

GREEDY = {"model": "tiny", "prompt": PROMPT, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}


def events(response):
    """The data of server-sent events; every event is one line."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def refusal(response, status):
    """The error object of an answer, whose shape is always OpenAI's."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_completion_is_what_generate_writes(client, tokenizer, greedy):
    prompt = as_document(tokenizer, PROMPT)
    answer = client.post("/v1/completions", json=GREEDY | {"max_tokens": 20}).json()
    (choice,) = answer["choices"]
    assert choice["text"] == tokenizer.decode(greedy(prompt, 20))
    assert choice["finish_reason"] == "length"
    used = {"prompt_tokens": len(prompt), "completion_tokens": 20}
    assert answer["usage"] == used | {"total_tokens": len(prompt) + 20}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")


def test_token_ids_are_a_prompt_too(client, tokenizer):
    as_ids = GREEDY | {"prompt": as_document(tokenizer, PROMPT)}
    first, second = (client.post("/v1/completions", json=body).json() for body in (GREEDY, as_ids))
    assert first["choices"] == second["choices"]


def test_chat_answers_what_follows_the_template(client, tokenizer, greedy):
    prompt = tokenizer.apply_chat_template(CHAT["messages"])
    answer = client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 12}).json()
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == tokenizer.decode(greedy(prompt, 12))
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_chat_without_a_bound_ends_with_the_context(client, model):
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    assert answer["usage"]["total_tokens"] == model.config.max_position_embeddings
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_stream_joins_to_the_whole_answer(client, path):
    body = (GREEDY if path == "/v1/completions" else CHAT) | {"max_tokens": 40}
    whole = client.post(path, json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(client.post(path, json=body | options))
    assert len(chunks) > 2
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    if path == "/v1/completions":
        text = "".join(choice["text"] for choice in choices)
        assert text == whole["choices"][0]["text"]
    else:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole["choices"][0]["message"]["content"]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "length"
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


def test_usage_comes_only_when_asked_for(client):
    chunks = events(client.post("/v1/completions", json=GREEDY | {"stream": True}))
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


def test_stop_strings_end_streamed_and_whole_answers(client, tokenizer, greedy):
    full = tokenizer.decode(greedy(as_document(tokenizer, PROMPT), 30))
    stop = full[9:14]
    body = GREEDY | {"max_tokens": 30, "stop": ["never said", stop]}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    chunks = events(client.post("/v1/completions", json=body | {"stream": True}))
    streamed = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert choice["text"] == streamed == full[: full.index(stop)]
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("seed", [5, -1, 2**63 - 1])
def test_same_seed_same_text(client, seed):
    body = GREEDY | {"temperature": 1.5, "top_p": 0.99, "seed": seed, "max_tokens": 20}
    texts = {client.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in "ab"}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("change", "status", "param", "code", "words"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found", "this server has 'tiny'"),
        ({"model": None}, 400, "model", "missing_required_parameter", "model is missing"),
        ({"n": 2}, 400, "n", "unsupported_parameter", "does not support n; leave it out"),
        ({"temperature": 9}, 400, "temperature", "invalid_value", "less than or equal to 2"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value", "greater than or equal to 1"),
        ({"stop": [1]}, 400, "stop.0", "invalid_value", "valid string"),
        ({"stream_options": {}}, 400, None, "invalid_value", "needs stream to be true"),
        ({"prompt": ["a", "b"]}, 400, "prompt", "invalid_value", "one prompt a request"),
        ({"prompt": ""}, 400, None, "invalid_value", "prompt is empty"),
        ({"prompt": []}, 400, None, "invalid_value", "prompt is empty"),
        ({"prompt": [99999]}, 400, "prompt", "invalid_value", "token id 99999; ids go from 0 to"),
        ({"prompt": [-1]}, 400, "prompt", "invalid_value", "token id -1"),
        ({"max_tokens": 125}, 400, None, "context_length_exceeded", "context of 128 tokens"),
        ({"prompt": "a b " * 99}, 400, None, "context_length_exceeded", "context of 128 tokens"),
    ],
    ids=str,
)
def test_bad_completions_are_refused_in_openais_shape(client, change, status, param, code, words):
    error = refusal(client.post("/v1/completions", json=GREEDY | change), status)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert words in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"[" * 100_000, b"\xff\xfe", b'{"model": NaN}'],
    ids=lambda body: repr(body[:9]),
)
def test_bodies_that_are_no_object_are_refused(client, body):
    headers = {"content-type": "application/json"}
    refusal(client.post("/v1/completions", content=body, headers=headers), 400)


@pytest.mark.parametrize("field", ["model", "prompt", "stop", "\ud800"], ids=ascii)
def test_lone_surrogates_are_refused_wherever_they_stand(client, field):
    """JSON can name half a character, which is no text."""
    headers = {"content-type": "application/json"}
    body = json.dumps(GREEDY | {field: "\ud800"})
    response = client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code in {400, 404}
    assert response.json()["error"]["message"]


def test_a_role_that_the_template_refuses_is_named(client):
    chat = CHAT | {"messages": [{"role": "wizard", "content": "x"}]}
    error = refusal(client.post("/v1/chat/completions", json=chat), 400)
    assert (error["param"], "unknown role wizard" in error["message"]) == ("messages", True)


def test_a_base_model_says_what_to_do_instead_of_chat(model, base_tokenizer):
    client = TestClient(create_app(model, base_tokenizer, "tiny"))
    error = refusal(client.post("/v1/chat/completions", json=CHAT), 400)
    assert error["code"] == "no_chat_template"
    assert "Use /v1/completions, or put a chat_template into" in error["message"]
    assert client.post("/v1/completions", json=GREEDY).status_code == 200


def test_a_body_beyond_the_limit_is_refused_whatever_its_headers_say(model, tokenizer):
    client = TestClient(create_app(model, tokenizer, "tiny", Limits(max_body_bytes=300)))
    headers = {"content-type": "application/json"}
    long = json.dumps(GREEDY | {"prompt": "a" * 300}).encode()

    def in_pieces():
        yield long[:200]
        yield long[200:]

    for content in (long, in_pieces()):
        response = client.post("/v1/completions", content=content, headers=headers)
        error = refusal(response, 413)
        assert (error["code"], "300 bytes" in error["message"]) == ("body_too_large", True)
    assert client.post("/v1/completions", json=GREEDY).status_code == 200


def test_answers_beyond_the_servers_bound_are_refused(model, tokenizer):
    client = TestClient(create_app(model, tokenizer, "tiny", Limits(max_new_tokens=5)))
    error = refusal(client.post("/v1/completions", json=GREEDY | {"max_tokens": 6}), 400)
    assert "max_tokens is 6; this server allows 5" in error["message"]
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    assert answer["usage"]["completion_tokens"] == 5


def test_a_full_line_answers_429_and_when_to_come_back(held, tokenizer):
    app = create_app(held, tokenizer, "tiny", Limits(max_waiting=1))
    with TestClient(app) as client, ThreadPoolExecutor() as threads:
        answers = [threads.submit(client.post, "/v1/completions", json=GREEDY) for _ in range(2)]
        wait_for(lambda: client.get("/ready").json()["requests"] == 2)
        response = client.post("/v1/completions", json=GREEDY | {"stream": True})
        assert refusal(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        held.permits.release(1000)
        texts = {answer.result(30).json()["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1
        assert client.post("/v1/completions", json=GREEDY).status_code == 200


class Failing:
    """A model that breaks after its first token."""

    def __init__(self, model):
        self.model = model
        self.config = model.config

    def stream(self, *args, **kwargs):
        yield next(self.model.stream(*args, **kwargs))
        raise ArithmeticError("secret detail")


def test_a_failing_model_is_told_and_the_server_lives(model, tokenizer):
    app = create_app(Failing(model), tokenizer, "tiny")
    client = TestClient(app, raise_server_exceptions=False)
    error = refusal(client.post("/v1/completions", json=GREEDY), 500)
    assert error["type"] == "server_error"
    assert "ArithmeticError" in error["message"]
    assert "secret" not in error["message"]
    streamed = client.post("/v1/completions", json=GREEDY | {"stream": True}).text
    last = json.loads(streamed.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    assert "[DONE]" not in streamed
    assert client.get("/health").json() == {"status": "ok"}


def test_models_and_unknown_routes(client, model):
    (entry,) = client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["max_model_len"]) == ("tiny", model.config.max_position_embeddings)
    assert client.get("/v1/models/tiny").json() == entry
    assert refusal(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    refusal(client.get("/v1/nothing"), 404)
    refusal(client.get("/v1/completions"), 405)


def test_ready_until_the_server_closes(model, tokenizer):
    app = create_app(model, tokenizer, "tiny")
    with TestClient(app) as client:
        assert client.get("/ready").json() == {"status": "ready", "requests": 0}
    assert TestClient(app).get("/ready").status_code == 503


def test_tokenizer_of_another_model_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "config", model.config.replace(vocab_size=64))
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens and the model 64"):
        create_app(model, tokenizer, "tiny")


def test_limits_name_what_is_wrong():
    with pytest.raises(ValueError, match="max_waiting is -1; it must be at least 0"):
        Limits(max_waiting=-1)
