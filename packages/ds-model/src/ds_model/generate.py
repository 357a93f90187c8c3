"""Continuing a text: arguments in, tokens out; the graph that does it is in `rounds`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from ds_model.rounds import Rounds, State
from ds_model.sampling import Sampling

if TYPE_CHECKING:
    from ds_model.causal_lm import CausalLM


@dataclass(frozen=True)
class GenerationStats:
    """What one generation did, summed over rows.

    Attributes:
        new_tokens: tokens written.
        steps: passes of the model after the prompt.
        drafted: drafts that rows still writing were offered.
        accepted: drafts that the model agreed with.
    """

    new_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0


class Generator:
    """Compiled generation for one model; shapes of prompt and output do not retrace it."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.stats = GenerationStats()
        self._compiled: dict[int, tuple[tf.types.experimental.PolymorphicFunction, ...]] = {}

    def stream(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        draft: bool = False,
    ) -> Iterator[np.ndarray]:
        """Continue each row of a prompt, yielding new tokens as they come.

        Args:
            input_ids: `[B, S]` integer, S at least 1.
            attention_mask: `[B, S]`; 0 is padding, left or right.
            max_new_tokens: most tokens to add to a row.
            temperature: 0 takes the best token; above, tokens are drawn.
            top_p: nucleus to draw from, in (0, 1].
            seed: of the draws; a fresh one if `None`.
            eos_token_id: ends a row; config.json's if `None`, never if empty.
            draft: let the MTP modules draft; changes speed, not the text (greedily) or its
                distribution (drawn).

        Yields:
            `[B, n]` int32: the next tokens of every row. Rows that ended are filled with
            `pad_token_id`, or their end token where there is none.

        Raises:
            ValueError: an argument is out of range; names it.
        """
        ids = np.asarray(input_ids, np.int32)
        self._check(ids, attention_mask, max_new_tokens, temperature, top_p, draft)
        config = self.model.config
        eos = config.eos_token_ids if eos_token_id is None else tuple(np.ravel(eos_token_id))
        first_end = int(eos[0]) if eos else 0
        filler = first_end if config.pad_token_id is None else config.pad_token_id
        seed = secrets.randbelow(2**31) if seed is None else seed
        sampling = Sampling(
            tf.constant(temperature, tf.float32),
            tf.constant(top_p, tf.float32),
            tf.constant(seed, tf.int32),
        )
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        drafts = len(self.model.mtp) if draft else 0
        start, advance = self._functions(drafts)
        limit = tf.constant(max_new_tokens)
        ends = tf.constant([int(token) for token in eos], tf.int32)
        state = start(tf.constant(ids), tf.constant(mask != 0), limit, ends, sampling)
        shown = 0
        while True:
            count, done = state.count.numpy(), state.done.numpy()
            self._take_stats(state)
            ready = int(count.max() if done.all() else count[~done].min())
            if ready > shown:
                chunk = state.out[:, shown:ready].numpy()
                ended = np.arange(shown, ready)[None] >= count[:, None]
                yield np.where(ended, np.int32(filler), chunk)
                shown = ready
            if done.all():
                return
            state = advance(state, limit, ends, sampling)

    def _check(
        self,
        ids: np.ndarray,
        mask: np.ndarray | None,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        draft: bool,
    ) -> None:
        if ids.ndim != 2 or not ids.size:
            raise ValueError(f"input_ids has shape {ids.shape}; expected [batch, sequence >= 1]")
        vocabulary = self.model.config.vocab_size
        if ids.min() < 0 or ids.max() >= vocabulary:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"input_ids holds {wrong}; tokens run from 0 to {vocabulary - 1}")
        if mask is not None and np.shape(mask) != ids.shape:
            raise ValueError(
                f"attention_mask has shape {np.shape(mask)}; input_ids has {ids.shape}"
            )
        if mask is not None and not np.asarray(mask).any(axis=1).all():
            raise ValueError("attention_mask has a row without any token; each needs at least one")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; it must be 0 or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
        if draft and not self.model.mtp:
            raise ValueError("draft is True; this model has no MTP module to draft with")

    def _take_stats(self, state: State) -> None:
        self.stats = GenerationStats(
            int(state.count.numpy().sum()),
            int(state.rounds),
            int(state.drafted),
            int(state.accepted),
        )

    def _functions(self, drafts: int) -> tuple[tf.types.experimental.PolymorphicFunction, ...]:
        if drafts not in self._compiled:
            rounds = Rounds(self.model, drafts)
            number, tokens = tf.TensorSpec([], tf.int32), tf.TensorSpec([None, None], tf.int32)
            mask = tf.TensorSpec([None, None], tf.bool)
            real = tf.TensorSpec([], tf.float32)
            rules = (number, tf.TensorSpec([None], tf.int32), Sampling(real, real, number))
            self._compiled[drafts] = (
                tf.function(rounds.start, [tokens, mask, *rules], autograph=False),
                tf.function(rounds.advance, [rounds.state_spec(), *rules], autograph=False),
            )
        return self._compiled[drafts]
