"""The public client of OpenAI, and clients that go away, against a real server on a socket."""

import http.client
import json
from itertools import islice
from typing import Literal

import openai
import pydantic
import pytest

from conftest import PROMPT, SMALL, TEXTS, as_document, wait_for
from ds_model import Tokenizer
from ds_model.byte_level_bpe import SPECIAL_TOKENS
from ds_model.chat_template import DEEPSEEK_CHAT_TEMPLATE
from ds_serve import create_app
from ds_serve.api.parts import CALL, CALL_END, CALLS, CALLS_END, SEPARATOR

# A template with the parts of V3.1's that tools need.
TOOL_TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content }}"
    "{% else %}{{ '<｜' + m.role + '｜>' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name + call.function.arguments }}"
    "{% endfor %}{% endif %}{% endfor %}{{ '<｜Assistant｜>' }}"
)


@pytest.fixture(scope="module")
def server_url(model, tokenizer, live):
    return live(create_app(model, tokenizer, "tiny", options=SMALL)).url


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
    with pytest.raises(openai.BadRequestError, match="does not support suffix") as error:
        api.completions.create(model="tiny", prompt=PROMPT, suffix="x")
    assert (error.value.param, error.value.code) == ("suffix", "unsupported_parameter")


def request(url, body):
    """Send a request on a connection of its own, and return the connection."""
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=30)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


LONG = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 100}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_goes_away_frees_its_blocks(held, model, tokenizer, live, stream):
    engine, steps = held
    server = live(create_app(model, tokenizer, "tiny", engine=engine))
    connection = request(server.url, LONG | {"stream": stream})
    assert steps.begun.wait(30)
    steps.permits.release(3)
    if stream:
        lines = islice(connection.getresponse(), 5)
        assert [line[:6] for line in lines] == [b"data: ", b"\n", b"data: ", b"\n", b"data: "]
    connection.close()
    (text,) = engine.scheduler.running
    wait_for(lambda: text.cancelled)
    steps.permits.release(100_000)
    wait_for(lambda: engine.texts == 0)
    assert text.written < LONG["max_tokens"]
    assert engine.scheduler.pool.free == engine.scheduler.pool.blocks


def test_a_waiting_client_that_goes_away_gives_up_its_place(held, model, tokenizer, live):
    engine, steps = held
    server = live(create_app(model, tokenizer, "tiny", engine=engine))
    first = request(server.url, LONG)
    assert steps.begun.wait(30)
    left = request(server.url, LONG | {"stream": True})
    wait_for(lambda: requests_at(server.url) == 2)
    left.close()
    wait_for(lambda: any(text.cancelled for text in engine._arrived + engine.scheduler.waiting))
    steps.permits.release(100_000)
    assert json.loads(first.getresponse().read())["usage"]["completion_tokens"] == 100
    first.close()
    wait_for(lambda: requests_at(server.url) == 0)
    assert steps.done == 100


def requests_at(url):
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=30)
    connection.request("GET", "/ready")
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["requests"]


def test_several_answers_log_probabilities_and_embeddings(api):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3}
    several = api.completions.create(**asked, n=3, logprobs=2, extra_body={"min_p": 0.1})
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert all(len(choice.logprobs.tokens) == 3 for choice in several.choices)
    chat = api.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert len(chat.choices[0].logprobs.content) == 3
    embedded = api.embeddings.create(model="tiny", input=["a", "b"])  # in base64, as it asks
    assert abs(sum(x * x for x in embedded.data[1].embedding) - 1) < 1e-5


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    degrees: int = pydantic.Field(ge=0, le=40)


def test_answers_are_parsed_into_the_clients_own_types(api):
    chat = api.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Weather, max_tokens=60
    )
    assert chat.choices[0].message.parsed.city in {"Paris", "Rome"}


def test_tools_are_called(model, live):
    marks = (*SPECIAL_TOKENS, CALLS, CALLS_END, CALL, CALL_END, SEPARATOR)
    templated = Tokenizer.train(TEXTS, 320, marks, chat_template=TOOL_TEMPLATE)
    url = live(create_app(model, templated, "tiny", options=SMALL)).url
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as api:
        asked = {"model": "tiny", "messages": MESSAGES, "tools": tools, "max_tokens": 60}
        (choice,) = api.chat.completions.create(**asked, tool_choice="required").choices
        (call,) = choice.message.tool_calls
        assert (call.function.name, choice.finish_reason) == ("weather", "tool_calls")
        Weather.model_validate_json(call.function.arguments)
        with api.chat.completions.stream(**asked, tool_choice="required") as stream:
            final = stream.get_final_completion()
        assert final.choices[0].finish_reason == "tool_calls"
        called = final.choices[0].message.tool_calls[0]
        Weather.model_validate_json(called.function.arguments)
        history = [
            *MESSAGES,
            final.choices[0].message,
            {"role": "tool", "tool_call_id": called.id, "content": "17"},
        ]
        after = api.chat.completions.create(**asked | {"messages": history, "max_tokens": 2})
        assert after.usage.completion_tokens == 2


def test_a_template_without_tools_refuses_them(api):
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        api.chat.completions.create(model="tiny", messages=MESSAGES, tools=tools)


def test_what_a_model_thinks_comes_apart(model, live):
    template = DEEPSEEK_CHAT_TEMPLATE.replace("'<｜Assistant｜>' }}", "'<｜Assistant｜><think>' }}")
    thinking = Tokenizer.train([*TEXTS, "<think> </think>"], 320, chat_template=template)
    url = live(create_app(model, thinking, "tiny", options=SMALL)).url
    asked = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 60,
        "extra_body": {"structured_outputs": {"regex": "hm</think>so be it"}},
    }
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as api:
        (choice,) = api.chat.completions.create(**asked).choices
        assert (choice.message.reasoning_content, choice.message.content) == ("hm", "so be it")
        deltas = [c.choices[0].delta for c in api.chat.completions.create(**asked, stream=True)]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "hm"
        assert "".join(d.content or "" for d in deltas) == "so be it"
