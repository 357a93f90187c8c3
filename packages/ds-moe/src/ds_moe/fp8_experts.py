"""The experts of `run_experts` under an FP8 policy (arXiv 2412.19437, sections 3.3.1 and 3.3.3).

Tokens are rounded once and sent to their experts in 8 bits, and so are the gradients that come
back; both with scales that are powers of two. What SwiGLU is applied to is kept in 8 bits, and
SwiGLU done again in the backward pass. What experts give is combined in the type of the input.

Each expert's rows fill whole tiles of the weight's gradient, as DeepSeek's grouped products need:
rows are padded to a multiple of the tile with zeros. Two ways to multiply them, with equal results:
`_ByExpert`, one product an expert, and `_ByTile`, one product a tile, whose shapes are all known
beforehand: this is what runs under `jit_compile=True`.

Shape letters: T tokens, D hidden_size, I moe_intermediate_size, E experts, K experts a token,
A = T*K assignments, P padded rows, N tiles of rows, M rows of a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from ds_precision import BlockScaled, Fp8Recipe, traced_for_xla


class _Places(NamedTuple):
    """Where assignments lie.

    Attributes:
        source: `[P]` int32: assignment of a row, 0 for padding.
        real: `[P]` float32: 0 for padding, 1 for the rest.
        row: `[A]` int32: row of an assignment.
        room: `[E]` int32: rows of each expert, multiples of the tile. Expert by expert they lie
            side by side; what is behind the last is padding.
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

    Under XLA the number of tokens must be static.

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
    rows = (_ByTile if traced_for_xla() else _ByExpert)(recipe, dtype, places)

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
        h_PJ = tf.cast(rows.times(x_PD, up), tf.float32)
        kept_h = recipe.rows(h_PJ)
        small_act = recipe.rows(_swiglu(h_PJ)[0], seen_as=called("down/input"))
        o_PD = tf.cast(rows.times(small_act, dn), dtype)
        o_TKD = tf.reshape(tf.gather(o_PD, places.row), [-1, per_token, x_TD.shape[-1]])
        y_TD = tf.einsum("tk,tkd->td", tf.cast(gates_TK, tf.float32), tf.cast(o_TKD, tf.float32))

        def gradient(dy_TD: tf.Tensor) -> tuple[tf.Tensor, ...]:
            small_dy = sent.rows(dy_TD, recipe.gradients, called("down/gradient"))
            dy_PD = _sent(small_dy, places, per_token)
            above_PI = tf.cast(rows.times(dy_PD, dn, transpose=True), tf.float32)
            gate_P1 = tf.gather(tf.reshape(gates_TK, [-1, 1]), places.source)
            gate_P1 = tf.cast(gate_P1, tf.float32) * places.real[:, None]
            act_PI, slopes = _swiglu(tf.cast(read(kept_h), tf.float32))
            dgates_A = tf.gather(tf.reduce_sum(act_PI * above_PI, axis=-1), places.row)
            dh_PJ = tf.concat([above_PI * gate_P1 * slope for slope in slopes], axis=-1)

            tall_act = recipe.columns(act_PI * gate_P1)
            tall_dy = recipe.columns(read(dy_PD), recipe.gradients)
            ddown = rows.outer(tall_act, tall_dy)

            small_dh = recipe.rows(dh_PJ, recipe.gradients, called("up/gradient"))
            dx_PD = rows.times(small_dh, up, transpose=True)
            tall_x = recipe.columns(read(x_PD))
            tall_dh = recipe.columns(dh_PJ, recipe.gradients)
            dup = rows.outer(tall_x, tall_dh)

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
    if traced_for_xla():  # a static number: the most that any routing can need
        assignments = expert_A.shape[0]
        rows = (assignments + min(experts, assignments) * (tile - 1)) // tile * tile
    else:
        rows = tf.reduce_sum(room_E)
    return _Places(
        tf.scatter_nd(row_A[:, None], order_A, [rows]),
        tf.scatter_nd(row_A[:, None], tf.ones_like(row_A, tf.float32), [rows]),
        tf.gather(row_A, tf.math.invert_permutation(order_A)),
        room_E,
    )


