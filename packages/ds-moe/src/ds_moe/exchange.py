"""Experts that lie on several ranks: tokens go to them and come back, and none is dropped.

Expert parallelism (arXiv 2412.19437, section 3.2.2). A token goes once to each rank that holds
experts of its choice, with their numbers and gates; what they give is summed there, and comes back
as one row a rank. With group-limited routing, and groups that lie on one rank each, a token goes to
at most `topk_group` ranks.

Under an FP8 policy tokens go to experts in 8 bits, and so do the gradients that come back to
experts; what experts give, and its counterpart backwards, returns as it is (section 3.3.3). Scales
are powers of two, as they are for experts that are here: so the numbers are the same as with one
rank.

How rows travel is another's business: an `ExpertRanks` carries them. Row counts are data, and what
carries rows wants equal shapes: so the ranks first tell each other how many they have, and pad to a
power of two above the most that any sends to another.

Shape letters: T tokens of this rank, D hidden_size, K experts a token, R ranks, C rows from one
rank to another with padding, A assignments to the experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import tensorflow as tf

from ds_precision import (
    E4M3,
    BlockScaled,
    Format,
    Fp8Recipe,
    dequantize_blocks,
    pack_bits,
    unpack_bits,
)


class ExpertRanks(Protocol):
    """The ranks that a layer's experts are dealt out to, in equal shares, in order.

    Attributes:
        size: ranks, R.
        index: this one.
    """

    size: int
    index: int

    def all_gather(self, x: tf.Tensor) -> tf.Tensor:
        """Return all ranks' `x [n, ...]` one below the other."""

    def all_to_all(self, x: tf.Tensor, power: tf.Tensor) -> tf.Tensor:
        """Give row i of `x [R, ...]` to rank i, with a gradient.

        Args:
            x: the same shape on all ranks.
            power: a scalar, the same on all ranks, that tells one shape from another.
        """


# Runs local experts on rows, each row through one expert: (x [A, D], expert [A], gate [A]).
Run = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
# Carries rows `[R, C, ...]`, and tells their shape by a power: see `ExpertRanks.all_to_all`.
Exchange = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def run_on_ranks(
    x: tf.Tensor,
    indices: tf.Tensor,
    gates: tf.Tensor,
    share: int,
    ranks: ExpertRanks,
    run: Run,
    recipe: Fp8Recipe | None = None,
) -> tf.Tensor:
    """Sum the chosen experts' outputs, wherever the experts lie.

    Args:
        x: `[T, D]`, floating: this rank's tokens.
        indices: `[T, K]` int32: experts, counted over all ranks.
        gates: `[T, K]` float32.
        share: experts of one rank.
        ranks: who holds them.
        run: `gate * FFN_expert(x)` of rows for experts of this rank, `[A, D]`.
        recipe: how rows are rounded on their way to experts; they go as they are if `None`.

    Returns:
        `[T, D]` in the type of `x`.
    """
    tokens = tf.shape(x)[0]
    owner_TK = indices // share
    goes_TR = tf.reduce_any(owner_TK[..., None] == tf.range(ranks.size), axis=1)
    power = _power_of_most(goes_TR, ranks)
    capacity = tf.bitwise.left_shift(1, power)
    token_RC = _queues(goes_TR, capacity)

    sent = tf.gather(x, tf.maximum(token_RC, 0))
    choice = _choices(indices, gates, token_RC, share)
    dispatch: Exchange = ranks.all_to_all
    combine: Exchange = ranks.all_to_all
    if recipe is not None and recipe.scaling == "block":
        dispatch, combine = _in_eight_bits(ranks, replace(recipe, power_of_two=True))
    received = dispatch(sent, power)
    choice = ranks.all_to_all(choice, power)
    returned = combine(_run_received(received, choice, run), power)

    # Rows that hold no token have a negative number, and are left out of the sum.
    rows = tf.reshape(returned, [-1, x.shape[-1]])
    y = tf.math.unsorted_segment_sum(rows, tf.reshape(token_RC, [-1]), tokens)
    return tf.ensure_shape(y, x.shape)


