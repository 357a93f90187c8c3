"""A model as it is served: requests in, generations out. What lies between HTTP and the engine."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastapi.concurrency import run_in_threadpool

from ds_serve.api.errors import ApiError
from ds_serve.api.forms import form_of, form_of_chat
from ds_serve.api.generation import Generation, Mailbox
from ds_serve.api.parts import THINK, THOUGHT, thinks
from ds_serve.api.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    SamplingRequest,
)
from ds_serve.engine import Engine, Grammar, GrammarError, Grammars, Rules, Text
from ds_serve.writing import encode_text, end_tokens

if TYPE_CHECKING:
    from ds_model import CausalLM, Tokenizer
    from ds_serve.api.limits import Limits
    from ds_serve.engine.grammar import Matcher


class ChatPrompt(NamedTuple):
    """A conversation as the model reads it.

    Attributes:
        ids: token ids, ending where the answer begins.
        thinking: whether the answer begins with what the model thinks.
    """

    ids: list[int]
    thinking: bool


class Served:
    """One model, its tokenizer and its engine.

    Args:
        model: the model.
        tokenizer: its tokenizer, byte-level.
        name: what clients call it.
        engine: that writes with it.
        limits: what one client may ask for.

    Raises:
        ValueError: the tokenizer has more tokens than the model, or can't be streamed.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, name: str, engine: Engine, limits: Limits
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
                f"{model.config.vocab_size}: they do not belong together"
            )
        tokenizer.stream_decoder()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.engine, self.limits = engine, limits
        self.ends = frozenset(end_tokens(model, tokenizer))
        self.created = int(time.time())
        self._grammars = Grammars(tokenizer, model.config.vocab_size, self.ends)
        template = tokenizer.chat_template or ""
        self.takes_tools = "tools" in template or "tool_calls" in template
        knows = tokenizer.token_to_id(THOUGHT) is not None
        self.reasons = knows or THINK in template or THOUGHT in template
        self._mailbox: Mailbox | None = None

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return min(self.engine.context, self.engine.cache_tokens)

    async def encode_prompts(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Return the ids of prompts, texts with the token that begins a document.

        Raises:
            ApiError: a text can't be encoded, or an id is not in the vocabulary.
        """
        found = []
        for prompt in prompts:
            if isinstance(prompt, str):
                try:
                    found.append(await run_in_threadpool(encode_text, self.tokenizer, prompt))
                except ValueError as error:  # of which ds_model's errors are kinds
                    raise _invalid("prompt", f"prompt: {error}.") from error
            else:
                self._check_ids("prompt", prompt)
                found.append(prompt)
        return found

    async def encode_chat(self, request: ChatRequest) -> ChatPrompt:
        """Return a conversation, ending where the answer begins.

        Raises:
            ApiError: there is no chat template, or it refuses the messages, or takes no tools.
        """
        if self.tokenizer.chat_template is None:
            raise ApiError(
                "This model has no chat template: it is a base model, which continues text. "
                "Use /v1/completions, or put a chat_template into its tokenizer_config.json.",
                param="messages",
                code="no_chat_template",
            )
        if request.tools and not self.takes_tools:
            raise ApiError(
                "This model's chat template has no place for tools; leave them out.",
                param="tools",
                code="unsupported_parameter",
            )
        turns = [
            message.model_dump(exclude_none=True) | {"content": message.content}
            for message in request.messages
        ]
        variables = dict(request.chat_template_kwargs)
        if request.reasoning_effort is not None:
            variables["thinking"] = request.reasoning_effort != "none"
        if request.tools and request.tool_choice != "none":
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]

        def encode() -> ChatPrompt:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, **variables)
            return ChatPrompt(self.tokenizer.encode(text), self.reasons and thinks(text))

        try:
            return await run_in_threadpool(encode)
        except (TypeError, ValueError) as error:  # of which ds_model's errors are kinds
            raise _invalid("messages", f"messages: {error}.") from error

    async def complete(self, request: CompletionRequest, prompts: list[list[int]]) -> Generation:
        """Begin to continue texts.

        Raises:
            ApiError: a prompt is empty, or the answer exceeds context or limits.
            BusyError: too many wait.
        """
        form = form_of(request)
        return await self._begin(request, prompts, request.max_tokens, request.logprobs, form)

    async def chat(self, request: ChatRequest, prompt: ChatPrompt) -> Generation:
        """Begin to answer in a conversation; raises as `complete`."""
        form = form_of_chat(request, self.tokenizer)
        logprobs = request.top_logprobs if request.logprobs else None
        tools = bool(request.tools) and request.tool_choice != "none"
        return await self._begin(
            request, [prompt.ids], request.max_answer, logprobs, form, marks=tools
        )

    async def embed(self, request: EmbeddingRequest) -> Generation:
        """Begin to read texts for their last hidden states; raises as `complete`."""
        prompts = await self.encode_prompts(request.input)
        for ids in prompts:
            self._bound(len(ids), 0)
        generation = Generation(self.engine, self.tokenizer, self._loops_mailbox())
        rules = Rules(max_tokens=0, hidden=True, draft=False)
        deadline = time.monotonic() + self.limits.request_seconds
        texts = [Text(ids, rules, generation.listener(), deadline=deadline) for ids in prompts]
        return _started(generation, texts)

    async def _begin(
        self,
        request: SamplingRequest,
        prompts: list[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
        form: Grammar | None,
        marks: bool = False,
    ) -> Generation:
        self._check_ids("stop_token_ids", request.stop_token_ids)
        self._check_ids("logit_bias", list(request.logit_bias))
        ends = frozenset() if request.ignore_eos else self.ends
        ends |= frozenset(request.stop_token_ids)
        generation = Generation(
            self.engine, self.tokenizer, self._loops_mailbox(), request.stop, not marks
        )
        seconds = min(request.timeout or self.limits.request_seconds, self.limits.request_seconds)
        deadline = time.monotonic() + seconds
        texts: list[Text] = []
        for prompt in prompts:
            bound = self._bound(len(prompt), max_tokens)
            leader = None
            for i in range(request.n):
                seed = secrets.randbelow(2**63) if request.seed is None else request.seed + i
                text = Text(
                    prompt,
                    _rules(request, bound, logprobs, ends, seed),
                    generation.listener(),
                    priority=request.priority,
                    deadline=deadline,
                    leader=leader,
                    matcher=None if form is None else await self._matcher(form),
                )
                leader = leader or text
                texts.append(text)
        return _started(generation, texts)

    async def _matcher(self, form: Grammar) -> Matcher:
        try:
            return await run_in_threadpool(self._grammars.matcher, form)
        except GrammarError as error:
            field = {"json_schema": "response_format"}.get(form.kind, "structured_outputs")
            raise _invalid(field, f"{field} can't be kept to: {error}.") from error

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        size = self.model.config.vocab_size
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            message = f"{field} holds token id {wrong}; ids go from 0 to {size - 1}."
            raise _invalid(field, message)

    def _bound(self, prompt: int, asked: int | None) -> int:
        if prompt == 0:
            raise ApiError("The prompt is empty; give at least one token.", code="invalid_value")
        room, most = self.context - prompt, self.limits.max_new_tokens
        if (1 if asked is None else asked) > room:
            answer = "an answer" if asked is None else f"{asked} of the answer"
            raise ApiError(
                f"The prompt has {prompt} tokens; with {answer} that exceeds the model's context "
                f"of {self.context} tokens.",
                code="context_length_exceeded",
            )
        if asked is not None and asked > most:
            raise _invalid("max_tokens", f"max_tokens is {asked}; this server allows {most}.")
        return min(room, most) if asked is None else asked

    def _loops_mailbox(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox


def _started(generation: Generation, texts: list[Text]) -> Generation:
    try:
        generation.start(texts)
    except ValueError as error:
        raise ApiError(f"{error}.", code="context_length_exceeded") from error
    return generation


def _rules(
    request: SamplingRequest, bound: int, logprobs: int | None, ends: frozenset[int], seed: int
) -> Rules:
    return Rules(
        max_tokens=bound,
        min_tokens=min(request.min_tokens, bound),
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        temperature=request.temperature,
        top_k=max(0, request.top_k),
        top_p=request.top_p,
        min_p=request.min_p,
        seed=seed % 2**63,
        logprobs=logprobs,
        ends=ends,
        experts=request.experts,
    )


def _invalid(field: str, message: str) -> ApiError:
    return ApiError(message, param=field, code="invalid_value")
