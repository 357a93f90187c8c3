"""The compiled step: numbers of one plan in, tokens out.

A few graphs serve every step, whatever the number of texts and tokens in it: one for steps in which
each token is just the likeliest, three for one in which some are not. They are traced once, and
operations meet each kind of step once before the first request does.

Letters: T tokens read, B texts, M blocks a table has room for, A tokens asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from ds_attention import Pages
from ds_model import PagedCache, draft_pages, read_pages
from ds_serve.engine.sampling import (
    Choice,
    Chosen,
    choice_for,
    choose,
    is_plain,
    take_likeliest,
)
from ds_serve.engine.scheduler import FEW, Piece, Plan
from ds_serve.engine.text import Rules, Text, words_for

if TYPE_CHECKING:
    from ds_model import CausalLM

_PARTS = 10  # of a step's integers
_NONE = np.zeros([0], np.int32)


class Inputs(NamedTuple):
    """One step's numbers, in as few tensors as can be.

    Each costs ten microseconds in a loop of its own, and more between steps.

    Attributes:
        integers: `[10 + n]` int32: how many there are of each, then all of `_Step`'s and
            `Choice`'s, one after the other; those of a choice are left out where it is plain.
        reals: `[m]` float32: `Choice.numbers`, then `Choice.changes`; None where it is plain.
        telling: scalar bool of `Choice`, likewise.
    """

    integers: tf.Tensor
    reals: tf.Tensor | None = None
    telling: tf.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether each token is just the likeliest."""
        return self.reals is None


class _Step(NamedTuple):
    """The same, taken apart.

    Attributes:
        tokens: `[T]` int32.
        following: `[T]` int32: the token after each; -1 - a where that is the a-th chosen one.
            Empty without drafts.
        pages: whose they are.
        asked: `[A]` int32: after which of the T tokens the next is wanted.
        choice: how it is chosen.
    """

    tokens: tf.Tensor
    following: tf.Tensor
    pages: Pages
    asked: tf.Tensor
    choice: Choice


class Results(NamedTuple):
    """What a step gave.

    Attributes:
        chosen: the tokens and what is told of them, as arrays.
        drafts: `[A]` int32 array: a guess for the token after each; empty without drafts.
        hidden: `[A, D]` float32 tensor: normed hidden states of the tokens asked for.
        experts: `[M, T, K]` int32 array: chosen by each layer that has experts.
    """

    chosen: Chosen
    drafts: Any
    hidden: tf.Tensor
    experts: Any


