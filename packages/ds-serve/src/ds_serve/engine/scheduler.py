"""Who takes part in the next step, with how many tokens, in which blocks.

Requests join and leave at every step (continuous batching: Yu et al., Orca, OSDI 2022). A step
holds one token, or two with a draft, of each text that is being written, and beside them pieces of
prompts as far as its size allows, so that a long prompt does not stall the others. When no block is
free the text that comes last gives up all of its own and is read again later.

Plain Python: nothing knows of tensors.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

from ds_serve.engine.blocks import BlockPool
from ds_serve.engine.text import FinishReason, Text, Update

FEW = 8  # a piece of up to so many tokens attends in the latent space; those stand first


class Piece(NamedTuple):
    """One text's part of a step.

    Attributes:
        text: whose it is.
        start: slot of the first token.
        tokens: those to read; the last one is a guess if `asks` is 2.
        asks: for how many of the last tokens the next one is wanted.
    """

    text: Text
    start: int
    tokens: list[int]
    asks: int


class Plan(NamedTuple):
    """One step.

    Attributes:
        pieces: those of up to `FEW` tokens first.
        copies: blocks to copy before, from and to.
    """

    pieces: list[Piece]
    copies: list[tuple[int, int]]


def _order(text: Text) -> tuple[int, float]:
    return text.priority, text.arrived


class Scheduler:
    """The texts in the making, and the blocks that they hold.

    Args:
        pool: the blocks.
        block_size: tokens of a block.
        max_running: most texts in a step.
        step_tokens: most tokens of a step.

    Attributes:
        pool: the blocks.
        waiting: texts that hold no blocks, in the order of their turn.
        running: texts that hold blocks, in the same order.
        preemptions: how often a text gave up its blocks.
        prompt_tokens: of all texts that began.
        cached_tokens: of these, those found in the cache.

    Raises:
        ValueError: a step has no room for one token, or a guess, of each running text.
    """

    def __init__(
        self, pool: BlockPool, block_size: int, max_running: int = 32, step_tokens: int = 512
    ) -> None:
        if step_tokens < 2 * max_running:
            raise ValueError(
                f"step_tokens is {step_tokens}; with {max_running} texts at once it must be at "
                f"least {2 * max_running}"
            )
        self.pool, self.block_size = pool, block_size
        self.max_running, self.step_tokens = max_running, step_tokens
        self.waiting: list[Text] = []
        self.running: list[Text] = []
        self.preemptions = self.prompt_tokens = self.cached_tokens = 0

    def check_fits(self, text: Text) -> None:
        """Raise ValueError if a text would not fit all the blocks by itself."""
        most = len(text.prompt) + max(1, text.rules.max_tokens)
        if self._blocks_for(most) > self.pool.blocks:
            raise ValueError(
                f"prompt and answer have up to {most} tokens; the cache holds "
                f"{self.pool.blocks * self.block_size}"
            )

    def add(self, text: Text) -> None:
        """Let a text wait for its turn.

        Raises:
            ValueError: it would not fit all the blocks by itself.
        """
        self.check_fits(text)
        insort(self.waiting, text, key=_order)

    def end(self, text: Text, reason: FinishReason, error: BaseException | None = None) -> None:
        """Take a text out and tell its listener."""
        for texts in (self.waiting, self.running):
            if text in texts:
                texts.remove(text)
        self._give_up_blocks(text)
        text.finish_reason = reason
        text.listener(Update(finish_reason=reason, error=error))

    def plan(self, now: float) -> Plan:
        """Choose what the next step reads; empty if there is nothing to do.

        Args:
            now: by `time.monotonic`.
        """
        self._drop(now)
        writing = sum(self._width(text) for text in self.running if text.unread == 1)
        budget = self.step_tokens - writing
        pieces: list[Piece] = []
        copies: dict[int, int] = {}
        for text in list(self.running):
            count = self._width(text) if text.unread == 1 else min(text.unread, budget)
            if text not in self.running or count < 1:  # the former: an earlier one took its blocks
                continue
            if self._claim(text, text.computed + count, copies):
                budget -= count if text.unread > 1 else 0
                pieces.append(_piece(text, count))
        pieces += self._newcomers(budget, copies, now)
        pieces.sort(key=lambda piece: len(piece.tokens) > FEW)
        return Plan(pieces, [(old, new) for new, old in copies.items()])

    def _newcomers(self, budget: int, copies: dict[int, int], now: float) -> list[Piece]:
        """Let those that wait in, as far as places, blocks and the step's size allow."""
        pieces = []
        for text in list(self.waiting):
            if budget < 1 or len(self.running) >= self.max_running:
                break
            if not _its_turn(text):
                continue
            if not self._admit(text):
                break
            count = min(text.unread, budget)
            if self._claim(text, text.computed + count, copies):
                budget -= count
                pieces.append(_piece(text, count))
                if text.started is None:
                    text.started = now
        return pieces

    def advance(self, piece: Piece, chosen: Sequence[int]) -> int:
        """Take note of a step that was done.

        Args:
            piece: what was read.
            chosen: the token after each of the last `asks` tokens.

        Returns:
            How many of them were written; the text may have ended with the last.
        """
        text, guessed = piece.text, piece.asks == 2
        right = guessed and piece.tokens[-1] == chosen[0]
        text.computed = piece.start + len(piece.tokens) - (guessed and not right)
        text.drafts += guessed
        text.accepted += right
        wanted = chosen[: 1 + right] if piece.asks else ()
        if piece.asks and text.rules.max_tokens == 0:
            text.finish_reason = "length"
        count = 0
        for token in wanted:
            if text.finish_reason is not None:
                break
            text.write(token)
            count += 1
        self._publish(text)
        return count

    def leave(self, text: Text) -> None:
        """Take out a text that has ended."""
        self.running.remove(text)
        self._give_up_blocks(text)

    def check(self) -> None:
        """Raise if blocks or texts are out of order: what tests call after each step."""
        self.pool.check(text.blocks for text in self.running)
        for text in self.waiting:
            if text.blocks or text.computed:
                raise AssertionError("a text that waits holds blocks")
        for text in self.running:
            if len(text.blocks) < self._blocks_for(text.computed):
                raise AssertionError("a text has read more than its blocks hold")

    def _width(self, text: Text) -> int:
        return 2 if text.draft is not None and text.can_draft else 1

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _drop(self, now: float) -> None:
        for text in [*self.waiting, *self.running]:
            if text.cancelled:
                self.end(text, "cancelled")
            elif text.deadline is not None and now >= text.deadline:
                self.end(text, "timeout")

    def _admit(self, text: Text) -> bool:
        """Give a waiting text what the cache holds of it, if the rest has room too."""
        leader = text.leader
        if leader is not None and leader in self.running:
            known = leader.blocks[: self._blocks_for(len(text.prompt))]
            computed = len(text.prompt) - 1  # its last token again, for what follows it
        else:
            whole = (len(text.tokens) - 1) // self.block_size
            known = self.pool.find(text.key_of(i, self.block_size) for i in range(whole))
            computed = len(known) * self.block_size
        for block in known:
            self.pool.hold(block)
        # One more where a block that is shared will be written to; and one for each that runs.
        needed = self._blocks_for(len(text.tokens) + 1) - len(known) + (leader is not None)
        if self.pool.free < needed + len(self.running) and self.running:
            self.pool.release(known)
            return False
        text.blocks, text.computed = known, computed
        if text.started is None:
            text.cached = computed
            self.prompt_tokens += len(text.prompt)
            self.cached_tokens += computed
        self.waiting.remove(text)
        insort(self.running, text, key=_order)
        return True

    def _claim(self, text: Text, end: int, copies: dict[int, int]) -> bool:
        """Hold blocks for all slots before `end`; those to be written to are the text's alone."""
        size = self.block_size
        while True:
            wanted = self._blocks_for(end)
            written = range(text.computed // size, min(len(text.blocks), wanted))
            shared = [i for i in written if self.pool.shared(text.blocks[i])]
            if self.pool.free >= wanted - len(text.blocks) + len(shared):
                break
            if self.running[-1] is text:
                return False  # those before it will end, and give back theirs
            self._preempt(self.running[-1])
        for i in shared:
            old, new = text.blocks[i], self.pool.take()
            copies[new] = copies.get(old, old)  # what is copied is what lay there before the step
            self.pool.release([old])
            text.blocks[i] = new
        text.blocks += [self.pool.take() for _ in range(wanted - len(text.blocks))]
        return True

    def _preempt(self, text: Text) -> None:
        self.running.remove(text)
        self._give_up_blocks(text)
        insort(self.waiting, text, key=_order)
        self.preemptions += 1

    def _give_up_blocks(self, text: Text) -> None:
        self.pool.release(text.blocks)
        text.blocks, text.computed, text.published, text.draft = [], 0, 0, None

    def _publish(self, text: Text) -> None:
        full = text.computed // self.block_size
        for i in range(text.published, full):
            self.pool.publish(text.blocks[i], text.key_of(i, self.block_size))
        text.published = full


def _piece(text: Text, count: int) -> Piece:
    tokens = text.tokens[text.computed : text.computed + count]
    asks = int(text.computed + count >= len(text.tokens))
    if count > len(tokens) and text.draft is not None:
        return Piece(text, text.computed, [*tokens, text.draft], 2)
    return Piece(text, text.computed, tokens, asks)


def _its_turn(text: Text) -> bool:
    """Say whether nobody else is about to read the same prompt for it."""
    leader = text.leader
    return leader is None or leader.finish_reason is not None or leader.computed >= len(text.prompt)
