"""The HTTP interface over a tiny random model."""

import base64
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fastapi.testclient import TestClient

from conftest import PROMPT, SMALL, HeldSteps, as_document, wait_for
from ds_serve import Engine, Keys, Limits, create_app
from ds_serve.api.keys import Key

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
    used = answer["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"]) == (len(prompt), 20)
    assert used["total_tokens"] == len(prompt) + 20
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
        ({"suffix": "x"}, 400, "suffix", "unsupported_parameter", "not support suffix; leave"),
        ({"temperature": 9}, 400, "temperature", "invalid_value", "less than or equal to 2"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value", "greater than or equal to 1"),
        ({"stop": [1]}, 400, "stop.0", "invalid_value", "valid string"),
        ({"stream_options": {}}, 400, None, "invalid_value", "needs stream to be true"),
        ({"prompt": ["a", 1]}, 400, "prompt", "invalid_value", "a list of token ids, or a list"),
        ({"logit_bias": {"999": 1}}, 400, "logit_bias", "invalid_value", "token id 999; ids go"),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids", "invalid_value", "token id -1"),
        (
            {"structured_outputs": {"regex": "("}},
            400,
            "structured_outputs",
            "invalid_value",
            "structured_outputs can't be kept to",
        ),
        ({"prompt": ""}, 400, None, "invalid_value", "prompt is empty"),
        ({"prompt": []}, 400, "prompt", "invalid_value", "a list of token ids, or a list"),
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
    with TestClient(create_app(model, base_tokenizer, "tiny", options=SMALL)) as client:
        error = refusal(client.post("/v1/chat/completions", json=CHAT), 400)
        assert error["code"] == "no_chat_template"
        assert "Use /v1/completions, or put a chat_template into" in error["message"]
        assert client.post("/v1/completions", json=GREEDY).status_code == 200


def test_a_body_beyond_the_limit_is_refused_whatever_its_headers_say(model, tokenizer):
    limits = Limits(max_body_bytes=300)
    headers = {"content-type": "application/json"}
    long = json.dumps(GREEDY | {"prompt": "a" * 300}).encode()

    def in_pieces():
        yield long[:200]
        yield long[200:]

    with TestClient(create_app(model, tokenizer, "tiny", limits, SMALL)) as client:
        for content in (long, in_pieces()):
            response = client.post("/v1/completions", content=content, headers=headers)
            error = refusal(response, 413)
            assert (error["code"], "300 bytes" in error["message"]) == ("body_too_large", True)
        assert client.post("/v1/completions", json=GREEDY).status_code == 200


def test_answers_beyond_the_servers_bound_are_refused(model, tokenizer):
    with TestClient(
        create_app(model, tokenizer, "tiny", Limits(max_new_tokens=5), SMALL)
    ) as client:
        error = refusal(client.post("/v1/completions", json=GREEDY | {"max_tokens": 6}), 400)
        assert "max_tokens is 6; this server allows 5" in error["message"]
        answer = client.post("/v1/chat/completions", json=CHAT).json()
        assert answer["usage"]["completion_tokens"] == 5


def test_a_full_line_answers_429_and_when_to_come_back(held, model, tokenizer):
    engine, steps = held
    app = create_app(model, tokenizer, "tiny", engine=engine)
    with TestClient(app) as client, ThreadPoolExecutor() as threads:
        answers = [threads.submit(client.post, "/v1/completions", json=GREEDY) for _ in range(2)]
        wait_for(lambda: client.get("/ready").json()["requests"] == 2)
        response = client.post("/v1/completions", json=GREEDY | {"stream": True})
        assert refusal(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        steps.permits.release(1000)
        texts = {answer.result(30).json()["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1
        assert client.post("/v1/completions", json=GREEDY).status_code == 200


def test_a_failing_model_is_told_and_the_server_lives(model, tokenizer):
    engine = Engine(model, SMALL)
    app = create_app(model, tokenizer, "tiny", engine=engine)
    run, calls = engine.steps.run, []

    def fail_at_times(plan):
        calls.append(plan)
        if len(calls) % 2:
            return run(plan)
        raise ArithmeticError("secret detail")

    with TestClient(app, raise_server_exceptions=False) as client:
        engine.steps.run = fail_at_times
        error = refusal(client.post("/v1/completions", json=GREEDY), 500)
        assert error["type"] == "server_error"
        assert "ArithmeticError" in error["message"]
        assert "secret" not in error["message"]
        streamed = client.post("/v1/completions", json=GREEDY | {"stream": True}).text
        last = json.loads(streamed.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["type"] == "server_error"
        assert "[DONE]" not in streamed
        assert client.get("/health").json() == {"status": "ok"}
        engine.steps.run = run
        assert client.post("/v1/completions", json=GREEDY).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_not_ready_in_time_is_given_up(model, tokenizer, stream):
    engine = Engine(model, SMALL)
    steps = HeldSteps(engine)
    app = create_app(model, tokenizer, "tiny", engine=engine)
    with TestClient(app) as client, ThreadPoolExecutor() as threads:
        body = GREEDY | {"timeout": 0.05, "stream": stream}
        answer = threads.submit(client.post, "/v1/completions", json=body)
        wait_for(steps.begun.is_set)
        text = engine.scheduler.running[0]
        wait_for(lambda: time.monotonic() > text.deadline)
        steps.permits.release(1000)
        if stream:
            assert '"code": "timeout"' in answer.result(30).text
            assert "[DONE]" not in answer.result().text
        else:
            assert refusal(answer.result(30), 504)["code"] == "timeout"
        assert engine.scheduler.pool.free == engine.scheduler.pool.blocks


def test_prompts_come_several_at_a_time_each_with_several_answers(client, tokenizer, greedy):
    prompts = [PROMPT, as_document(tokenizer, "my fellow citizens")]
    body = GREEDY | {"max_tokens": 7, "n": 2}
    answers = [
        client.post("/v1/completions", json=body | {"prompt": both}).json()
        for both in (prompts[:1], [prompts[1]], ["a", "b", "c"])
    ]
    assert [len(answer["choices"]) for answer in answers] == [2, 2, 6]
    expected = [
        tokenizer.decode(greedy(ids, 7))
        for ids in (as_document(tokenizer, PROMPT), as_document(tokenizer, "my fellow citizens"))
    ]
    for answer, text in zip(answers, expected, strict=False):
        assert [choice["text"] for choice in answer["choices"]] == [text, text]
        assert answer["usage"]["completion_tokens"] == 14
    assert [choice["index"] for choice in answers[2]["choices"]] == list(range(6))
    chunks = events(client.post("/v1/completions", json=body | {"stream": True}))
    for index in range(2):
        joined = "".join(
            choice["text"] for c in chunks for choice in c["choices"] if choice["index"] == index
        )
        assert joined == expected[0]


def test_an_echo_comes_before_the_answer(client):
    body = GREEDY | {"echo": True, "max_tokens": 6}
    plain = client.post("/v1/completions", json=GREEDY | {"max_tokens": 6}).json()
    whole = client.post("/v1/completions", json=body).json()
    assert whole["choices"][0]["text"] == PROMPT + plain["choices"][0]["text"]
    chunks = events(client.post("/v1/completions", json=body | {"stream": True}))
    streamed = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert streamed == whole["choices"][0]["text"]


def test_usage_tells_what_was_cached(client):
    body = GREEDY | {"prompt": "citizens of the union, " * 4, "max_tokens": 2}
    first, second = (client.post("/v1/completions", json=body).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] < 4
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert 0 < second["prompt_tokens"] - cached <= 4


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(client, stream):
    body = GREEDY | {"max_tokens": 5, "logprobs": 3}
    if stream:
        parts = [
            c["choices"][0]
            for c in events(client.post("/v1/completions", json=body | {"stream": True}))
        ]
    else:
        parts = client.post("/v1/completions", json=body).json()["choices"]
    told = [part["logprobs"] for part in parts]
    tokens = [token for one in told for token in one["tokens"]]
    text = "".join(part["text"] for part in parts)
    assert "".join(tokens) == text
    offsets = [at for one in told for at in one["text_offset"]]
    assert offsets == [len("".join(tokens[:i])) for i in range(5)]
    for one in told:
        for token, logprob, top in zip(
            one["tokens"], one["token_logprobs"], one["top_logprobs"], strict=True
        ):
            assert logprob <= 0
            assert logprob == max(top.values())  # it was the likeliest
            assert token in top


def test_logprobs_of_chats(client):
    body = CHAT | {"max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
        assert len(entry["top_logprobs"]) == 2


def test_experts_are_told_to_who_asks(client, model):
    body = GREEDY | {"max_tokens": 3, "experts": True}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert len(choice["experts"]) == 3
    for token in choice["experts"]:
        assert len(token["chosen"]) == len(model.moe_layers) - 1  # not the MTP module's
        assert all(len(set(row)) == model.config.num_experts_per_tok for row in token["chosen"])
        assert token["drafted"] is False


def test_json_of_a_schema(client):
    schema = {
        "type": "object",
        "properties": {
            "ok": {"type": "boolean"},
            "n": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = CHAT | {"response_format": wanted, "max_tokens": 60, "temperature": 1}
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    found = json.loads(choice["message"]["content"])
    assert (set(found), choice["finish_reason"]) == ({"ok", "n"}, "stop")
    body["response_format"] = {"type": "json_object"}
    body |= {"max_tokens": 100, "seed": 1}
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["message"]["content"].startswith("{")


def test_embeddings_are_the_last_hidden_state(client, model, tokenizer):
    texts = [PROMPT, "my fellow citizens"]
    body = {"model": "tiny", "input": texts}
    answer = client.post("/v1/embeddings", json=body).json()
    for text, entry in zip(texts, answer["data"], strict=True):
        ids = np.array([as_document(tokenizer, text)])
        h, _ = model.run_blocks(model.embed_tokens(ids))
        expected = model.norm(h)[0, -1].numpy()
        expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(entry["embedding"], expected, atol=1e-5)
    packed = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    raw = base64.b64decode(packed["data"][1]["embedding"])
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), answer["data"][1]["embedding"], rtol=1e-6)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 4


def test_keys_are_asked_for_and_counted(model, tokenizer):
    keys = Keys({"ann": Key(key="ann-has-a-key", requests_per_minute=2)})
    with TestClient(create_app(model, tokenizer, "tiny", options=SMALL, keys=keys)) as client:
        response = client.post("/v1/completions", json=GREEDY)
        assert refusal(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
        client.headers["authorization"] = "Bearer ann-has-a-key"
        assert client.get("/v1/models").status_code == 200
        answers = [client.post("/v1/completions", json=GREEDY) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        figures = client.get("/metrics").text
        line = 'ds_serve_requests_total{key="ann",route="/v1/completions",status="200"} 2.0'
        assert line in figures


def test_requests_have_an_id(client):
    given = client.get("/health", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = {client.get("/health").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    odd = client.get("/health", headers={"x-request-id": "x" * 200})
    assert len(odd.headers["x-request-id"]) == 32


def test_the_page_and_its_files_stay_with_the_server(client):
    for path, kind in (("/", "text/html"), ("/app.js", "javascript"), ("/style.css", "text/css")):
        response = client.get(path)
        assert response.status_code == 200
        assert kind in response.headers["content-type"]
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert "https://" not in response.text


def test_what_is_inside_is_told(client, model):
    told = client.get("/v1/inside").json()
    c = model.config
    assert told["latent_bytes"] == c.attention.cache_width * c.num_hidden_layers * 4
    assert (told["experts"], told["experts_per_token"]) == (c.n_routed_experts, 2)
    assert told["chat"] is True


def test_models_and_unknown_routes(client, model):
    (entry,) = client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["max_model_len"]) == ("tiny", model.config.max_position_embeddings)
    assert client.get("/v1/models/tiny").json() == entry
    assert refusal(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    refusal(client.get("/v1/nothing"), 404)
    refusal(client.get("/v1/completions"), 405)


def test_an_engine_that_failed_is_no_healthy_server(model, tokenizer, monkeypatch):
    engine = Engine(model, SMALL)
    app = create_app(model, tokenizer, "tiny", engine=engine)
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/health").status_code == 200
        monkeypatch.setattr(engine.scheduler, "plan", lambda _: 1 / 0)
        refusal(client.post("/v1/completions", json=GREEDY), 500)
        assert client.get("/health").status_code == 503
        refusal(client.post("/v1/completions", json=GREEDY), 503)


def test_ready_until_the_server_closes(model, tokenizer):
    app = create_app(model, tokenizer, "tiny", options=SMALL)
    with TestClient(app) as client:
        assert client.get("/ready").json() == {"status": "ready", "requests": 0}
    assert TestClient(app).get("/ready").status_code == 503


def test_tokenizer_of_another_model_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "config", model.config.replace(vocab_size=64))
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens and the model 64"):
        create_app(model, tokenizer, "tiny", options=SMALL)


def test_limits_name_what_is_wrong():
    with pytest.raises(ValueError, match="max_new_tokens is 0; it must be 1 or more"):
        Limits(max_new_tokens=0)
