"""The engine: a model, its tokenizer, and the line in front of them.

This one serves a single request at a time. What the API needs of an engine is here and no
more, so that one with continuous batching can take its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.concurrency import run_in_threadpool

from ds_serve.errors import ApiError
from ds_serve.line import Job, Line
from ds_serve.writing import Options, Piece, encode_text, write

if TYPE_CHECKING:
    from ds_model import CausalLM, Tokenizer
    from ds_serve.limits import Limits
    from ds_serve.requests import ChatMessage, SamplingRequest

_SEEDS = 2**31


class Engine:
    """Turns requests into text.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        limits: what one client may ask for.

    Raises:
        ValueError: the tokenizer has more tokens than the model, or can't be streamed.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, limits: Limits) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
                f"{model.config.vocab_size}: they do not belong together"
            )
        tokenizer.stream_decoder()
        self._model = model
        self._tokenizer = tokenizer
        self._limits = limits
        self._line = Line(limits.max_waiting)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._model.config.max_position_embeddings

    @property
    def requests(self) -> int:
        """Requests that are served or waiting."""
        return self._line.requests

    @property
    def open(self) -> bool:
        """Whether requests are taken: true until the server shuts down."""
        return self._line.open

    def close(self) -> None:
        """Stop all work."""
        self._line.close()

    async def encode_prompt(self, prompt: str | list[int]) -> list[int]:
        """Return the ids of a prompt, with the token that begins a document.

        Ids are taken as they are.

        Raises:
            ApiError: the text can't be encoded, or an id is not in the vocabulary.
        """
        if isinstance(prompt, str):
            try:
                return await run_in_threadpool(encode_text, self._tokenizer, prompt)
            except ValueError as error:  # of which ds_model's errors are kinds
                raise ApiError(f"prompt: {error}.", param="prompt", code="invalid_value") from error
        size = self._model.config.vocab_size
        wrong = next((token for token in prompt if not 0 <= token < size), None)
        if wrong is not None:
            raise ApiError(
                f"prompt holds token id {wrong}; ids go from 0 to {size - 1}.",
                param="prompt",
                code="invalid_value",
            )
        return prompt

    async def encode_chat(self, messages: list[ChatMessage]) -> list[int]:
        """Return the ids of a conversation, ending where the answer begins.

        Raises:
            ApiError: there is no chat template, or it refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            raise ApiError(
                "This model has no chat template: it is a base model, which continues text. "
                "Use /v1/completions, or put a chat_template into its tokenizer_config.json.",
                param="messages",
                code="no_chat_template",
            )
        turns = [message.model_dump() for message in messages]
        try:
            return await run_in_threadpool(self._tokenizer.apply_chat_template, turns)
        except ValueError as error:  # of which ds_model's errors are kinds
            raise ApiError(f"messages: {error}.", param="messages", code="invalid_value") from error

    def start(
        self, prompt: list[int], request: SamplingRequest, max_tokens: int | None
    ) -> Job[Piece]:
        """Put a request into the line.

        Args:
            prompt: token ids.
            request: the sampling fields.
            max_tokens: bound that the client set; None: what the context leaves.

        Raises:
            ApiError: the prompt is empty, or prompt and answer exceed the context or limits.
            LineFullError: no place is free.
        """
        options = Options(
            max_tokens=self._bound(len(prompt), max_tokens),
            temperature=request.temperature,
            top_p=request.top_p,
            # TensorFlow's stateless random numbers take 32 bits.
            seed=None if request.seed is None else request.seed % _SEEDS,
            stop=tuple(request.stop),
        )
        return self._line.submit(lambda: write(self._model, self._tokenizer, prompt, options))

    def _bound(self, prompt: int, asked: int | None) -> int:
        if prompt == 0:
            raise ApiError("The prompt is empty; give at least one token.", code="invalid_value")
        room, most = self.context - prompt, self._limits.max_new_tokens
        if room < 1 or (asked is not None and asked > room):
            answer = "an answer" if asked is None else f"{asked} of the answer"
            raise ApiError(
                f"The prompt has {prompt} tokens; with {answer} that exceeds the model's context "
                f"of {self.context} tokens.",
                code="context_length_exceeded",
            )
        if asked is not None and asked > most:
            raise ApiError(
                f"max_tokens is {asked}; this server allows {most}.",
                param="max_tokens",
                code="invalid_value",
            )
        return min(room, most) if asked is None else asked
