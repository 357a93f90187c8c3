"""One text in the making: its tokens, how they are chosen, and the blocks that it holds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ds_serve.engine.blocks import ROOT, block_key

if TYPE_CHECKING:
    import numpy as np

    from ds_serve.engine.grammar import Matcher

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
MOST_ALTERNATIVES = 20  # log-probabilities of other tokens that a client may ask for


@dataclass(frozen=True)
class Rules:
    """How tokens are chosen, in the order in which it is applied.

    Attributes:
        max_tokens: most tokens to write; 0 reads the prompt alone.
        min_tokens: until so many are written, no end token is.
        repetition_penalty: logits of tokens seen before, prompt included, are divided by it where
            they are positive and multiplied where not (arXiv 1909.05858); 1 does nothing.
        presence_penalty: subtracted from logits of tokens written before.
        frequency_penalty: subtracted once for each time that a token was written.
        logit_bias: added to logits, by token id.
        temperature: 0 takes the likeliest token; else what the logits are divided by.
        top_k: draw among so many of the likeliest; 0 is all.
        top_p: draw among the likeliest that together have this probability.
        min_p: draw among those with at least this share of the likeliest one's probability.
        seed: of the draws; same seed, same text.
        logprobs: how many alternatives to tell with each token; `None` tells nothing.
        ends: token ids that end the text.
        draft: let the MTP module draft, where the engine has it.
        hidden: return the last hidden state of the prompt.
        experts: tell with each token which experts were chosen.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = field(default_factory=lambda: secrets.randbelow(2**63))
    logprobs: int | None = None
    ends: frozenset[int] = frozenset()
    draft: bool = True
    hidden: bool = False
    experts: bool = False

    @property
    def changes_logits(self) -> bool:
        """Whether logits depend on what was written before, or are changed at all."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.logit_bias)
            or self.min_tokens > 0
        )


@dataclass(frozen=True)
class Token:
    """One token as it was written.

    Attributes:
        id: the token.
        drafted: whether the MTP module had guessed it.
        logprob: the logarithm of its probability by the model alone; `None` if not asked for.
        alternatives: the likeliest tokens and their log-probabilities.
        experts: `[M, K]`: the experts that each layer chose when it was predicted; `None` if not
            asked for.
    """

    id: int
    drafted: bool = False
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    experts: np.ndarray | None = None


@dataclass(frozen=True)
class Update:
    """What a step brought to one sequence.

    Attributes:
        tokens: those that were written.
        finish_reason: `None` while more may come: "stop" at an end token, "length" at
            `max_tokens`, "cancelled", "timeout", or "error".
        error: what went wrong.
        hidden: `[D]` float32, if asked for.
    """

    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    hidden: np.ndarray | None = None


Listener = Callable[[Update], None]


@dataclass(eq=False)
class Text:
    """A text in the making.

    Attributes:
        prompt: token ids, at least one.
        rules: how to go on.
        listener: told of each step's tokens, on the engine's thread.
        priority: lower numbers go first.
        deadline: by `time.monotonic`; beyond it the sequence ends.
        leader: sequence with the same prompt that reads it for this one too.
        matcher: what restricts tokens to a grammar.
        tokens: prompt and what was written; the last is not read yet while it is written.
        computed: how many of them are in the cache.
        published: how many blocks may be found by others.
        blocks: those that hold them, in order.
        keys: of the full ones that may be found again.
        draft: guess for the token after the last one.
        cached: tokens of the prompt that were in the cache already.
        drafts: guesses that were tried.
        accepted: guesses that were right.
        arrived: by `time.monotonic`.
        started: when it was first part of a step.
        finish_reason: how it ended; `None` until then.
        cancelled: nobody wants it any more.
        counts: how often each token was written, where that matters.
    """

    prompt: Sequence[int]
    rules: Rules
    listener: Listener
    priority: int = 0
    deadline: float | None = None
    leader: Text | None = None
    matcher: Matcher | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    published: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    draft: int | None = None
    cached: int = 0
    drafts: int = 0
    accepted: int = 0
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    counts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with the prompt."""
        self.tokens = list(self.prompt)

    @property
    def written(self) -> int:
        """Tokens written so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def unread(self) -> int:
        """Tokens that the model has not read yet."""
        return len(self.tokens) - self.computed

    @property
    def can_draft(self) -> bool:
        """Whether a guess can be checked together with the token before it."""
        rules = self.rules
        return (
            rules.draft
            and not rules.changes_logits
            and self.matcher is None
            and rules.max_tokens - self.written >= 2
        )

    def write(self, token: int) -> None:
        """Add a token, and say how the text ends if it does."""
        self.tokens.append(token)
        if self.rules.changes_logits:
            self.counts[token] = self.counts.get(token, 0) + 1
        if self.matcher is not None:
            self.matcher.take(token)
        if token in self.rules.ends or (self.matcher is not None and self.matcher.done):
            self.finish_reason = "stop"
        elif self.written >= self.rules.max_tokens:
            self.finish_reason = "length"

    def key_of(self, index: int, block_size: int) -> bytes:
        """Return the key of block `index`, whose tokens are all known."""
        while len(self.keys) <= index:
            i = len(self.keys)
            parent = self.keys[-1] if self.keys else ROOT
            self.keys.append(block_key(parent, self.tokens[i * block_size : (i + 1) * block_size]))
        return self.keys[index]


def words_for(vocabulary: int) -> int:
    """Return how many words of 32 bits hold one for each token."""
    return -(-vocabulary // 32)