class Steps:
    """Reads tokens of many texts at once.

    Args:
        model: the model.
        blocks: of the latent cache, whose memory is claimed here.
        block_size: tokens of a block.
        drafts: let the first MTP module guess.

    Attributes:
        cache: the latents.
        drafts: whether there are guesses.
        plain: the graph of a step in which each token is just the likeliest.

    Raises:
        ValueError: the model has no MTP module to draft with.
    """

    def __init__(self, model: CausalLM, blocks: int, block_size: int, drafts: bool = False) -> None:
        self._model = model
        self.drafts = drafts
        self.cache = PagedCache(model, blocks, block_size, drafts)
        row, flag = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.bool)
        real = tf.TensorSpec([None], tf.float32)
        hidden = tf.TensorSpec([None, model.config.hidden_size], model.compute_dtype)
        logits = tf.TensorSpec([None, model.config.vocab_size], tf.float32)
        self.plain = _Graph(self._all, row)
        self._read = _Graph(self._reading, row)
        self._choose = _Graph(self._choosing, logits, row, real, flag)
        if drafts:
            self._guess = _Graph(self._guessing, hidden, row, row)

    def run(self, plan: Plan) -> Results:
        """Do one step."""
        inputs = self.tensors(plan)
        chosen, drafts, hidden, experts = self.call(inputs)
        if inputs.plain:  # the rest is empty, and each array costs some microseconds
            told = chosen._replace(tokens=chosen.tokens.numpy())
        else:
            told = Chosen(*(tensor.numpy() for tensor in chosen))
        guesses = drafts.numpy() if self.drafts else _NONE
        return Results(told, guesses, hidden, experts.numpy())

    def call(self, inputs: Inputs) -> Results:
        """Run the compiled graphs, and nothing else."""
        integers, reals, telling = inputs
        if inputs.plain:
            return self.plain(integers)
        read = self._read(integers)
        chosen = self._choose(read.logits, integers, reals, telling)
        drafts = tf.zeros([0], tf.int32)
        if self.drafts:
            drafts = self._guess(read.all_hidden, chosen.tokens, integers)
        return Results(chosen, drafts, read.hidden, read.experts)

    def warm_up(self, step_tokens: int) -> Iterator[float]:
        """Do each kind of step once, so that no request waits for what happens the first time.

        Args:
            step_tokens: most tokens of a step.

        Yields:
            The share that is done.
        """
        size = self.cache.blocks * self.cache.block_size
        counts = sorted({1, 2, FEW + 1, min(64, size), min(step_tokens, size)} - {0})
        kinds = [
            Rules(1),
            Rules(1, temperature=0.7, top_p=0.9, top_k=40, min_p=0.01, logprobs=1),
            Rules(1, logit_bias={0: 1.0}, presence_penalty=0.1),
        ]
        total = len(counts) + len(kinds)
        for i, count in enumerate(counts):
            self.run(self._pretended([count], kinds[0]))
            yield (i + 1) / total
        for i, rules in enumerate(kinds):
            self.run(self._pretended([1] * min(2, self.cache.blocks), rules))
            yield (len(counts) + i + 1) / total

    def _pretended(self, counts: list[int], rules: Rules) -> Plan:
        """Return a plan for texts that do not exist; what it writes is never looked up."""
        pieces, block = [], 0
        for count in counts:
            text = Text([0] * count, rules, lambda _: None)
            used = -(-count // self.cache.block_size)
            text.blocks = list(range(block, block + used))
            block += used
            pieces.append(Piece(text, 0, [0] * count, 1))
        return Plan(pieces, [])

    def tensors(self, plan: Plan) -> Inputs:
        """Return a step's numbers."""
        pieces = plan.pieces
        tokens: list[int] = []
        slots: list[int] = []
        following: list[int] = []
        splits, asked = [0], []
        rows: list[tuple[Text, int]] = []
        widest = max(len(piece.text.blocks) for piece in pieces)
        tables = np.zeros([len(pieces), widest], np.int32)
        for i, (text, start, read, asks) in enumerate(pieces):
            end = start + len(read)
            tokens += read
            slots += range(start, end)
            splits.append(len(tokens))
            tables[i, : len(text.blocks)] = text.blocks
            if self.drafts:
                # Where the next token is known it follows; the last is about to be chosen.
                following += text.tokens[start + 1 : end + 1 - asks]
                following += range(-1 - len(rows), -1 - len(rows) - asks, -1)
            for ask in range(asks):
                asked.append(len(tokens) - asks + ask)
                rows.append((text, text.written + ask))
        parts = [tokens, following, slots, splits, tables, plan.copies, asked]
        if all(is_plain(text) for text, _ in rows):
            return Inputs(_flat([*parts, _NONE, _NONE, _NONE]))
        choice = choice_for(rows, self._model.config.vocab_size)
        reals = np.concatenate([choice.numbers.ravel(), choice.changes.ravel()])
        return Inputs(
            _flat([*parts, choice.seeds, choice.changed, choice.allowed]),
            tf.constant(reals),
            tf.constant(choice.telling),
        )

    def _apart(
        self,
        integers: tf.Tensor,
        reals: tf.Tensor | None = None,
        telling: tf.Tensor | None = None,
    ) -> _Step:
        parts = tf.split(integers[_PARTS:], integers[:_PARTS], num=_PARTS)
        tokens, following, slots, splits, tables, copies, asked, seeds, changed, allowed = parts
        tables = tf.reshape(tables, [tf.size(splits) - 1, -1])
        pages = Pages(slots, splits, tables, tf.reshape(copies, [-1, 2]))
        rows = tf.size(asked)
        reals = tf.zeros([0]) if reals is None else reals
        words = words_for(self._model.config.vocab_size)
        choice = Choice(
            tf.reshape(reals[: 4 * rows], [-1, 4]),
            tf.reshape(seeds, [-1, 2]),
            tf.reshape(changed, [-1, 2]),
            tf.reshape(reals[4 * rows :], [-1, 2]),
            tf.reshape(allowed, [-1, words]),
            telling,
        )
        return _Step(tokens, following, pages, asked, choice)

    def _all(self, integers: tf.Tensor) -> Results:
        """Do a whole step in which each token is the likeliest."""
        read = self._reading(integers)
        chosen = take_likeliest(read.logits)
        drafts = tf.zeros([0], tf.int32)
        if self.drafts:
            drafts = self._guessing(read.all_hidden, chosen.tokens, integers)
        return Results(chosen, drafts, read.hidden, read.experts)

    def _reading(self, integers: tf.Tensor) -> _Read:
        step = self._apart(integers)
        read = read_pages(self._model, step.tokens, step.pages, self.cache)
        hidden = tf.gather(read.hidden, step.asked)
        logits = self._model.head(hidden)
        return _Read(logits, tf.cast(hidden, tf.float32), read.experts, read.hidden)

    def _choosing(self, logits: tf.Tensor, *inputs: tf.Tensor) -> Chosen:
        return choose(logits, self._apart(*inputs).choice)

    def _guessing(self, hidden: tf.Tensor, chosen: tf.Tensor, integers: tf.Tensor) -> tf.Tensor:
        step = self._apart(integers)
        # One more, so that there is something to gather where nothing was asked for.
        new = tf.concat([chosen, [0]], axis=0)
        known = tf.gather(new, tf.maximum(-1 - step.following, 0))
        ahead = tf.where(step.following < 0, known, step.following)
        deeper = draft_pages(self._model, hidden, ahead, step.pages, self.cache)
        guesses = self._model.head(tf.gather(deeper, step.asked))
        return tf.argmax(guesses, axis=-1, output_type=tf.int32)


def _flat(parts: Sequence[Any]) -> tf.Tensor:
    """Return `[10 + n]` int32: how many numbers each part has, then all of them."""
    rows = [np.asarray(part, np.int32).ravel() for part in parts]
    return tf.constant(np.concatenate([[len(row) for row in rows], *rows], dtype=np.int32))


class _Read(NamedTuple):
    """What comes of reading.

    Attributes:
        logits: `[A, V]` float32.
        hidden: `[A, D]` float32.
        experts: `[M, T, K]` int32.
        all_hidden: `[T, D]` in the compute type.
    """

    logits: tf.Tensor
    hidden: tf.Tensor
    experts: tf.Tensor
    all_hidden: tf.Tensor


class _Graph:
    """A function traced once.

    Where it has no branch and no loop one thread starts its operations, one after the other: they
    are a chain, and each has threads of its own. That saves handing each from thread to thread.
    TensorFlow has a context for it and no public name.

    Attributes:
        executor: TensorFlow's name for what starts the operations; empty for its usual one.
    """

    def __init__(self, function: Callable[..., Any], *spec: Any) -> None:
        self._function = tf.function(function, autograph=False).get_concrete_function(*spec)
        branches = {"If", "StatelessIf", "While", "StatelessWhile"}
        found = {op.type for op in self._function.graph.get_operations()}
        gpu = bool(tf.config.list_logical_devices("GPU"))
        self.executor = "" if found & branches or gpu else "SINGLE_THREADED_EXECUTOR"

    def __call__(self, *inputs: Any) -> Any:
        if not self.executor:
            return self._function(*inputs)
        with context.function_executor_type(self.executor):
            return self._function(*inputs)