def _in_eight_bits(ranks: ExpertRanks, recipe: Fp8Recipe) -> tuple[Exchange, Exchange]:
    """Return the two exchanges, of which one travels in 8 bits forwards, the other backwards."""

    def small(x: tf.Tensor, power: tf.Tensor, fmt: Format) -> tf.Tensor:
        rounded = recipe.rows(x, fmt)
        values, width = pack_bits(rounded.values), x.shape[-1]
        scales = tf.bitcast(tf.cast(rounded.scales, tf.float32), tf.int32)
        there = ranks.all_to_all(tf.concat([values, scales], axis=-1), power)
        values, scales = tf.split(there, [values.shape[-1], scales.shape[-1]], axis=-1)
        read = BlockScaled(
            unpack_bits(values, width, fmt), tf.bitcast(scales, tf.float32), rounded.block
        )
        return tf.ensure_shape(dequantize_blocks(read, x.dtype), x.shape)

    def dispatch(x: tf.Tensor, power: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def exchange(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            return small(x, power, E4M3), lambda dy: ranks.all_to_all(dy, power)

        return exchange(x)

    def combine(y: tf.Tensor, power: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def exchange(y: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            return ranks.all_to_all(y, power), lambda dy: small(dy, power, recipe.gradients)

        return exchange(y)

    return dispatch, combine


def _power_of_most(goes_TR: tf.Tensor, ranks: ExpertRanks) -> tf.Tensor:
    """Return the binary logarithm of the rows to make room for, the same on all ranks."""
    counts = tf.reduce_sum(tf.cast(goes_TR, tf.int32), axis=0)
    most = tf.reduce_max(ranks.all_gather(counts))
    powers = tf.bitwise.left_shift(1, tf.range(31))
    return tf.reduce_sum(tf.cast(powers < most, tf.int32))


def _queues(goes_TR: tf.Tensor, capacity: tf.Tensor) -> tf.Tensor:
    """Return `[R, C]` int32: which token stands where in the queue to each rank, -1 for none."""
    goes_RT = tf.transpose(goes_TR)
    place_RT = tf.cumsum(tf.cast(goes_RT, tf.int32), axis=1) - 1
    at = tf.cast(tf.where(goes_RT), tf.int32)
    rank, token = at[:, 0], at[:, 1]
    row = rank * capacity + tf.gather_nd(place_RT, at)
    shape = [goes_RT.shape[0], capacity]
    filled = tf.scatter_nd(row[:, None], token + 1, [shape[0] * capacity])
    return tf.reshape(filled, shape) - 1


def _choices(indices: tf.Tensor, gates: tf.Tensor, token_RC: tf.Tensor, share: int) -> tf.Tensor:
    """Return `[R, C, 2K]` float32: each row's experts on its rank, -1 for others', then gates.

    Experts ride as floats, which hold such numbers exactly, so that one exchange takes both.
    """
    at = tf.maximum(token_RC, 0)
    expert_RCK = tf.gather(indices, at)
    here = expert_RCK // share == tf.range(token_RC.shape[0])[:, None, None]
    here &= (token_RC >= 0)[..., None]
    local = tf.where(here, expert_RCK % share, -1)
    gate_RCK = tf.gather(tf.cast(gates, tf.float32), at)
    return tf.concat([tf.cast(local, tf.float32), gate_RCK], axis=-1)


def _run_received(x_RCD: tf.Tensor, choice: tf.Tensor, run: Run) -> tf.Tensor:
    """Run the rows that came through the experts here, and sum what belongs to one row."""
    width = x_RCD.shape[-1]
    rows = tf.reshape(x_RCD, [-1, width])
    expert, gate = tf.split(tf.reshape(choice, [-1, choice.shape[-1]]), 2, axis=-1)
    expert = tf.cast(expert, tf.int32)
    at_A2 = tf.where(expert >= 0)
    row_A = tf.cast(at_A2[:, 0], tf.int32)
    y_AD = run(tf.gather(rows, row_A), tf.gather_nd(expert, at_A2), tf.gather_nd(gate, at_A2))
    y = tf.math.unsorted_segment_sum(y_AD, row_A, tf.shape(rows)[0])
    return tf.reshape(y, tf.shape(x_RCD))
