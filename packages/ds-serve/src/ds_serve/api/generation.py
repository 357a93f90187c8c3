"""One request's answers in the making: tokens from the engine's thread, text for the client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ds_serve.engine import Engine, Text, Token, Update
from ds_serve.stopping import StopStrings

if TYPE_CHECKING:
    from ds_model import Tokenizer


class Usage(NamedTuple):
    """Tokens that a request took.

    Attributes:
        prompt: of all prompts, each once.
        completion: that were written.
        cached: of the prompts, those that were in the cache.
        drafted: guesses that were tried.
        accepted: guesses that were right.
        reasoning: of those written, thoughts.
    """

    prompt: int
    completion: int
    cached: int
    drafted: int
    accepted: int
    reasoning: int = 0


@dataclass(frozen=True)
class Piece:
    """What came of one answer since the piece before.

    Attributes:
        index: of the answer.
        text: may be empty, as when a character still lacks bytes.
        tokens: that came.
        finish_reason: `None` except in the last piece: "stop" at an end token or a stop string,
            "length" at the bound.
    """

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None


class AnswerTimeoutError(RuntimeError):
    """An answer was not ready in its time."""


class Mailbox:
    """Carries what other threads post to an event loop, all that is there in one turn.

    Args:
        loop: the loop.

    Attributes:
        loop: the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._posted: list[tuple[Callable[[Any], None], Any]] = []

    def post(self, receive: Callable[[Any], None], item: object) -> None:
        """Let `receive(item)` be called on the loop."""
        with self._lock:
            self._posted.append((receive, item))
            first = len(self._posted) == 1
        if first:
            # The loop is closed only when nobody reads any more.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        for receive, item in posted:
            receive(item)


class _Answer:
    """One answer: its text, as far as it may be shown."""

    def __init__(self, index: int, tokenizer: Tokenizer, stop: Sequence[str], skip: bool) -> None:
        self.index = index
        self.tokens = 0
        self.finished = False
        self._decoder = tokenizer.stream_decoder(skip_special_tokens=skip)
        self._stops = StopStrings(tuple(stop))

    def take(self, update: Update, ends: frozenset[int]) -> Piece:
        text, shown = "", []
        for token in update.tokens:
            self.tokens += 1
            shown.append(token)
            if token.id not in ends:
                text += self._stops.feed(self._decoder.push(token.id))
            if self._stops.hit:
                break
        reason: str | None = update.finish_reason
        if self._stops.hit:
            reason = "stop"
        elif reason is not None:
            text += self._stops.feed(self._decoder.finish())
            text += self._stops.flush()
            reason = "stop" if self._stops.hit else reason
        self.finished = reason is not None
        return Piece(self.index, text, tuple(shown), reason)


class Generation:
    """Answers of one request; iterate over it for their pieces, or cancel it.

    Args:
        engine: writes them.
        tokenizer: of the model.
        mailbox: to the loop that iterates.
        stop: texts that end an answer.
        skip_special_tokens: leave out tokens that are no text.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        mailbox: Mailbox,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._engine, self._tokenizer, self._mailbox = engine, tokenizer, mailbox
        self._stop, self._skip = stop, skip_special_tokens
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._answers: list[_Answer] = []
        self.texts: list[Text] = []

    def listener(self) -> Callable[[Update], None]:
        """Return what the next text is to tell its updates."""
        index = len(self._answers)
        self._answers.append(_Answer(index, self._tokenizer, self._stop, self._skip))
        receive = self._updates.put_nowait
        return lambda update: self._mailbox.post(receive, (index, update))

    def start(self, texts: Sequence[Text]) -> None:
        """Let the engine write; texts in the order of their listeners.

        Raises:
            BusyError: too many wait.
            ClosedError: the server is shutting down.
            ValueError: a text does not fit the cache.
        """
        self.texts = list(texts)
        self._engine.submit(texts)

    def cancel(self) -> None:
        """Free what the answers hold, within a step; harmless when they are done."""
        left = [
            text
            for text, answer in zip(self.texts, self._answers, strict=True)
            if not (answer.finished and text.finish_reason is not None)
        ]
        if left:
            self._engine.cancel(left)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield what the engine tells until all texts have ended.

        Raises:
            AnswerTimeoutError: a text was not ready in its time.
            Exception: what the engine raised.
        """
        left = len(self.texts)
        while left:
            index, update = await self._updates.get()
            if update.error is not None:
                raise update.error
            if update.finish_reason == "timeout":
                raise AnswerTimeoutError
            left -= update.finish_reason is not None
            yield index, update

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield pieces of all answers as they come; see `updates` for what it raises."""
        async for index, update in self.updates():
            answer, text = self._answers[index], self.texts[index]
            if answer.finished or update.finish_reason == "cancelled":
                continue
            piece = answer.take(update, text.rules.ends)
            if piece.finish_reason is not None and update.finish_reason is None:
                self._engine.cancel([text])  # at a stop string
            yield piece
            if all(answer.finished for answer in self._answers):
                return

    @property
    def usage(self) -> Usage:
        """What was used so far."""
        leaders = [text for text in self.texts if text.leader is None]
        return Usage(
            prompt=sum(len(text.prompt) for text in leaders),
            completion=sum(answer.tokens for answer in self._answers),
            cached=sum(text.cached for text in leaders),
            drafted=sum(text.drafts for text in self.texts),
            accepted=sum(text.accepted for text in self.texts),
        )
