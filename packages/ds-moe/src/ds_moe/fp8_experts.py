"""The experts of `run_experts` under an FP8 policy (arXiv 2412.19437, sections 3.3.1 and 3.3.3).

Tokens are rounded once and sent to their experts in 8 bits, and so are the gradients that come
back; both with scales that are powers of two. What SwiGLU is applied to is kept in 8 bits, and
SwiGLU done again in the backward pass. What experts give is combined in the type of the input.

Each expert's rows fill whole tiles of the weight's gradient, as DeepSeek's grouped products need:
rows are padded to a multiple of the tile with zeros.

Shape letters: T tokens, D hidden_size, I moe_intermediate_size, E experts, K experts a token,
A = T*K assignments, P padded rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from ds_precision import BlockScaled, Fp8Recipe


class _Places(NamedTuple):
    """Where assignments lie.

    Attributes:
        source: `[P]` int32: assignment of a row, 0 for padding.
        real: `[P]` float32: 0 for padding, 1 for the rest.
        row: `[A]` int32: row of an assignment.
        room: `[E]` int32: rows of each expert, multiples of the tile.
    """

    source: tf.Tensor
    real: tf.Tensor
    row: tf.Tensor
    room: tf.Tensor


def fp8_experts(
    x: tf.Tensor,
    indices: tf.Tensor,
    gates: tf.Tensor,
    gate_up: tf.Tensor,
    down: tf.Tensor,
    recipe: Fp8Recipe,
    name: str = "",
) -> tf.Tensor:
    """Sum the chosen experts' outputs, every product in 8 bits; arguments as for `run_experts`.

    Args:
        x: `[T, D]`, float32 or bfloat16.
        indices: `[T, K]` int32.
        gates: `[T, K]` float32.
        gate_up: `[E, D, 2I]`, gate first.
        down: `[E, I, D]`.
        recipe: how operands are rounded.
        name: what `watch_fp8` calls the operands.

    Returns:
        `[T, D]` in the type of `x`.
    """
    sent = dataclasses.replace(recipe, power_of_two=True)
    places = _places(indices, gate_up.shape[0], recipe.tile)
    per_token, dtype = indices.shape[1], x.dtype

    @tf.custom_gradient
    def run(
        x_TD: tf.Tensor, gates_TK: tf.Tensor, gate_up_EDJ: tf.Tensor, down_EID: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, ...]]]:
        def read(small: BlockScaled) -> tf.Tensor:
            return recipe.read(small, dtype)

        def called(part: str) -> str:
            return f"{name}/{part}" if name else ""

        small_x = sent.rows(x_TD, seen_as=called("up/input"))
        x_PD = _sent(small_x, places, per_token)
        up = recipe.blocks(gate_up_EDJ, called("up/weight"))
        dn = recipe.blocks(down_EID, called("down/weight"))
        h_PJ = tf.cast(_each(recipe.times, read(x_PD), read(up), places), tf.float32)
        kept_h = recipe.rows(h_PJ)
        small_act = recipe.rows(_swiglu(h_PJ)[0], seen_as=called("down/input"))
        o_PD = tf.cast(_each(recipe.times, read(small_act), read(dn), places), dtype)
        o_TKD = tf.reshape(tf.gather(o_PD, places.row), [-1, per_token, x_TD.shape[-1]])
        y_TD = tf.einsum("tk,tkd->td", tf.cast(gates_TK, tf.float32), tf.cast(o_TKD, tf.float32))

        def gradient(dy_TD: tf.Tensor) -> tuple[tf.Tensor, ...]:
            small_dy = sent.rows(dy_TD, recipe.gradients, called("down/gradient"))
            dy_PD = read(_sent(small_dy, places, per_token))
            above_PI = _each(recipe.times_transposed, dy_PD, read(dn), places)
            above_PI = tf.cast(above_PI, tf.float32)
            gate_P1 = tf.gather(tf.reshape(gates_TK, [-1, 1]), places.source)
            gate_P1 = tf.cast(gate_P1, tf.float32) * places.real[:, None]
            act_PI, slopes = _swiglu(tf.cast(read(kept_h), tf.float32))
            dgates_A = tf.gather(tf.reduce_sum(act_PI * above_PI, axis=-1), places.row)
            dh_PJ = tf.concat([above_PI * gate_P1 * slope for slope in slopes], axis=-1)

            tall_act = read(recipe.columns(act_PI * gate_P1))
            tall_dy = read(recipe.columns(dy_PD, recipe.gradients))
            ddown = _each(recipe.outer, tall_act, tall_dy, places, stacked=True)

            small_dh = recipe.rows(dh_PJ, recipe.gradients, called("up/gradient"))
            dx_PD = _each(recipe.times_transposed, read(small_dh), read(up), places)
            tall_x = read(recipe.columns(read(x_PD)))
            tall_dh = read(recipe.columns(dh_PJ, recipe.gradients))
            dup = _each(recipe.outer, tall_x, tall_dh, places, stacked=True)

            dx_AD = tf.cast(tf.gather(dx_PD, places.row), tf.float32)
            dx_TD = tf.reduce_sum(tf.reshape(dx_AD, [-1, per_token, x_TD.shape[-1]]), axis=1)
            dgates_TK = tf.reshape(dgates_A, tf.shape(gates_TK))
            return (
                tf.cast(dx_TD, dtype),
                tf.cast(dgates_TK, gates_TK.dtype),
                tf.cast(dup, gate_up_EDJ.dtype),
                tf.cast(ddown, down_EID.dtype),
            )

        return tf.cast(y_TD, dtype), gradient

    return tf.ensure_shape(run(x, gates, gate_up, down), x.shape)


def _places(indices: tf.Tensor, experts: int, tile: int) -> _Places:
    expert_A = tf.reshape(indices, [-1])
    counts_E = tf.math.unsorted_segment_sum(tf.ones_like(expert_A), expert_A, experts)
    room_E = (counts_E + tile - 1) // tile * tile
    order_A = tf.argsort(expert_A, stable=True)
    sorted_A = tf.gather(expert_A, order_A)
    # A row's place among its expert's, behind the rooms of the experts before.
    shift_E = tf.cumsum(room_E, exclusive=True) - tf.cumsum(counts_E, exclusive=True)
    row_A = tf.range(tf.size(expert_A)) + tf.gather(shift_E, sorted_A)
    rows = tf.reduce_sum(room_E)[None]
    return _Places(
        tf.scatter_nd(row_A[:, None], order_A, rows),
        tf.scatter_nd(row_A[:, None], tf.ones_like(row_A, tf.float32), rows),
        tf.gather(row_A, tf.math.invert_permutation(order_A)),
        room_E,
    )


def _sent(small: BlockScaled, places: _Places, per_token: int) -> BlockScaled:
    """Bring rounded tokens to their rows; padding gets scale 0, so it reads as zeros."""
    token_P = places.source // per_token
    high, wide = small.block
    scales = tf.gather(small.scales, token_P // high) * places.real[:, None]
    return BlockScaled(tf.gather(small.values, token_P), scales, (1, wide))


def _each(
    product: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    a: tf.Tensor,
    b: tf.Tensor,
    places: _Places,
    stacked: bool = False,
) -> tf.Tensor:
    """One product for each expert: of its rows with its weight, or of its rows in both."""
    experts = places.room.shape[0]
    parts = tf.split(a, places.room, num=experts)
    others: Any = tf.split(b, places.room, num=experts) if stacked else tf.unstack(b)
    found = [product(part, other) for part, other in zip(parts, others, strict=True)]
    return tf.stack(found) if stacked else tf.concat(found, axis=0)


def _swiglu(h: tf.Tensor) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
    """Return `silu(gate) * up` of `[P, 2I]`, and its slopes in gate and up."""
    gate, up = tf.split(h, 2, axis=-1)
    s = tf.sigmoid(gate)
    silu = gate * s
    return silu * up, (up * (s + silu * (1.0 - s)), silu)
