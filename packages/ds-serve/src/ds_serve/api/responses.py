"""What clients get: OpenAI's objects for text and for chat, whole and in chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ds_serve.api.parts import Part, Parts

if TYPE_CHECKING:
    from ds_model import Tokenizer
    from ds_serve.api.generation import Piece, Usage
    from ds_serve.engine import Token

Json = dict[str, Any]


def event(body: Json | str) -> str:
    """Return one server-sent event; a text is sent as it is."""
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n"


def usage_of(used: Usage) -> Json:
    """Return the tokens that a request took; drafts are told as predictions are by OpenAI."""
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.completion,
        "total_tokens": used.prompt + used.completion,
        "prompt_tokens_details": {"cached_tokens": used.cached},
        "completion_tokens_details": {
            "reasoning_tokens": used.reasoning,
            "accepted_prediction_tokens": used.accepted,
            "rejected_prediction_tokens": used.drafted - used.accepted,
        },
    }


@dataclass(kw_only=True)
class _Answer:
    """What all objects of one answer share.

    Attributes:
        model: what the client calls it.
        tokenizer: of the model, for the texts of tokens.
    """

    model: str
    tokenizer: Tokenizer
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: uuid4().hex)

    def _object(self, kind: str, prefix: str, choices: list[Json], **more: Any) -> Json:
        head = {"id": prefix + self.key, "object": kind, "created": self.created}
        return {**head, "model": self.model, "choices": choices, **more}

    def _text_of(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")


@dataclass(kw_only=True)
class TextFormat(_Answer):
    """`/v1/completions`.

    Attributes:
        logprobs: alternatives to tell; `None` tells nothing.
        experts: tell the experts of each token.
        echoes: for each choice, the text that comes before.
    """

    logprobs: int | None = None
    experts: bool = False
    echoes: Sequence[str] = ()
    _offsets: dict[int, int] = field(default_factory=dict)

    def whole(self, pieces: list[list[Piece]], used: Usage) -> Json:
        """Return a `text_completion`."""
        choices = []
        for i, parts in enumerate(pieces):
            tokens = [token for piece in parts for token in piece.tokens]
            text = self._echo(i) + "".join(piece.text for piece in parts)
            choices.append(self._choice(i, text, tokens, parts[-1].finish_reason))
        return self._text(choices, usage=usage_of(used))

    def opening(self, choices: int) -> list[Json]:
        """Return what is echoed, if anything is."""
        echoed = [i for i in range(choices) if self._echo(i)]
        return [self._text([self._choice(i, self._echo(i), [], None)]) for i in echoed]

    def chunk(self, piece: Piece) -> list[Json]:
        """Return a `text_completion` that holds a piece."""
        told = piece.tokens if self.logprobs is not None or self.experts else ()
        if not (piece.text or piece.finish_reason or told):
            return []
        return [
            self._text([self._choice(piece.index, piece.text, piece.tokens, piece.finish_reason)])
        ]

    def closing(self, used: Usage) -> Json:
        """Return a `text_completion` without a choice."""
        return self._text([], usage=usage_of(used))

    def _echo(self, i: int) -> str:
        return self.echoes[i] if self.echoes else ""

    def _text(self, choices: list[Json], **more: Any) -> Json:
        return self._object("text_completion", "cmpl-", choices, **more)

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None
    ) -> Json:
        made: Json = {"index": index, "text": text, "logprobs": None}
        if self.logprobs is not None:
            made["logprobs"] = self._logprobs(index, tokens)
        if self.experts:
            made["experts"] = _experts(tokens)
        return made | {"finish_reason": finish_reason}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Json:
        texts = [self._text_of(token.id) for token in tokens]
        offsets, at = [], self._offsets.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._text_of(token): value for token, value in reversed(said.alternatives)}
                for said in tokens
            ],
            "text_offset": offsets,
        }


@dataclass(kw_only=True)
class ChatFormat(_Answer):
    """`/v1/chat/completions`.

    Attributes:
        thinking: the prompt ends where the model is to think.
        reasons: marks of thinking are read.
        tools: marks of calls are read.
        logprobs: tell the probability of each token.
        experts: tell the experts of each token.
        reasoned: tokens of what was thought, as far as answers have been read.
    """

    thinking: bool = False
    reasons: bool = True
    tools: bool = False
    logprobs: bool = False
    experts: bool = False
    reasoned: int = 0
    _parts: dict[int, Parts] = field(default_factory=dict)

    def whole(self, pieces: list[list[Piece]], used: Usage) -> Json:
        """Return a `chat.completion`."""
        choices = []
        for i, parts in enumerate(pieces):
            found = [part for piece in parts for part in self._take(piece)]
            said = {"reasoning": "", "content": ""}
            for part in found:
                if part.kind != "call":
                    said[part.kind] += part.text
            calls = [_call(part) for part in found if part.kind == "call"]
            text = said["content"] or (None if calls else "")
            message: Json = {"role": "assistant", "content": text, "refusal": None}
            if said["reasoning"]:
                message["reasoning_content"] = said["reasoning"]
            if calls:
                message["tool_calls"] = calls
            tokens = [token for piece in parts for token in piece.tokens]
            reason = _reason(parts[-1].finish_reason, bool(calls))
            choices.append({"index": i, "message": message} | self._told(tokens, reason))
        used = used._replace(reasoning=self.reasoned)
        return self._object("chat.completion", "chatcmpl-", choices, usage=usage_of(used))

    def opening(self, choices: int) -> list[Json]:
        """Return the chunks that name the role."""
        role = {"role": "assistant", "content": ""}
        return [self._chunk([self._delta(i, role, (), None)]) for i in range(choices)]

    def chunk(self, piece: Piece) -> list[Json]:
        """Return the `chat.completion.chunk`s of a piece; a last one may have an empty delta."""
        deltas: list[Json] = []
        for part in self._take(piece):
            if part.kind == "call":
                deltas.append({"tool_calls": [{"index": part.index} | _call(part)]})
            else:
                name = "reasoning_content" if part.kind == "reasoning" else "content"
                deltas.append({name: part.text})
        told = piece.tokens if self.logprobs or self.experts else ()
        if not deltas and (piece.finish_reason or told):
            deltas.append({})
        called = self._parts[piece.index].calls > 0
        chunks = []
        for i, delta in enumerate(deltas):
            last = i == len(deltas) - 1
            reason = _reason(piece.finish_reason, called) if last else None
            tokens = piece.tokens if i == 0 else ()
            chunks.append(self._chunk([self._delta(piece.index, delta, tokens, reason)]))
        return chunks

    def closing(self, used: Usage) -> Json:
        """Return a `chat.completion.chunk` without a choice."""
        return self._chunk([], usage=usage_of(used._replace(reasoning=self.reasoned)))

    def _take(self, piece: Piece) -> list[Part]:
        parts = self._parts.setdefault(piece.index, Parts(self.thinking, self.reasons, self.tools))
        found = parts.feed(piece.text)
        if piece.finish_reason is not None:
            found += parts.finish()
        if any(part.kind == "reasoning" for part in found):
            self.reasoned += len(piece.tokens)
        return found

    def _chunk(self, choices: list[Json], **more: Any) -> Json:
        return self._object("chat.completion.chunk", "chatcmpl-", choices, **more)

    def _delta(
        self, index: int, delta: Json, tokens: Sequence[Token], finish_reason: str | None
    ) -> Json:
        return {"index": index, "delta": delta} | self._told(tokens, finish_reason)

    def _told(self, tokens: Sequence[Token], finish_reason: str | None) -> Json:
        found: Json = {"logprobs": None, "finish_reason": finish_reason}
        if self.logprobs:
            found["logprobs"] = {"content": [self._logprob(token) for token in tokens]}
        if self.experts:
            found["experts"] = _experts(tokens)
        return found

    def _logprob(self, said: Token) -> Json:
        def entry(token: int, logprob: float | None) -> Json:
            raw = self.tokenizer.token_bytes(token)
            return {"token": self._text_of(token), "logprob": logprob, "bytes": list(raw)}

        top = [entry(token, value) for token, value in said.alternatives]
        return entry(said.id, said.logprob) | {"top_logprobs": top}


Format = TextFormat | ChatFormat


def _experts(tokens: Sequence[Token]) -> list[Json]:
    return [
        {
            "id": token.id,
            "drafted": token.drafted,
            "chosen": [] if token.experts is None else token.experts.tolist(),
        }
        for token in tokens
    ]


def _call(part: Part) -> Json:
    function = {"name": part.name, "arguments": part.text}
    return {"id": part.key, "type": "function", "function": function}


def _reason(finish_reason: str | None, called: bool) -> str | None:
    return "tool_calls" if called and finish_reason == "stop" else finish_reason
