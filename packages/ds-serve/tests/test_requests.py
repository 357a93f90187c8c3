"""Which of OpenAI's fields pass, and which are refused."""

import typing

import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_text
import openai.types.embedding_create_params as openai_embedding
import pytest
from pydantic import ValidationError

from ds_serve.api.fields import IGNORED, REFUSED
from ds_serve.api.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
)

TEXT = {"model": "tiny", "prompt": "The"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (openai_text.CompletionCreateParamsBase, CompletionRequest),
        (openai_chat.CompletionCreateParamsBase, ChatRequest),
        (openai_embedding.EmbeddingCreateParams, EmbeddingRequest),
    ],
    ids=["completions", "chat", "embeddings"],
)
def test_each_field_of_openais_is_supported_ignored_or_refused(theirs, ours):
    names = set(typing.get_type_hints(theirs)) | {"stream"} - {"stream"}
    supported = set(ours.model_fields)
    assert names - supported - set(IGNORED) - set(REFUSED) == set()
    assert not supported & (set(IGNORED) | set(REFUSED))


@pytest.mark.parametrize(
    "field",
    [
        {"n": 1},
        {"best_of": 1},
        {"echo": False},
        {"logprobs": None},
        {"suffix": None},
        {"user": "someone"},
    ],
    ids=str,
)
def test_what_asks_for_nothing_passes(field):
    assert CompletionRequest.model_validate(TEXT | field).prompt == ["The"]


@pytest.mark.parametrize(
    "field",
    [{"best_of": 3}, {"best_of": True}, {"suffix": "end"}, {"nonsense": 1}],
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
        {"top_k": -2},
        {"min_p": 1.5},
        {"n": 0},
        {"n": 129},
        {"seed": 2**63},
        {"stop": ""},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": [1]},
        {"stream": 1},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"other": 1}},
        {"prompt": []},
        {"prompt": ["one", 2]},
        {"prompt": [[1], "two"]},
        {"prompt": [True, False]},
        {"prompt": [[]]},
        {"prompt": {}},
        {"logprobs": 21},
        {"logprobs": 1, "echo": True},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": [1]},
        {"presence_penalty": 2.1},
        {"repetition_penalty": 0},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"structured_outputs": {"choice": []}},
        {"timeout": 0},
    ],
    ids=str,
)
def test_wrong_values_are_refused(field):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate(TEXT | field)


def test_defaults_are_openais():
    request = CompletionRequest.model_validate(TEXT)
    assert (request.max_tokens, request.temperature, request.top_p, request.n) == (16, 1.0, 1.0, 1)
    assert (request.stop, request.seed, request.stream) == ([], None, False)
    assert CompletionRequest.model_validate(TEXT | {"stop": "x"}).stop == ["x"]
    assert CompletionRequest.model_validate(TEXT | {"max_tokens": None}).max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
    ids=str,
)
def test_prompts_come_in_four_forms(prompt, found):
    assert CompletionRequest.model_validate(TEXT | {"prompt": prompt}).prompt == found
    embedding = {"model": "tiny", "input": prompt}
    assert EmbeddingRequest.model_validate(embedding).input == found


def test_bias_is_by_token():
    biased = TEXT | {"logit_bias": {"17": -100, "3": 0.5}}
    assert CompletionRequest.model_validate(biased).logit_bias == {17: -100, 3: 0.5}


def test_parts_of_text_are_joined_and_others_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = CHAT | {"messages": [{"role": "user", "content": parts, "name": None}]}
    assert ChatRequest.model_validate(chat).messages[0].content == "ab"
    parts[1] = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(ValidationError, match="parts of a message"):
        ChatRequest.model_validate(chat)


def test_calls_and_what_came_of_them_can_be_sent_back():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    found = ChatRequest.model_validate(CHAT | {"messages": messages, "tools": [TOOL]})
    assert found.messages[1].tool_calls[0].function.name == "f"


@pytest.mark.parametrize(
    "field",
    [
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
        {"max_tokens": 3, "max_completion_tokens": 3},
        {"tools": [{"type": "function"}]},
        {"tools": [TOOL | {"type": "other"}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
        {"tool_choice": "required", "tools": [TOOL], "response_format": {"type": "json_object"}},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object", "json_schema": {"name": "x"}}},
        {"reasoning_effort": "some"},
        {"functions": [{}]},
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
