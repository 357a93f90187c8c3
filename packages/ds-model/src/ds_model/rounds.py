"""The graph's side of generation: prefill, then rounds of draft and verify.

A round runs the model on the pending token and the drafts behind it, keeps the drafts that the
model agrees with (see `sampling.verify`), adds one token of the model's own, and lets the MTP
modules draft anew (arXiv 2412.19437, section 5.4.3). With no drafts a round is plain decoding,
so there is one loop for both.

Slots: every row has `window` unused slots in front, then its prompt, then what is generated.
Shape letters: B batch, S prompt, L slots, K drafts, W window of MTP inputs, D hidden_size,
V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import tensorflow as tf

from ds_attention import CausalMask, LatentCache
from ds_model.block import Window
from ds_model.sampling import Sampling, choose, guess, verify

if TYPE_CHECKING:
    from ds_model.causal_lm import CausalLM

ROUNDS_PER_CALL = 16


class State(NamedTuple):
    """What lives from round to round.

    Attributes:
        tokens: `[B, L]` int32 by slot, for the MTP modules; `[B, 0]` without drafts.
        pending: `[B]` int32: the newest token, which the model has not read yet.
        valid: `[B, L]` bool: slots that hold a real token, ahead of use included.
        slot: `[B]` int32: where the pending token lies; all before it is in the cache.
        position: `[B]` int32: its position.
        caches: one `LatentCache` a block, then one an MTP module.
        hidden: `[B, W, D]`: the model's normed hidden states of the W slots before `slot`.
        drafts: `[B, K]` int32, guesses for the slots after the pending one.
        draft_p: `[B, K, V]`: what they were drawn from; without meaning at temperature 0.
        out: `[B, max_new + K + 1]` int32.
        count: `[B]` int32: how much of `out` is text.
        done: `[B]` bool.
        rounds: scalar int32.
        accepted: scalar int32.
        drafted: scalar int32.
    """

    tokens: tf.Tensor
    pending: tf.Tensor
    valid: tf.Tensor
    slot: tf.Tensor
    position: tf.Tensor
    caches: tuple[LatentCache, ...]
    hidden: tf.Tensor
    drafts: tf.Tensor
    draft_p: tf.Tensor
    out: tf.Tensor
    count: tf.Tensor
    done: tf.Tensor
    rounds: tf.Tensor
    accepted: tf.Tensor
    drafted: tf.Tensor


class Rounds:
    """Prefill and rounds with a fixed number of drafts."""

    def __init__(self, model: CausalLM, drafts: int) -> None:
        self.model = model
        self.drafts = drafts
        # Module k's entry for the newest positions rests on drafts; what a round accepts may
        # belie them, so up to 2K entries are written again.
        self.window = 2 * drafts

    def state_spec(self) -> State:
        """Return the types and known sizes of a `State`, so that `advance` is traced once."""
        model, drafts = self.model, self.drafts
        c, policy = model.config, model.compute_dtype
        scalar, row = tf.TensorSpec([], tf.int32), tf.TensorSpec([None], tf.int32)
        buffer = tf.TensorSpec([None, None], tf.int32)
        cache = LatentCache(tf.TensorSpec([None, None, c.attention.cache_width], policy))
        return State(
            tokens=buffer if drafts else tf.TensorSpec([None, 0], tf.int32),
            pending=row,
            valid=tf.TensorSpec([None, None], tf.bool),
            slot=row,
            position=row,
            caches=(cache,) * (len(model.blocks) + drafts),
            hidden=tf.TensorSpec([None, self.window, c.hidden_size], policy),
            drafts=tf.TensorSpec([None, drafts], tf.int32),
            draft_p=tf.TensorSpec([None, drafts, c.vocab_size], tf.float32),
            out=buffer,
            count=row,
            done=tf.TensorSpec([None], tf.bool),
            rounds=scalar,
            accepted=scalar,
            drafted=scalar,
        )

    def start(
        self,
        ids_BS: tf.Tensor,
        mask_BS: tf.Tensor,
        max_new_tokens: tf.Tensor,
        ends: tf.Tensor,
        sampling: Sampling,
    ) -> State:
        """Read the prompt and choose the first token."""
        model, window = self.model, self.window
        front = [[0, 0], [window, 0]]
        tokens, valid = tf.pad(ids_BS, front), tf.pad(mask_BS, front)
        batch, length = tf.shape(tokens)[0], tf.shape(tokens)[1]
        slots = tf.range(length)[None]
        ordinal = tf.cumsum(tf.cast(valid, tf.int32), axis=1)
        place = Window(tf.maximum(ordinal - 1, 0), CausalMask(slots, length, valid), valid, slots)
        h = model.embed_tokens(tokens)
        caches = []
        for block in model.blocks:
            cache = self._cache(batch, length, h.dtype)
            h, cache = block.step(h, place, cache, absorb=False)
            caches.append(cache)
        h = model.norm(h)
        last = tf.reduce_max(tf.where(valid, slots, -1), axis=1)
        logits = model.head(tf.gather(h, last, batch_dims=1))
        first = choose(logits, sampling, tf.constant(0))
        slot = last + 1
        room = max_new_tokens + self.drafts + 1
        tokens = _put(tf.pad(tokens, [[0, 0], [0, room]]), slot[:, None], first[:, None])
        deeper = h
        for k, module in enumerate(model.mtp[: self.drafts], start=1):
            cache = self._cache(batch, length, h.dtype)
            ahead = model.embed_tokens(tokens[:, k : k + length])
            deeper, cache = module.step(deeper, ahead, place, cache, absorb=False)
            caches.append(cache)
        grown = tuple(
            LatentCache(tf.pad(cache.entries, [[0, 0], [0, room], [0, 0]])) for cache in caches
        )
        # Padding behind a row's last token is overwritten, so only what precedes it counts.
        valid = tf.pad(valid, [[0, 0], [0, room]])
        valid |= tf.range(length + room)[None] >= slot[:, None]
        done = tf.reduce_any(first[:, None] == ends[None], axis=1) | (max_new_tokens <= 1)
        state = State(
            tokens=tokens if self.drafts else tokens[:, :0],
            pending=first,
            valid=valid,
            slot=slot,
            position=ordinal[:, -1],
            caches=grown,
            hidden=_window_before(h, slot, window),
            drafts=tf.zeros([batch, self.drafts], tf.int32),
            draft_p=tf.zeros([batch, self.drafts, model.config.vocab_size]),
            out=tf.pad(first[:, None], [[0, 0], [0, room - 1]]),
            count=tf.ones([batch], tf.int32),
            done=done,
            rounds=tf.constant(0),
            accepted=tf.constant(0),
            drafted=tf.constant(0),
        )
        return self._draft(state, sampling) if self.drafts else state

    def advance(
        self, state: State, max_new_tokens: tf.Tensor, ends: tf.Tensor, sampling: Sampling
    ) -> State:
        """Do up to `ROUNDS_PER_CALL` rounds, fewer when every row is done."""
        until = state.rounds + ROUNDS_PER_CALL

        def going(state: State) -> tf.Tensor:
            return (state.rounds < until) & ~tf.reduce_all(state.done)

        def body(state: State) -> tuple[State]:
            return (self._round(state, max_new_tokens, ends, sampling),)

        return tf.while_loop(going, body, (state,))[0]

    def _round(
        self, state: State, max_new_tokens: tf.Tensor, ends: tf.Tensor, sampling: Sampling
    ) -> State:
        """Verify the drafts, add one token, draft anew. Rows that are done stand still."""
        model, width = self.model, self.drafts + 1
        steps = tf.range(width)[None]
        slots = state.slot[:, None] + steps
        place = Window(
            state.position[:, None] + steps,
            CausalMask(slots, tf.shape(state.valid)[1], state.valid),
            None,
            slots,
        )
        read = state.pending[:, None]
        if self.drafts:
            read = tf.concat([read, state.drafts], axis=1)
        h = model.embed_tokens(read)
        caches = list(state.caches)
        for i, block in enumerate(model.blocks):
            h, caches[i] = block.step(h, place, caches[i], absorb=True)
        h = model.norm(h)
        # Three draws a round, told apart: the model's own, the acceptances, the drafts.
        stream = (state.rounds + 1) * (2 + self.drafts)
        new, accepted = verify(model.head(h), state.draft_p, state.drafts, sampling, stream)

        ended = tf.reduce_any(new[..., None] == ends, axis=-1) & (steps <= accepted[:, None])
        until_end = tf.reduce_min(tf.where(ended, steps, width), axis=1)
        left = max_new_tokens - state.count
        added = tf.minimum(tf.minimum(accepted, until_end) + 1, left)
        added = tf.where(state.done, 0, added)
        writing = tf.cast(~state.done, tf.int32)
        if self.drafts:
            last = tf.gather(new, tf.maximum(added - 1, 0), batch_dims=1)
            state = state._replace(
                tokens=_put(state.tokens, slots + 1, new),
                hidden=_window_before(
                    tf.concat([state.hidden, h], axis=1), self.window + added, self.window
                ),
            )
        else:
            last = new[:, 0]
        state = state._replace(
            pending=tf.where(state.done, state.pending, last),
            slot=state.slot + added,
            position=state.position + added,
            caches=tuple(caches),
            out=_put(state.out, state.count[:, None] + steps, new),
            count=state.count + added,
            done=state.done | (until_end < added) | (added >= left),
            rounds=state.rounds + 1,
            accepted=state.accepted + tf.reduce_sum(writing * tf.minimum(accepted, added)),
            drafted=state.drafted + self.drafts * tf.reduce_sum(writing),
        )
        return self._draft(state, sampling) if self.drafts else state

    def _draft(self, state: State, sampling: Sampling) -> State:
        """Let module k guess the token k places after the pending one."""
        model = self.model
        back = tf.range(-self.window, 0)[None]
        slots = state.slot[:, None] + back
        place = Window(
            tf.maximum(state.position[:, None] + back, 0),
            CausalMask(slots, tf.shape(state.valid)[1], state.valid),
            None,
            slots,
        )
        h, tokens, caches = state.hidden, state.tokens, list(state.caches)
        drafts, distributions = [], []
        stream = (state.rounds + 1) * (2 + self.drafts)
        for k, module in enumerate(model.mtp[: self.drafts], start=1):
            ahead = model.embed_tokens(tf.gather(tokens, slots + k, batch_dims=1))
            i = len(model.blocks) + k - 1
            h, caches[i] = module.step(h, ahead, place, caches[i], absorb=True)
            unused = state.draft_p[:, k - 1]
            draft, q = guess(model.head(h[:, -1]), unused, sampling, stream + 1 + k)
            tokens = _put(tokens, (state.slot + k)[:, None], draft[:, None])
            drafts.append(draft)
            distributions.append(q)
        return state._replace(
            tokens=tokens,
            caches=tuple(caches),
            drafts=tf.stack(drafts, axis=1),
            draft_p=tf.stack(distributions, axis=1),
        )

    def _cache(self, batch: tf.Tensor, length: tf.Tensor, dtype: tf.DType) -> LatentCache:
        return LatentCache.allocate(self.model.config.attention, batch, length, dtype)


def _put(buffer: tf.Tensor, columns: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Return `buffer [B, N]` with `values [B, n]` at `columns [B, n]`."""
    rows = tf.broadcast_to(tf.range(tf.shape(buffer)[0])[:, None], tf.shape(columns))
    return tf.tensor_scatter_nd_update(buffer, tf.stack([rows, columns], axis=-1), values)


def _window_before(h: tf.Tensor, end: tf.Tensor, width: int) -> tf.Tensor:
    """Return the `width` steps of `h [B, S, D]` that precede `end [B]`."""
    return tf.gather(h, end[:, None] + tf.range(-width, 0)[None], batch_dims=1)
