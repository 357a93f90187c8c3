"""The engine: a thread that does step after step, and hands out what they bring.

Requests come from any thread; what the model does happens on one. Continuous batching as in Orca
(Yu et al., OSDI 2022), the cache in blocks as in arXiv 2309.06180.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ds_serve.engine.blocks import BlockPool
from ds_serve.engine.scheduler import Piece, Plan, Scheduler
from ds_serve.engine.text import Text, Token, Update

if TYPE_CHECKING:
    from ds_model import CausalLM
    from ds_serve.engine.steps import Results

_log = logging.getLogger(__name__)
_GIB = 2**30


class BusyError(RuntimeError):
    """As many requests wait as may; `retry_after` says in how many seconds to try again."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(RuntimeError):
    """The engine takes no requests any more."""


@dataclass(frozen=True)
class EngineOptions:
    """How much is done at once.

    Attributes:
        max_running: most texts in a step.
        max_waiting: texts that may wait besides; a further one is refused.
        step_tokens: most tokens of a step: how long a piece of a prompt delays the others' next
            token.
        block_size: tokens of a block of the cache; what is shared are whole blocks.
        cache_tokens: tokens that the cache holds; by default `max_running` full contexts, or as
            many as a GiB holds if those are fewer, but at least one full context.
        draft: let the first MTP module guess tokens.

    Raises:
        ValueError: a number is too small.
    """

    max_running: int = 32
    max_waiting: int = 256
    step_tokens: int = 512
    block_size: int = 32
    cache_tokens: int | None = None
    draft: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        least = {"max_running": 1, "max_waiting": 0, "step_tokens": 1, "block_size": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {value} or more")
        if self.cache_tokens is not None and self.cache_tokens < self.block_size:
            raise ValueError(f"cache_tokens is {self.cache_tokens}; a block has {self.block_size}")

    def blocks(self, model: CausalLM) -> int:
        """Return how many blocks the cache has."""
        tokens, c = self.cache_tokens, model.config
        if tokens is None:
            layers = c.num_hidden_layers + self.draft
            width = 4 if model.compute_dtype == "float32" else 2
            fit = _GIB // (c.attention.cache_width * width * layers)
            context = c.max_position_embeddings
            tokens = max(context, min(self.max_running * context, fit))
        return -(-tokens // self.block_size)


@dataclass(frozen=True)
class StepReport:
    """One step, for whoever counts.

    Attributes:
        seconds: from plan to tokens handed out.
        model_seconds: in the compiled graph, of these.
        read: tokens that were read.
        written: tokens that came of it.
        drafts: guesses that were tried.
        accepted: guesses that were right.
        experts: `[M, T, K]` int32: the experts of each token read.
    """

    seconds: float
    model_seconds: float
    read: int
    written: int
    drafts: int
    accepted: int
    experts: np.ndarray


class Engine:
    """Writes many texts at once.

    Args:
        model: the model.
        options: how much at once.

    Attributes:
        options: how much at once.
        failed: a fault that no request should be able to cause ended the engine; nothing is written
            any more.
        scheduler: who takes part; to be read, not changed, by others.
        observers: called with each step's report, on the engine's thread.

    Raises:
        ValueError: the options do not fit each other or the model.
    """

    def __init__(self, model: CausalLM, options: EngineOptions | None = None) -> None:
        # TensorFlow takes seconds to import: who imports this package need not wait for it.
        from ds_serve.engine.steps import Steps  # noqa: PLC0415

        self.options = options = options or EngineOptions()
        blocks = options.blocks(model)
        step_tokens = max(options.step_tokens, 2 * options.max_running)
        self.scheduler = Scheduler(
            BlockPool(blocks), options.block_size, options.max_running, step_tokens
        )
        self.steps = Steps(model, blocks, options.block_size, options.draft)
        self.context = model.config.max_position_embeddings
        self.observers: list[Callable[[StepReport], None]] = []
        self._arrived: list[Text] = []
        self._changed = threading.Condition()
        self.failed = False
        self._open = True
        self._closing = False
        self._unfinished = 0
        self._seconds_a_text = 1.0
        self._thread = threading.Thread(target=self._work, name="ds-serve-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def warm_up(self) -> Iterator[float]:
        """Do each kind of step once; yields the share that is done. Before `start`."""
        return self.steps.warm_up(self.scheduler.step_tokens)

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.scheduler.pool.blocks * self.scheduler.block_size

    @property
    def open(self) -> bool:
        """Whether requests are taken."""
        return self._open

    @property
    def texts(self) -> int:
        """Texts that run or wait."""
        return self._unfinished

    def submit(self, texts: Sequence[Text]) -> None:
        """Let texts be written; all of them or none.

        Raises:
            ClosedError: the engine is closing.
            BusyError: too many wait.
            ValueError: one would not fit the cache by itself.
        """
        for text in texts:
            self.scheduler.check_fits(text)
        with self._changed:
            if not self._open:
                raise ClosedError("the server is closing")
            most = self.options.max_running + self.options.max_waiting
            if self._unfinished + len(texts) > most:
                turns = math.ceil(self.options.max_waiting / self.options.max_running)
                seconds = max(1, math.ceil(turns * self._seconds_a_text))
                raise BusyError(self.options.max_waiting, min(seconds, 600))
            self._unfinished += len(texts)
            self._arrived += texts
            self._changed.notify()

    def cancel(self, texts: Sequence[Text]) -> None:
        """End texts before the next step; harmless for those that have ended."""
        with self._changed:
            for text in texts:
                text.cancelled = True
            self._changed.notify()

    def refuse(self) -> None:
        """Take no more; what is there goes on."""
        self._open = False

    def close(self, grace: float = 0.0) -> None:
        """Take no more, give what is there `grace` seconds to end, cancel the rest."""
        until = time.monotonic() + grace
        with self._changed:
            self._open = False
            self._changed.notify_all()
            while self._unfinished and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            self._steps()
        except Exception as error:  # noqa: BLE001 - whatever it was, nobody may wait for ever
            # Whoever waits is told, and who watches can start the process anew.
            _log.exception("the engine failed")
            with self._changed:
                self.failed, self._open = True, False
                left = [*self._arrived, *self.scheduler.waiting, *self.scheduler.running]
                self._unfinished = 0
                self._changed.notify_all()
            for text in left:
                with contextlib.suppress(Exception):
                    text.listener(Update(finish_reason="error", error=error))

    def _steps(self) -> None:
        scheduler = self.scheduler
        while True:
            with self._changed:
                while not (self._arrived or scheduler.waiting or scheduler.running):
                    if self._closing:
                        return
                    self._changed.wait()
                arrived, self._arrived = self._arrived, []
            for text in arrived:
                scheduler.add(text)
            if self._closing:
                for text in [*scheduler.waiting, *scheduler.running]:
                    text.cancelled = True
            begun = time.perf_counter()
            before = len(scheduler.waiting) + len(scheduler.running)
            plan = scheduler.plan(time.monotonic())
            if plan.pieces:
                self._step(plan, begun)
            self._ended(before - len(scheduler.waiting) - len(scheduler.running))

    def _ended(self, count: int) -> None:
        if count:
            with self._changed:
                self._unfinished -= count
                self._changed.notify_all()

    def _step(self, plan: Plan, begun: float) -> None:
        planned = time.perf_counter()
        try:
            results = self.steps.run(plan)
        except Exception as error:  # noqa: BLE001 - whatever it was, texts must end
            # Nobody knows what the step wrote: nothing of it may be found again.
            _log.exception("a step failed")
            self.scheduler.pool.forget_all()
            for piece in plan.pieces:
                self.scheduler.end(piece.text, "error", error)
            return
        done = time.perf_counter()
        written = drafts = accepted = row = read = 0
        for piece in plan.pieces:
            text = piece.text
            drafts, accepted = drafts - text.drafts, accepted - text.accepted
            written += self._take(piece, row, read, results)
            drafts, accepted = drafts + text.drafts, accepted + text.accepted
            row += piece.asks
            read += len(piece.tokens)
        seconds = time.perf_counter() - begun
        report = StepReport(
            seconds, done - planned, read, written, drafts, accepted, results.experts
        )
        for observer in self.observers:
            observer(report)

    def _take(self, piece: Piece, row: int, read: int, results: Results) -> int:
        """Give a text its tokens, from `row` of the results on; return how many."""
        text, scheduler = piece.text, self.scheduler
        chosen = results.chosen.tokens[row : row + piece.asks].tolist()
        try:
            count = scheduler.advance(piece, chosen)
        except Exception as error:  # noqa: BLE001 - a grammar that fails ends its own text alone
            scheduler.end(text, "error", error)
            return 0
        if not piece.asks:
            return 0
        tokens = tuple(
            self._told(piece, i, row + i, read + len(piece.tokens) - piece.asks + i, results)
            for i in range(count)
        )
        text.draft = None
        if self.steps.drafts and count:
            text.draft = int(results.drafts[row + count - 1])
        hidden = results.hidden[row].numpy() if text.rules.hidden else None
        if text.finish_reason is not None:
            scheduler.leave(text)
            spent = time.monotonic() - (text.started or text.arrived)
            self._seconds_a_text += 0.1 * (spent - self._seconds_a_text)
        text.listener(Update(tokens, text.finish_reason, hidden=hidden))
        return count

    def _told(self, piece: Piece, i: int, row: int, read: int, results: Results) -> Token:
        """Return what is known of the i-th token that a step wrote for a text."""
        rules, chosen = piece.text.rules, results.chosen
        token = int(chosen.tokens[row])
        drafted = piece.asks == 2 and i == 0 and piece.tokens[-1] == token
        experts = results.experts[:, read] if rules.experts else None
        if rules.logprobs is None:
            return Token(token, drafted, experts=experts)
        ids = chosen.likeliest[row, : rules.logprobs].tolist()
        values = chosen.likeliest_logprobs[row, : rules.logprobs].tolist()
        alternatives = tuple(zip(ids, values, strict=True))
        return Token(token, drafted, float(chosen.logprobs[row]), alternatives, experts)
