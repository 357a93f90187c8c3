"""The compiled operations against plain TensorFlow, in value and gradient."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_precision import fused_attention, fused_experts, matmul, use_kernels
from ds_precision.kernels import kernels
from ds_precision.products import multiply_outer

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled operations here")
few = settings(deadline=None, max_examples=25)
types = st.sampled_from([tf.float32, tf.bfloat16])
seeds = st.integers(0, 2**31)


def normal(rng: np.random.Generator, *shape: int, dtype: tf.DType = tf.float32) -> tf.Tensor:
    return tf.cast(tf.constant(rng.normal(size=shape), tf.float32), dtype)


def apart(ours: tf.Tensor, theirs: tf.Tensor) -> float:
    ours, theirs = (np.asarray(tf.cast(t, tf.float32), np.float64) for t in (ours, theirs))
    return float(np.abs(ours - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), 1e-9))


def within(dtype: tf.DType) -> float:
    return 3e-6 if dtype == tf.float32 else 1e-2


@few
@given(
    rows=st.integers(1, 40),
    inner=st.integers(1, 70),
    outer=st.integers(1, 150),
    x_type=types,
    w_type=types,
    seed=seeds,
)
def test_matmul_and_its_gradients(rows, inner, outer, x_type, w_type, seed):
    rng = np.random.default_rng(seed)
    x, w = normal(rng, 2, rows, inner, dtype=x_type), normal(rng, inner, outer, dtype=w_type)
    slope = normal(rng, 2, rows, outer, dtype=x_type)
    assert use_kernels(x, w)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, w])
        ours = tf.reduce_sum(tf.cast(matmul(x, w) * slope, tf.float32))
        wide = tf.cast(x, tf.float32), tf.cast(tf.cast(w, x_type), tf.float32)
        exact = tf.einsum("bri,io->bro", *wide)
        theirs = tf.reduce_sum(exact * tf.cast(slope, tf.float32))

    assert apart(matmul(x, w), exact) < within(x_type)
    for ours_slope, exact_slope in zip(
        tape.gradient(ours, [x, w]), tape.gradient(theirs, [x, w]), strict=True
    ):
        assert apart(ours_slope, exact_slope) < within(x_type) + within(w_type)


@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(1, 300, 700), (8, 64, 290), (33, 300, 700), (1100, 40, 33)]
)
@pytest.mark.parametrize("w_type", [tf.float32, tf.bfloat16], ids=lambda d: d.name)
def test_bfloat16_products_of_many_panels_and_blocks(rows, inner, outer, w_type):
    rng = np.random.default_rng(rows)
    x, w = normal(rng, rows, inner, dtype=tf.bfloat16), normal(rng, inner, outer, dtype=w_type)
    slope = normal(rng, rows, outer, dtype=tf.bfloat16)
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        y = matmul(x, w)
        total = tf.reduce_sum(tf.cast(y * slope, tf.float32))
    wide, above = tf.cast(x, tf.float32), tf.cast(slope, tf.float32)
    rounded = tf.cast(tf.cast(w, tf.bfloat16), tf.float32)
    assert apart(y, wide @ rounded) < within(tf.bfloat16)
    dx, dw = tape.gradient(total, [x, w])
    assert apart(dx, above @ tf.transpose(rounded)) < within(tf.bfloat16)
    # The weight's gradient is float32 for float32 weights: sums of exact products.
    limit = 3e-6 if w_type == tf.float32 else within(tf.bfloat16)
    assert apart(dw, tf.transpose(wide) @ above) < limit


def stock_experts(x, indices, gates, gate_up, down):
    inner, y = down.shape[1], tf.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        h = x @ gate_up[expert]
        out = (tf.nn.silu(h[:, :inner]) * h[:, inner:]) @ down[expert]
        y += out * tf.reduce_sum(tf.where(indices == expert, gates, 0), axis=1, keepdims=True)
    return y


@few
@given(
    tokens=st.integers(1, 60),
    hidden=st.integers(1, 50),
    inner=st.integers(1, 40),
    experts=st.integers(1, 9),
    per_token=st.integers(1, 9),
    x_type=types,
    seed=seeds,
)
def test_experts_and_their_gradients(tokens, hidden, inner, experts, per_token, x_type, seed):
    rng = np.random.default_rng(seed)
    per_token = min(per_token, experts)
    x = normal(rng, tokens, hidden, dtype=x_type)
    chosen = [rng.permutation(experts)[:per_token] for _ in range(tokens)]
    indices = tf.constant(np.stack(chosen), tf.int32)
    gates = tf.constant(rng.uniform(0.1, 1, (tokens, per_token)), tf.float32)
    gate_up, down = normal(rng, experts, hidden, 2 * inner), normal(rng, experts, inner, hidden)
    if x_type == tf.bfloat16:  # weights that a cast would not change, so that only sums differ
        gate_up, down = (tf.cast(tf.cast(w, x_type), tf.float32) for w in (gate_up, down))
    slope = tf.cast(normal(rng, tokens, hidden, dtype=x_type), tf.float32)
    operands = [tf.cast(x, tf.float32), gates, gate_up, down]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, *operands])
        y = fused_experts(x, indices, gates, gate_up, down)
        ours = tf.reduce_sum(tf.cast(y, tf.float32) * slope)
        exact = stock_experts(operands[0], indices, *operands[1:])
        theirs = tf.reduce_sum(exact * slope)

    assert y.dtype == x_type
    assert apart(y, exact) < within(x_type)
    found, expected = tape.gradient(ours, [x, *operands[1:]]), tape.gradient(theirs, operands)
    for mine, other in zip(found, expected, strict=True):
        # Sums that nearly cancel keep the rounding of what they are made of.
        assert apart(mine, other) < (1e-4 if x_type == tf.float32 else 3e-2)


@pytest.mark.parametrize("x_type", [tf.float32, tf.bfloat16], ids=lambda d: d.name)
def test_an_expert_that_no_token_is_sent_to_gets_a_gradient_of_zeros(x_type):
    rng = np.random.default_rng(0)
    x, gates = normal(rng, 20, 40, dtype=x_type), tf.ones([20, 1])
    indices = tf.fill([20, 1], 1)
    gate_up, down = normal(rng, 3, 40, 48), normal(rng, 3, 24, 40)
    with tf.GradientTape() as tape:
        tape.watch([gate_up, down])
        total = tf.reduce_sum(tf.cast(fused_experts(x, indices, gates, gate_up, down), tf.float32))
    for gradient in tape.gradient(total, [gate_up, down]):
        assert np.abs(gradient.numpy()[1]).max() > 0
        assert not gradient.numpy()[[0, 2]].any()


@pytest.mark.parametrize("x_type", [tf.float32, tf.bfloat16])
def test_nothing_is_the_first_that_a_thread_multiplies(x_type):
    """An expert without tokens: a thread that has no memory of its own yet would read none."""
    x, dy = tf.zeros([0, 64], x_type), tf.zeros([0, 48], x_type)
    with ThreadPoolExecutor(1) as fresh:
        product = fresh.submit(multiply_outer, x, dy).result()
    np.testing.assert_array_equal(product, np.zeros((64, 48)))


def test_experts_name_an_index_out_of_range():
    x, gates = tf.ones([1, 4]), tf.ones([1, 1])
    with pytest.raises(tf.errors.InvalidArgumentError, match="indices hold 2; experts run from 0"):
        fused_experts(x, tf.constant([[2]]), gates, tf.ones([2, 4, 6]), tf.ones([2, 3, 4]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="do not fit together"):
        fused_experts(x, tf.constant([[0]]), gates, tf.ones([2, 4, 6]), tf.ones([2, 5, 4]))


def stock_attention(q, kv, k_rope, rotation, allowed, scale, interleave):
    heads, rope = q.shape[2], k_rope.shape[-1]
    own, turned = q[..., :-rope], q[..., -rope:]
    first, second = (
        (turned[..., 0::2], turned[..., 1::2]) if interleave else tf.split(turned, 2, axis=-1)
    )
    cos, sin = (part[:, :, None] for part in rotation)
    q = tf.concat([own, first * cos - second * sin, second * cos + first * sin], axis=-1)
    nope = own.shape[-1]
    k = tf.concat([kv[..., :nope], tf.repeat(k_rope[:, :, None], heads, axis=2)], axis=-1)
    scores = tf.einsum("bshq,blhq->bhsl", q, k) * scale
    weights = tf.nn.softmax(tf.where(allowed[:, None], scores, -1e30))
    return tf.einsum("bhsl,blhv->bshv", weights, kv[..., nope:])


@settings(deadline=None, max_examples=20)
@given(
    queries=st.integers(1, 300),
    earlier=st.integers(0, 40),
    heads=st.integers(1, 3),
    nope=st.integers(1, 40),
    pairs=st.integers(1, 9),
    value=st.integers(1, 40),
    padded=st.booleans(),
    interleave=st.booleans(),
    own_rows=st.booleans(),
    dtype=types,
    seed=seeds,
)
def test_attention_and_its_gradients(
    queries, earlier, heads, nope, pairs, value, padded, interleave, own_rows, dtype, seed
):
    rng = np.random.default_rng(seed)
    batch, keys = 2, queries + earlier
    q = normal(rng, batch, queries, heads, nope + 2 * pairs, dtype=dtype)
    kv = normal(rng, batch, keys, heads, nope + value, dtype=dtype)
    k_rope = normal(rng, batch, keys, 2 * pairs, dtype=dtype)
    rows = batch if own_rows else 1
    angles = rng.normal(size=(rows, queries, pairs))
    rotation = tf.constant(np.cos(angles), tf.float32), tf.constant(np.sin(angles), tf.float32)
    slots = np.tile(np.arange(earlier, keys, dtype=np.int32), (rows, 1))
    valid = np.ones((batch, keys), bool)
    if padded:
        valid[0, : keys // 2] = False
    allowed = (np.arange(keys) <= slots[..., None]) & valid[:, None]
    seen = allowed.any(-1)[..., None, None].astype(np.float32)  # others look at nothing
    slope = normal(rng, batch, queries, heads, value) * seen
    scale = (nope + 2 * pairs) ** -0.5
    wide = [tf.cast(t, tf.float32) for t in (q, kv, k_rope)]
    mask = tf.constant(valid) if padded else None
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([q, kv, k_rope, *wide])
        y = fused_attention(q, kv, k_rope, rotation, tf.constant(slots), mask, scale, interleave)
        ours = tf.reduce_sum(tf.cast(y, tf.float32) * slope)
        exact = stock_attention(*wide, rotation, tf.constant(allowed), scale, interleave)
        theirs = tf.reduce_sum(exact * slope)

    assert apart(tf.cast(y, tf.float32) * seen, exact * seen) < within(dtype)
    np.testing.assert_array_equal(y.numpy()[~allowed.any(-1)], 0)
    found, expected = tape.gradient(ours, [q, kv, k_rope]), tape.gradient(theirs, wide)
    # One key alone leaves nothing to choose: its gradient is zero, and what is found is rounding.
    least = 1e-2 * max(np.abs(other).max() for other in expected)
    for mine, other in zip(found, expected, strict=True):
        difference = np.abs(tf.cast(mine, tf.float32) - other).max()
        tolerance = 1e-4 if dtype == tf.float32 else 5e-2
        assert difference < tolerance * max(np.abs(other).max(), least, 1e-30)


def test_results_do_not_depend_on_the_number_of_threads():
    import ctypes  # noqa: PLC0415 - only here

    from ds_precision.kernels.library import compiled  # noqa: PLC0415 - only here

    rng = np.random.default_rng(0)
    x, w = normal(rng, 700, 64), normal(rng, 64, 300)
    indices = tf.constant(rng.integers(0, 5, (700, 2)), tf.int32)
    gates = tf.constant(rng.uniform(size=(700, 2)), tf.float32)
    gate_up, down = normal(rng, 5, 64, 96), normal(rng, 5, 48, 64)
    set_threads = ctypes.CDLL(str(compiled())).ds_set_threads
    outputs = []
    for threads in (1, 2, 5):
        set_threads(threads)
        outputs.append((matmul(x, w), fused_experts(x, indices, gates, gate_up, down)))
    set_threads(2)

    for other in outputs[1:]:
        for first, second in zip(outputs[0], other, strict=True):
            np.testing.assert_array_equal(first, second)


PROGRAM = """
import sys
import numpy as np, tensorflow as tf
from ds_precision import MODES, matmul, quantize_weights

