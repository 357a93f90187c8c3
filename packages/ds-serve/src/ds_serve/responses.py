"""What clients get: OpenAI's objects for text and for chat, whole and in chunks."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from ds_serve.writing import FinishReason

Json = dict[str, Any]


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Return the tokens that a request took."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(body: Json | str) -> str:
    """Return one server-sent event; a text is sent as it is."""
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n"


@dataclass(frozen=True)
class _Answer:
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: uuid4().hex)

    def _object(self, kind: str, prefix: str, choices: list[Json], **more: Any) -> Json:
        head = {"id": prefix + self.key, "object": kind, "created": self.created}
        return {**head, "model": self.model, "choices": choices, **more}


class TextFormat(_Answer):
    """`/v1/completions`."""

    def whole(self, text: str, finish_reason: FinishReason | None, used: Json) -> Json:
        """Return a `text_completion`."""
        return self._text([_text_choice(text, finish_reason)], usage=used)

    def opening(self) -> list[Json]:
        """Return nothing: the first chunk is text."""
        return []

    def chunk(self, text: str, finish_reason: FinishReason | None) -> Json:
        """Return a `text_completion` that holds a piece."""
        return self._text([_text_choice(text, finish_reason)])

    def closing(self, used: Json) -> Json:
        """Return a `text_completion` without a choice."""
        return self._text([], usage=used)

    def _text(self, choices: list[Json], **more: Any) -> Json:
        return self._object("text_completion", "cmpl-", choices, **more)


class ChatFormat(_Answer):
    """`/v1/chat/completions`."""

    def whole(self, text: str, finish_reason: FinishReason | None, used: Json) -> Json:
        """Return a `chat.completion`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion", "chatcmpl-", [choice], usage=used)

    def opening(self) -> list[Json]:
        """Return the chunk that names the role."""
        return [self._chunk([_delta({"role": "assistant", "content": ""}, None)])]

    def chunk(self, text: str, finish_reason: FinishReason | None) -> Json:
        """Return a `chat.completion.chunk`; a last one without text has an empty delta."""
        delta = {"content": text} if text else {}
        return self._chunk([_delta(delta, finish_reason)])

    def closing(self, used: Json) -> Json:
        """Return a `chat.completion.chunk` without a choice."""
        return self._chunk([], usage=used)

    def _chunk(self, choices: list[Json], **more: Any) -> Json:
        return self._object("chat.completion.chunk", "chatcmpl-", choices, **more)


Format = TextFormat | ChatFormat


def _text_choice(text: str, finish_reason: FinishReason | None) -> Json:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _delta(delta: Json, finish_reason: FinishReason | None) -> Json:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
