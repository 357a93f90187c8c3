"""FP8 experts against one expert after the other in NumPy with ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from ds_moe import MixtureOfExperts, MoEConfig
from ds_moe.experts import sorted_experts
from ds_moe.fp8_experts import fp8_experts
from ds_precision import Fp8Policy, Fp8Recipe, watch_fp8

E4M3 = ml_dtypes.float8_e4m3fn


def rounded(x, block, power_of_two=False):
    """What a matrix becomes, in float64, one block after the other."""
    found = np.zeros(x.shape)
    for r in range(0, x.shape[0], block[0]):
        for c in range(0, x.shape[1], block[1]):
            here = np.s_[r : r + block[0], c : c + block[1]]
            amax = np.float32(np.abs(x[here]).max())
            scale = np.float32(1) if amax == 0 else amax / np.float32(448)
            if power_of_two:
                least = np.maximum(amax, np.float32(1e-4)) / np.float32(448)
                scale = np.float32(2.0) ** np.ceil(np.log2(least))
            small = np.clip(x[here] / scale, -448, 448).astype(E4M3)
            found[here] = small.astype(np.float64) * scale
    return found


def slopes(h):
    gate, up = np.split(h, 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    silu = gate * s
    return silu * up, up * (s + silu * (1 - s)), silu


def one_by_one(x, indices, gates, up, down, dy, tile):
    """Sections 3.3.1 and 3.3.3 of the paper: one expert after the other."""
    f32, row, tall, square = np.float32, (1, tile), (tile, 1), (tile, tile)
    sent_x, sent_dy = rounded(x, row, True), rounded(dy, row, True)
    y, dx, dgates = np.zeros(x.shape), np.zeros(x.shape), np.zeros(gates.shape)
    dup, ddown = np.zeros(up.shape), np.zeros(down.shape)
    for e in range(len(up)):
        token, k = np.nonzero(indices == e)
        if not len(token):
            continue
        gate, w1, w2 = gates[token, k][:, None], rounded(up[e], square), rounded(down[e], square)
        h = (sent_x[token] @ w1).astype(f32)
        np.add.at(y, token, gate * (rounded(slopes(h)[0].astype(f32), row) @ w2))
        above = sent_dy[token] @ w2.T
        act, d_gate, d_up = slopes(rounded(h, row))
        dgates[token, k] = (act * above).sum(axis=1)
        dh = np.concatenate([gate * above * d_gate, gate * above * d_up], axis=1).astype(f32)
        ddown[e] = rounded((gate * act).astype(f32), tall).T @ rounded(
            sent_dy[token].astype(f32), tall
        )
        dup[e] = rounded(sent_x[token].astype(f32), tall).T @ rounded(dh, tall)
        np.add.at(dx, token, rounded(dh, row) @ w1.T)
    return y, dx, dgates, dup, ddown


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "chosen", "tile"),
    [(50, 40, 24, 4, 2, 16), (9, 33, 20, 8, 3, 32), (5, 16, 16, 3, 1, 128)],
)
def test_equals_one_expert_after_the_other(tokens, hidden, inner, experts, chosen, tile):
    rng = np.random.default_rng(tokens)
    x, dy = (rng.normal(size=(tokens, hidden)).astype(np.float32) for _ in range(2))
    up = (rng.normal(size=(experts, hidden, 2 * inner)) / hidden**0.5).astype(np.float32)
    down = (rng.normal(size=(experts, inner, hidden)) / inner**0.5).astype(np.float32)
    gates = rng.random((tokens, chosen)).astype(np.float32)
    # The last expert gets nothing.
    indices = np.stack([rng.permutation(experts - 1)[:chosen] for _ in range(tokens)])
    indices = indices.astype(np.int32)
    given = [tf.constant(a) for a in (x, gates, up, down)]
    with tf.GradientTape() as tape:
        tape.watch(given)
        x_, gates_, up_, down_ = given
        y = fp8_experts(x_, tf.constant(indices), gates_, up_, down_, Fp8Recipe(tile=tile))
    found = [y, *tape.gradient(y, given, tf.constant(dy))]
    expected = one_by_one(x, indices, gates, up, down, dy, tile)
    for one, other in zip(found, expected, strict=True):
        difference = np.abs(one.numpy() - other)
        # A number that lies between two codes may fall to the other side by a float32 rounding:
        # few do, and each by one step of E4M3 at most.
        assert np.quantile(difference, 0.95) <= 3e-6 * np.abs(other).max()
        assert difference.max() <= 0.07 * np.abs(other).max()


def test_the_layer_rounds_experts_and_not_the_router():
    config = MoEConfig(
        hidden_size=32,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
    )
    layer = MixtureOfExperts(config, dtype=Fp8Policy("mixed_bfloat16", {"tile": 16}), name="mlp")
    layer.build((None, None, 32))
    x = tf.random.normal([2, 7, 32])
    seen = []

    def forward_and_back():
        with tf.GradientTape() as tape:
            y = layer(x)[0]
        return y, tape.gradient(y, layer.trainable_variables)

    with watch_fp8(lambda name, *_: seen.append(name.removeprefix("mlp/"))):
        y, gradients = forward_and_back()
    parts = ("input", "weight", "gradient")
    shared = [f"shared_experts/{name}/{p}" for name in ("gate_up_proj", "down_proj") for p in parts]
    assert sorted(seen) == sorted(
        [f"{name}/{p}" for name in ("up", "down") for p in parts] + shared
    )
    assert y.dtype == tf.bfloat16
    assert all(gradient.dtype == tf.float32 for gradient in gradients)
    assert all(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("scaling", ["block", "tensor"])
def test_outputs_and_gradients_are_near_those_of_float32(scaling):
    # Numbers of one size, so that one scale a matrix is as good as many.
    rng = np.random.default_rng(7)
    x, up, down, dy = (
        tf.constant(rng.uniform(0.5, 1, shape) * rng.choice([-1, 1], shape), tf.float32)
        for shape in ((60, 48), (4, 48, 40), (4, 20, 48), (60, 48))
    )
    indices = tf.constant(np.stack([rng.permutation(4)[:2] for _ in range(60)]), tf.int32)
    given = [x, tf.constant(rng.uniform(0.3, 1, (60, 2)), tf.float32), up * 0.1, down * 0.1]

    def both(run):
        with tf.GradientTape() as tape:
            tape.watch(given)
            y = run(given[0], indices, *given[1:])
        return [y, *tape.gradient(y, given, dy)]

    recipe = Fp8Recipe(tile=16, scaling=scaling)
    found = both(lambda *operands: fp8_experts(*operands, recipe))
    for one, exact in zip(found, both(sorted_experts), strict=True):
        other = tf.convert_to_tensor(exact)  # rows that are gathered come back as slices
        assert 0 < tf.norm(one - other) < 0.1 * tf.norm(other)


def with_gradients(x, indices, weights, dy, recipe):
    """The sum and all four gradients: of x, gates, gate_up, down."""
    given = [x, *weights]
    with tf.GradientTape() as tape:
        tape.watch(given)
        y = fp8_experts(x, indices, *weights, recipe)
    return [y, *tape.gradient(y, given, dy)]


def problem(tokens, hidden, inner, experts, chosen, dtype):
    """Arguments of `with_gradients`. The last expert gets nothing."""
    rng = np.random.default_rng(tokens)
    x, dy = (tf.constant(rng.normal(size=(tokens, hidden)), dtype) for _ in range(2))
    indices = np.stack([rng.permutation(experts - 1)[:chosen] for _ in range(tokens)])
    gates = rng.random((tokens, chosen))
    up = rng.normal(size=(experts, hidden, 2 * inner)) / hidden**0.5
    down = rng.normal(size=(experts, inner, hidden)) / inner**0.5
    weights = [tf.constant(m, tf.float32) for m in (gates, up, down)]
    return x, tf.constant(indices, tf.int32), weights, dy


def assert_same_numbers(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        step = 2.0**-8 if one.dtype == tf.bfloat16 else 3e-6
        ours, theirs = (tf.cast(tf.convert_to_tensor(m), tf.float32) for m in (one, other))
        difference, most = np.abs(ours - theirs), np.abs(theirs).max()
        # As above: another order of a sum sends few numbers to the next code.
        assert np.quantile(difference, 0.95) <= step * most
        assert difference.max() <= 0.07 * most


@pytest.mark.parametrize("bits", [False, True], ids=["read", "bits"])
@pytest.mark.parametrize(
    ("dtype", "size", "options"),
    [
        ("float32", (50, 40, 24, 4, 2, 16), {}),
        ("bfloat16", (50, 40, 24, 4, 2, 16), {"gradient_format": "E5M2"}),
        ("float32", (9, 33, 20, 8, 3, 32), {"scaling": "tensor", "gradient_format": "E5M2"}),
        ("bfloat16", (9, 33, 20, 8, 3, 32), {"scaling": "tensor"}),
        ("bfloat16", (5, 16, 16, 3, 1, 128), {"power_of_two": True}),
    ],
    ids=str,
)
def test_xla_gives_the_same_numbers(dtype, size, options, bits, monkeypatch):
    """With operands read back, and multiplied as 8-bit numbers as on a GPU."""
    *shape, tile = size
    recipe = Fp8Recipe(tile=tile, **options)
    given = problem(*shape, dtype)
    expected = with_gradients(*given, recipe)
    if bits:
        monkeypatch.setattr(Fp8Recipe, "multiplies_bits", lambda *_: True)
    found = tf.function(with_gradients, jit_compile=True)(*given, recipe)
    assert_same_numbers(found, expected)


def test_a_narrow_sum_runs_on_from_tile_to_tile_under_xla():
    # Equal rows: with 4 bits the sum of 1,200 of them stalls, and would not if each tile of 32
    # began anew.
    recipe = Fp8Recipe(tile=32, power_of_two=True, accumulator_bits=4)
    x, dy = tf.ones([1200, 4]), tf.ones([1200, 4])
    weights = [tf.ones([1200, 1]), tf.ones([2, 4, 4]), tf.ones([2, 2, 4])]
    given = x, tf.ones([1200, 1], tf.int32), weights, dy
    expected = with_gradients(*given, recipe)
    found = tf.function(with_gradients, jit_compile=True)(*given, recipe)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    wide = with_gradients(*given, Fp8Recipe(tile=32, power_of_two=True))
    assert np.all(found[-1][1] < 0.7 * wide[-1][1])
