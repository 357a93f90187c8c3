"""Which of OpenAI's fields pass, and which are refused."""

import pytest
from pydantic import ValidationError

from ds_serve.requests import ChatRequest, CompletionRequest

TEXT = {"model": "tiny", "prompt": "The"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    "field",
    [
        {"n": 1},
        {"best_of": 1},
        {"echo": False},
        {"logprobs": None},
        {"presence_penalty": 0},
        {"presence_penalty": 0.0},
        {"logit_bias": {}},
        {"suffix": None},
        {"user": "someone"},
    ],
    ids=str,
)
def test_what_asks_for_nothing_passes(field):
    assert CompletionRequest.model_validate(TEXT | field).prompt == "The"


@pytest.mark.parametrize(
    "field",
    [
        {"n": 2},
        {"best_of": 3},
        {"echo": True},
        {"logprobs": 0},  # in completions: give the chosen token's
        {"frequency_penalty": 0.5},
        {"logit_bias": {"50256": -100}},
        {"suffix": "end"},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_what_we_do_not_have_is_refused(field):
    with pytest.raises(ValidationError) as error:
        CompletionRequest.model_validate(TEXT | field)
    (problem,) = error.value.errors()
    assert (problem["type"], problem["loc"]) == ("extra_forbidden", tuple(field))


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": 0},
        {"max_tokens": "5"},
        {"max_tokens": 1.5},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.01},
        {"seed": 2**63},
        {"stop": ""},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": [1]},
        {"stream": 1},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"other": 1}},
        {"prompt": ["one", "two"]},
        {"prompt": [[1], [2]]},
        {"prompt": [True, False]},
        {"prompt": {}},
    ],
    ids=str,
)
def test_wrong_values_are_refused(field):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate(TEXT | field)


def test_defaults_are_openais():
    request = CompletionRequest.model_validate(TEXT)
    assert (request.max_tokens, request.temperature, request.top_p) == (16, 1.0, 1.0)
    assert (request.stop, request.seed, request.stream) == ([], None, False)
    assert CompletionRequest.model_validate(TEXT | {"stop": "x"}).stop == ["x"]
    assert CompletionRequest.model_validate(TEXT | {"prompt": ["The"]}).prompt == "The"
    assert CompletionRequest.model_validate(TEXT | {"max_tokens": None}).max_tokens == 16


def test_parts_of_text_are_joined_and_others_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = CHAT | {"messages": [{"role": "user", "content": parts, "name": None}]}
    assert ChatRequest.model_validate(chat).messages[0].content == "ab"
    parts[1] = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(ValidationError, match="parts of a message"):
        ChatRequest.model_validate(chat)


@pytest.mark.parametrize(
    "field",
    [
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
        {"max_tokens": 3, "max_completion_tokens": 3},
        {"tools": [{"type": "function"}]},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
    ],
    ids=str,
)
def test_wrong_chats_are_refused(field):
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(CHAT | field)


def test_both_names_of_the_bound():
    assert ChatRequest.model_validate(CHAT | {"max_tokens": 3}).max_answer == 3
    assert ChatRequest.model_validate(CHAT | {"max_completion_tokens": 4}).max_answer == 4
    assert ChatRequest.model_validate(CHAT | {"tools": [], "logprobs": False}).max_answer is None