def _sent(small: BlockScaled, places: _Places, per_token: int) -> BlockScaled:
    """Bring rounded tokens to their rows; padding gets scale 0, so it reads as zeros."""
    token_P = places.source // per_token
    high, wide = small.block
    scales = tf.gather(small.scales, token_P // high) * places.real[:, None]
    return BlockScaled(tf.gather(small.values, token_P), scales, (1, wide))


class _ByExpert(NamedTuple):
    """Products of each expert's rows. Row counts are data, so XLA can't compile them."""

    recipe: Fp8Recipe
    dtype: tf.DType
    places: _Places

    def times(self, a: BlockScaled, weight: BlockScaled, transpose: bool = False) -> tf.Tensor:
        """Multiply rows `[P, K]` by their expert's weight `[E, K, N]`, or `[E, N, K]` turned."""
        product = self.recipe.times_transposed if transpose else self.recipe.times
        weights = tf.unstack(self.recipe.read(weight, self.dtype))
        found = [product(*pair) for pair in zip(self._parts(a), weights, strict=True)]
        return tf.concat(found, axis=0)

    def outer(self, a: BlockScaled, b: BlockScaled) -> tf.Tensor:
        """Return each expert's `a^T b` of `[P, K]` and `[P, N]`: `[E, K, N]` float32."""
        pairs = zip(self._parts(a), self._parts(b), strict=True)
        return tf.stack([self.recipe.outer(*pair) for pair in pairs])

    def _parts(self, small: BlockScaled) -> list[tf.Tensor]:
        room_E = self.places.room
        return tf.split(self.recipe.read(small, self.dtype), room_E, num=room_E.shape[0])


class _ByTile(NamedTuple):
    """Products of each tile, in 8 bits where the recipe says so. Every shape is static."""

    recipe: Fp8Recipe
    dtype: tf.DType
    places: _Places

    def times(self, a: BlockScaled, weight: BlockScaled, transpose: bool = False) -> tf.Tensor:
        """Multiply as `_ByExpert` does: each tile by the weight of its expert."""
        values, scales = (tf.gather(part, self._owner()) for part in (weight.values, weight.scales))
        of_tile = BlockScaled(values, scales, weight.block)
        y = self.recipe.product(self._tiles(a), of_tile, self.dtype, transpose_b=transpose)
        return tf.reshape(y, [-1, y.shape[-1]])

    def outer(self, a: BlockScaled, b: BlockScaled) -> tf.Tensor:
        """Multiply as `_ByExpert` does: tile by tile, then summed by expert."""
        if self.recipe.accumulator_bits:
            return self._running_outer(a, b)
        y = self.recipe.product(self._tiles(a), self._tiles(b), self.dtype, transpose_a=True)
        return tf.math.unsorted_segment_sum(y, self._owner(), self.places.room.shape[0])

    def _running_outer(self, a: BlockScaled, b: BlockScaled) -> tf.Tensor:
        """Multiply with a narrow sum, which runs on from tile to tile: `P` rows an expert."""
        room_E, rows = self.places.room, self.places.source.shape[0]
        place_EP = tf.cumsum(room_E, exclusive=True)[:, None] + tf.range(rows)
        place_EP = tf.minimum(place_EP, rows - 1)
        own_EP = tf.cast(tf.range(rows) < room_E[:, None], tf.float32)
        a_EPK, b_EPN = (tf.gather(self.recipe.read(m, self.dtype), place_EP) for m in (a, b))
        return self.recipe.outer(tf.cast(a_EPK, tf.float32) * own_EP[..., None], b_EPN)

    def _owner(self) -> tf.Tensor:
        """Return each tile's expert, `[N]`. Behind the last there is padding: any will do."""
        end_E = tf.cumsum(self.places.room)
        first_N = tf.range(0, self.places.source.shape[0], self.recipe.tile)
        owner_N = tf.reduce_sum(tf.cast(first_N[:, None] >= end_E, tf.int32), axis=-1)
        return tf.minimum(owner_N, end_E.shape[0] - 1)

    def _tiles(self, small: BlockScaled) -> BlockScaled:
        """Bring `[P, K]` into `[N, M, K]`. A tile's rows have a scale each, or one."""
        rows, tile, high = self.places.source.shape[0], self.recipe.tile, small.block[0]
        scale_rows = tf.range(0, rows, min(high, tile)) // high
        values, scales = small.values, tf.gather(small.scales, scale_rows)
        return BlockScaled(
            tf.reshape(values, [rows // tile, tile, values.shape[-1]]),
            tf.reshape(scales, [rows // tile, -1, scales.shape[-1]]),
            small.block,
        )


def _swiglu(h: tf.Tensor) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
    """Return `silu(gate) * up` of `[P, 2I]`, and its slopes in gate and up."""
    gate, up = tf.split(h, 2, axis=-1)
    s = tf.sigmoid(gate)
    silu = gate * s
    return silu * up, (up * (s + silu * (1.0 - s)), silu)