rng = np.random.default_rng(0)
found = []
for rows in (3, 40):
    x = tf.constant(rng.normal(size=(rows, 160)), tf.float32)
    w = rng.normal(size=(160, 70)).astype("f4")
    w[:, 3] *= 1e-6  # subnormal numbers of E4M3
    found.append(matmul(x, tf.constant(w)).numpy())
    found += [matmul(x, quantize_weights(w, mode)).numpy() for mode in MODES]
np.savez(sys.argv[1], *found)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
def test_the_code_for_lesser_processors_gives_the_same(tmp_path, monkeypatch):
    """Compiled without the instructions that this machine may have, in a process of its own."""
    wrapper = tmp_path / "c++"
    wrapper.write_text('#!/bin/sh\nexec c++ "$@" -march=x86-64-v3 -O0\n')
    wrapper.chmod(0o755)
    here, lesser = tmp_path / "here.npz", tmp_path / "lesser.npz"
    surroundings = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(wrapper)}
    command = [sys.executable, "-c", PROGRAM, str(lesser)]
    subprocess.run(command, env=surroundings, check=True)  # noqa: S603 - our own program
    monkeypatch.setattr(sys, "argv", ["", str(here)])
    exec(PROGRAM, {})  # noqa: S102 - the same program

    ours, theirs = np.load(here), np.load(lesser)
    assert len(ours.files) == 10
    for name in ours.files:
        np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-4, atol=1e-4)
