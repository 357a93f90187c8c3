"""Sending tokens to their experts and summing what comes back, without dropping any.

Three programs for one sum, `y_t = sum_k gate_tk * FFN_{e_tk}(x_t)` (FP8 training, whose arithmetic
differs, has its own: `fp8_experts`):

- `ds_precision.fused_experts`, one compiled operation: what runs on a CPU with a compiler.
- `sorted_experts` sorts the assignments by expert and does one product per expert on just
  its rows. For graph mode; row counts are data, so XLA can't compile it.
- `blocked_experts` pads each expert's rows to whole blocks, so that every shape is known
  beforehand. This is what runs under `jit_compile=True`.

Shape letters: T tokens, D hidden_size, I moe_intermediate_size, E experts, K experts a token,
A = T*K assignments, N blocks, M rows of a block.
"""

from __future__ import annotations

import tensorflow as tf

from ds_precision import (
    ExpertsDone,
    QuantizedWeights,
    fused_experts,
    matmul,
    traced_for_xla,
    use_kernels,
)

LARGEST_BLOCK = 128


def swiglu(gate_up: tf.Tensor) -> tf.Tensor:
    """Return `silu(gate) * up` of `[..., 2I]`, whose first half is the gate."""
    gate, up = tf.split(gate_up, 2, axis=-1)
    return tf.nn.silu(gate) * up


def run_experts(
    x: tf.Tensor,
    indices: tf.Tensor,
    gates: tf.Tensor,
    gate_up: tf.Tensor | QuantizedWeights,
    down: tf.Tensor | QuantizedWeights,
    done: ExpertsDone | None = None,
) -> tf.Tensor:
    """Sum the chosen experts' outputs, by the program that fits where this is traced.

    Args:
        x: `[T, D]`, floating.
        indices: `[T, K]` int32.
        gates: `[T, K]`, floating.
        gate_up: `[E, D, 2I]`, gate first; of any float type, or small.
        down: `[E, I, D]`, of the type of `gate_up`.
        done: of equal operands, by `experts_done`, where compiled operations run.

    Returns:
        `[T, D]` in the type of `x`.
    """
    small = isinstance(gate_up, QuantizedWeights)
    if use_kernels(x) if small else use_kernels(x, gate_up, down):
        return fused_experts(x, indices, gates, gate_up, down, done)
    if small:
        gate_up, down = gate_up.dequantize(), down.dequantize()
    run = blocked_experts if traced_for_xla() else sorted_experts
    return run(x, indices, gates, tf.cast(gate_up, x.dtype), tf.cast(down, x.dtype))


def sorted_experts(
    x: tf.Tensor, indices: tf.Tensor, gates: tf.Tensor, gate_up: tf.Tensor, down: tf.Tensor
) -> tf.Tensor:
    """Sort assignments by expert, one pair of products an expert; see `run_experts`."""
    experts, per_token = gate_up.shape[0], indices.shape[1]
    order, counts = sort_by_expert(indices, experts)
    rows = tf.split(tf.gather(x, order // per_token), counts, num=experts)
    outputs = [
        matmul(swiglu(matmul(part, wide)), narrow)
        for part, wide, narrow in zip(rows, tf.unstack(gate_up), tf.unstack(down), strict=True)
    ]
    y_AD = tf.gather(tf.concat(outputs, axis=0), tf.math.invert_permutation(order))
    return combine(y_AD, gates)


def sort_by_expert(indices: tf.Tensor, experts: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the assignments `[A]` of `indices [T, K]` expert by expert, and how many each has."""
    expert_A = tf.reshape(indices, [-1])
    counts_E = tf.math.unsorted_segment_sum(tf.ones_like(expert_A), expert_A, experts)
    return tf.argsort(expert_A, stable=True), counts_E


def blocked_experts(
    x: tf.Tensor, indices: tf.Tensor, gates: tf.Tensor, gate_up: tf.Tensor, down: tf.Tensor
) -> tf.Tensor:
    """Pad each expert's rows to whole blocks, one batched product; see `run_experts`.

    Needs a static number of tokens. No token is dropped: the number of blocks is the largest
    that any routing can need.
    """
    experts, (tokens, per_token) = gate_up.shape[0], indices.shape
    assignments = tokens * per_token
    size = _block_size(assignments, experts)
    blocks = (assignments + min(experts, assignments) * (size - 1)) // size
    expert_A = tf.reshape(indices, [-1])
    chosen_AE = tf.one_hot(expert_A, experts, dtype=tf.int32)
    counted_AE = tf.cumsum(chosen_AE, axis=0)
    place_A = tf.reduce_sum((counted_AE - 1) * chosen_AE, axis=-1)
    blocks_E = (counted_AE[-1] + size - 1) // size
    first_E = tf.cumsum(blocks_E, exclusive=True)
    row_A = tf.gather(first_E, expert_A) * size + place_A
    source = tf.scatter_nd(
        row_A[:, None], tf.range(1, assignments + 1, dtype=tf.int32), [blocks * size]
    )
    filled = tf.cast(source > 0, x.dtype)
    x_NMD = tf.gather(x, tf.maximum(source - 1, 0) // per_token) * filled[:, None]
    x_NMD = tf.reshape(x_NMD, [blocks, size, x.shape[-1]])
    # Blocks past the last used one hold zeros; which expert they name does not matter.
    owner_N = tf.reduce_sum(
        tf.cast(tf.range(blocks)[:, None] >= (first_E + blocks_E)[None], tf.int32), axis=-1
    )
    owner_N = tf.minimum(owner_N, experts - 1)
    hidden = swiglu(tf.matmul(x_NMD, tf.cast(tf.gather(gate_up, owner_N), x.dtype)))
    y_NMD = tf.matmul(hidden, tf.cast(tf.gather(down, owner_N), x.dtype))
    y_AD = tf.gather(tf.reshape(y_NMD, [blocks * size, -1]), row_A)
    return combine(y_AD, gates)


def _block_size(assignments: int, experts: int) -> int:
    """Return the power of two nearest above an even share, so that padding stays small."""
    share = -(-assignments // experts)
    return 1 if assignments <= experts else min(LARGEST_BLOCK, 1 << (share - 1).bit_length())


def combine(y_AD: tf.Tensor, gates_TK: tf.Tensor) -> tf.Tensor:
    """Sum each token's rows, weighed: `[T * K, D]` and `[T, K]` give `[T, D]`."""
    y_TKD = tf.reshape(y_AD, [-1, gates_TK.shape[1], y_AD.shape[-1]])
    return tf.einsum("tk,tkd->td", tf.cast(gates_TK, y_AD.dtype), y_TKD)
