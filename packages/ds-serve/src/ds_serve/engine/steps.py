"""The compiled step: numbers of one plan in, tokens out.

One graph serves every step, whatever the number of texts and tokens in it; it is traced once, and
operations meet each kind of step once before the first request does.

Letters: T tokens read, B texts, M blocks a table has room for, A tokens asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tensorflow as tf

from ds_attention import Pages
from ds_model import PagedCache, draft_pages, read_pages
from ds_serve.engine.sampling import Choice, Chosen, choice_for, choose
from ds_serve.engine.scheduler import FEW, Piece, Plan
from ds_serve.engine.text import Rules, Text

if TYPE_CHECKING:
    from ds_model import CausalLM


class Inputs(NamedTuple):
    """One step's numbers.

    Attributes:
        tokens: `[T]` int32.
        following: `[T]` int32: the token after each; -1 - a where that is the a-th chosen one.
            Empty without drafts.
        pages: whose they are.
        asked: `[A]` int32: after which of the T tokens the next is wanted.
        choice: how it is chosen.
    """

    tokens: np.ndarray | tf.Tensor
    following: np.ndarray | tf.Tensor
    pages: Pages
    asked: np.ndarray | tf.Tensor
    choice: Choice


class Results(NamedTuple):
    """What a step gave, as arrays.

    Attributes:
        chosen: the tokens and what is told of them.
        drafts: `[A]` int32: a guess for the token after each; empty without drafts.
        hidden: `[A, D]`: normed hidden states of the tokens asked for.
        experts: `[M, T, K]` int32: chosen by each layer that has experts.
    """

    chosen: Chosen
    drafts: np.ndarray
    hidden: np.ndarray
    experts: np.ndarray


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

    Raises:
        ValueError: the model has no MTP module to draft with.
    """

    def __init__(self, model: CausalLM, blocks: int, block_size: int, drafts: bool = False) -> None:
        self._model = model
        self.drafts = drafts
        self.cache = PagedCache(model, blocks, block_size, drafts)
        self._step = tf.function(self._graph, autograph=False).get_concrete_function(*self._spec())

    def run(self, plan: Plan) -> Results:
        """Do one step."""
        found = self.call(self.tensors(plan))
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), found)

    def tensors(self, plan: Plan) -> Inputs:
        """Return a step's numbers as tensors."""
        return tf.nest.map_structure(tf.constant, self._inputs(plan))

    def call(self, inputs: Inputs) -> Results:
        """Run the compiled step, and nothing else."""
        return self._step(*inputs)

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

    def _spec(self) -> Inputs:
        row = tf.TensorSpec([None], tf.int32)
        pair, table = tf.TensorSpec([None, 2], tf.int32), tf.TensorSpec([None, None], tf.int32)
        choice = Choice.spec(self._model.config.vocab_size)
        return Inputs(row, row, Pages(row, row, table, pair), row, choice)

    def _inputs(self, plan: Plan) -> Inputs:
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
        return Inputs(
            np.array(tokens, np.int32),
            np.array(following, np.int32),
            Pages(
                np.array(slots, np.int32),
                np.array(splits, np.int32),
                tables,
                np.array(plan.copies, np.int32).reshape(-1, 2),
            ),
            np.array(asked, np.int32),
            choice_for(rows, self._model.config.vocab_size),
        )

    def _graph(
        self,
        tokens: tf.Tensor,
        following: tf.Tensor,
        pages: Pages,
        asked: tf.Tensor,
        choice: Choice,
    ) -> Results:
        model = self._model
        read = read_pages(model, tokens, pages, self.cache)
        hidden = tf.gather(read.hidden, asked)
        chosen = choose(model.head(hidden), choice)
        drafts = tf.zeros([0], tf.int32)
        if self.drafts:
            # One more, so that there is something to gather where nothing was asked for.
            new = tf.concat([chosen.tokens, [0]], axis=0)
            known = tf.gather(new, tf.maximum(-1 - following, 0))
            ahead = tf.where(following < 0, known, following)
            deeper = draft_pages(model, read.hidden, ahead, pages, self.cache)
            guesses = model.head(tf.gather(deeper, asked))
            drafts = tf.argmax(guesses, axis=-1, output_type=tf.int32)
        return Results(chosen, drafts, tf.cast(hidden, tf.float32), read.experts)
