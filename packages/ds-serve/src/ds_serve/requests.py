"""What clients may send: the supported part of OpenAI's requests.

A field that we do not have is refused, not ignored: a client that asks for `logprobs` must
not think that it gets them. Only values that ask for nothing (null, or the default that
OpenAI documents) pass.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Fields of OpenAI's that we do not have, and the values of theirs that ask for nothing.
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),  # about tools, which are refused
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


def _asks_nothing(key: str, value: object) -> bool:
    # In Python 0 == False, but `logprobs: 0` asks for something.
    return any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
        for nothing in _ASKS_NOTHING.get(key, ())
    )


def _one_or_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _lone_text(value: object) -> object:
    match value:
        case [str(text)]:
            return text
        case [str(), *_] | [[*_], *_]:
            raise ValueError("one prompt a request: send several requests instead")
    return value


def _joined_parts(value: object) -> object:
    """Join OpenAI's list of content parts; only text is understood."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise ValueError('parts of a message must be {"type": "text", "text": "..."}')
    return "".join(texts)


class _Strict(BaseModel):
    """No unknown fields, no `"5"` for 5; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_nothing(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return {
            key: value
            for key, value in body.items()
            if value is not None and (key in cls.model_fields or not _asks_nothing(key, value))
        }


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class SamplingRequest(_Strict):
    """What completions and chat completions have in common.

    Attributes:
        user: accepted and unused: it names the client's user and changes no answer.
    """

    model: str
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]],
        BeforeValidator(_one_or_list),
        Field(max_length=4),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a streamed answer ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(SamplingRequest):
    """Body of `/v1/completions`: `prompt` is text or token ids."""

    prompt: Annotated[str | list[int], BeforeValidator(_lone_text)]
    max_tokens: int = Field(16, ge=1)


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: str
    content: Annotated[str, BeforeValidator(_joined_parts)]


class ChatRequest(SamplingRequest):
    """Body of `/v1/chat/completions`; without a bound the answer may fill the context."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="older name")

    @model_validator(mode="after")
    def _one_bound(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the older name of max_completion_tokens; send one")
        return self

    @property
    def max_answer(self) -> int | None:
        """The bound on the answer, under whichever name it came."""
        return self.max_completion_tokens or self.max_tokens
