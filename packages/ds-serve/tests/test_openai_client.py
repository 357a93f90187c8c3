"""The public client of OpenAI, and clients that go away, against a real server on a socket."""

import http.client
import json
from itertools import islice

import openai
import pytest

from conftest import PROMPT, as_document, wait_for
from ds_serve import create_app


@pytest.fixture(scope="module")
def server_url(model, tokenizer, live):
    return live(create_app(model, tokenizer, "tiny")).url


@pytest.fixture(scope="module")
def api(server_url):
    with openai.OpenAI(base_url=server_url, api_key="none", max_retries=0) as api:
        yield api


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]


def test_completions(api, tokenizer, greedy):
    expected = tokenizer.decode(greedy(as_document(tokenizer, PROMPT), 20))
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    whole = api.completions.create(**asked)
    assert (whole.choices[0].text, whole.usage.completion_tokens) == (expected, 20)
    chunks = list(api.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat(api, tokenizer, greedy):
    expected = tokenizer.decode(greedy(tokenizer.apply_chat_template(MESSAGES), 20))
    asked = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 20, "temperature": 0}
    whole = api.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected
    assert whole.usage.completion_tokens == 20
    asked |= {"stop": expected[10:14], "stream_options": {"include_usage": True}}
    with api.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == expected[: expected.index(expected[10:14])]
    assert final.choices[0].message.role == "assistant"
    assert final.usage.prompt_tokens == whole.usage.prompt_tokens
    assert final.usage.completion_tokens < 20


def test_an_answer_can_be_sent_back_as_history(api):
    first = api.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4)
    history = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "And?"}]
    second = api.chat.completions.create(model="tiny", messages=history, max_tokens=4)
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_models(api):
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").owned_by == "ds-serve"


def test_errors_arrive_as_the_clients_own(api):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        api.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="does not support logprobs") as error:
        api.completions.create(model="tiny", prompt=PROMPT, logprobs=2)
    assert (error.value.param, error.value.code) == ("logprobs", "unsupported_parameter")


def request(url, body):
    """Send a request on a connection of its own, and return the connection."""
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=30)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


LONG = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 100}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_goes_away_ends_its_generation(held, tokenizer, live, stream):
    server = live(create_app(held, tokenizer, "tiny"))
    connection = request(server.url, LONG | {"stream": stream})
    assert held.started.wait(30)
    held.permits.release(3)
    if stream:
        lines = islice(connection.getresponse(), 5)
        assert [line[:6] for line in lines] == [b"data: ", b"\n", b"data: ", b"\n", b"data: "]
    connection.close()
    held.release_until_ended()
    assert held.given < LONG["max_tokens"]


def test_a_waiting_client_that_goes_away_gives_up_its_place(held, tokenizer, live):
    server = live(create_app(held, tokenizer, "tiny"))
    first = request(server.url, LONG)
    assert held.started.wait(30)
    left = request(server.url, LONG | {"stream": True})
    wait_for(lambda: requests_at(server.url) == 2)
    left.close()
    wait_for(lambda: requests_at(server.url) == 1)
    held.permits.release(LONG["max_tokens"])
    assert json.loads(first.getresponse().read())["usage"]["completion_tokens"] == 100
    first.close()
    assert held.given == LONG["max_tokens"]


def requests_at(url):
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=30)
    connection.request("GET", "/ready")
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["requests"]
