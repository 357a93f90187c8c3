import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_attention import (
    AttentionConfig,
    CausalMask,
    LatentCache,
    MultiHeadLatentAttention,
    causal_mask,
)

YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7}
BASE = AttentionConfig(
    hidden_size=24,
    num_attention_heads=3,
    q_lora_rank=10,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    attention_bias=True,
    rope_scaling=YARN,
    initializer_range=0.4,
)
VARIANTS = {
    "yarn, biases": BASE,
    "no query latent": AttentionConfig(
        **(BASE.to_dict() | {"q_lora_rank": None, "rope_scaling": None, "rope_interleave": False})
    ),
}


def made(config: AttentionConfig, **kwargs) -> MultiHeadLatentAttention:
    layer = MultiHeadLatentAttention(config, **kwargs)
    layer.build((None, None, config.hidden_size))
    rng = np.random.default_rng(7)
    layer.set_weights([w + 0.3 * rng.normal(size=w.shape) for w in layer.get_weights()])
    return layer


def within(ours, reference) -> float:
    ours, reference = np.asarray(ours), np.asarray(reference)
    return np.abs(ours - reference).max() / np.abs(reference).max()


def by_the_equations(  # noqa: C901 - one page, to be read beside the paper
    layer: MultiHeadLatentAttention, x: np.ndarray
) -> np.ndarray:
    """Equations 1-11 of arXiv 2412.19437, token by token, head by head, in float64."""
    c = layer.config
    w = {v.path.split("/")[-2] + "/" + v.name: v.numpy().astype(np.float64) for v in layer.weights}

    def norm(v, name):
        return v / np.sqrt((v**2).mean() + 1e-6) * w[f"{name}/weight"]

    def linear(v, name):
        return v @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0.0)

    def angles(position):
        pair = np.arange(0, c.qk_rope_head_dim, 2)
        frequency = c.rope_theta ** (-pair / c.qk_rope_head_dim)
        if c.rope_scaling is not None:
            y = c.rope_scaling

            def index(turns):
                span = y.original_max_position_embeddings / (turns * 2 * np.pi)
                return c.qk_rope_head_dim * np.log(span) / (2 * np.log(c.rope_theta))

            low = max(np.floor(index(y.beta_fast)), 0)
            high = min(np.ceil(index(y.beta_slow)), c.qk_rope_head_dim - 1)
            ramp = np.clip((pair / 2 - low) / (high - low), 0, 1)
            frequency = frequency / y.factor * ramp + frequency * (1 - ramp)
        return position * frequency

    def rope(v, position):
        turn = np.exp(1j * angles(position))
        half = len(v) // 2
        pairs = v[0::2] + 1j * v[1::2] if c.rope_interleave else v[:half] + 1j * v[half:]
        if c.rope_scaling is not None:
            temper = [
                0.1 * m * np.log(c.rope_scaling.factor) + 1
                for m in (c.rope_scaling.mscale, c.rope_scaling.mscale_all_dim)
            ]
            turn = turn * temper[0] / temper[1]
        turned = pairs * turn
        return np.concatenate([turned.real, turned.imag])

    scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
    if c.rope_scaling is not None:
        scale *= (0.1 * c.rope_scaling.mscale_all_dim * np.log(c.rope_scaling.factor) + 1) ** 2
    out = np.zeros_like(x, np.float64)
    for b, row in enumerate(x.astype(np.float64)):
        queries, keys, values = [], [], []
        for t, h in enumerate(row):
            if c.q_lora_rank is None:
                q = linear(h, "q_proj")
            else:
                q = linear(norm(linear(h, "q_a_proj"), "q_a_layernorm"), "q_b_proj")
            q = q.reshape(c.num_attention_heads, -1)
            kv_a = linear(h, "kv_a_proj_with_mqa")
            latent = norm(kv_a[: c.kv_lora_rank], "kv_a_layernorm")
            k_rope = rope(kv_a[c.kv_lora_rank :], t)
            kv = linear(latent, "kv_b_proj").reshape(c.num_attention_heads, -1)
            n = c.qk_nope_head_dim
            queries.append([np.concatenate([head[:n], rope(head[n:], t)]) for head in q])
            keys.append([np.concatenate([head[:n], k_rope]) for head in kv])
            values.append([head[n:] for head in kv])
        q, k, v = np.array(queries), np.array(keys), np.array(values)
        for t in range(len(row)):
            heads = []
            for i in range(c.num_attention_heads):
                scores = np.exp(k[: t + 1, i] @ q[t, i] * scale)
                heads.append(scores @ v[: t + 1, i] / scores.sum())
            out[b, t] = linear(np.concatenate(heads), "o_proj")
    return out


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_papers_equations(config):
    layer = made(config)
    x = np.random.default_rng(1).normal(size=(2, 20, 24)).astype(np.float32)

    assert within(layer(x), by_the_equations(layer, x)) < 1e-5


@settings(deadline=None, max_examples=12)
@given(
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    absorb=st.lists(st.booleans(), min_size=5, max_size=5),
    left=st.integers(0, 3),
    variant=st.sampled_from(sorted(VARIANTS)),
)
def test_cached_and_absorbed_in_any_chunks_equal_the_whole(cuts, absorb, left, variant):
    layer = made(VARIANTS[variant])
    length = sum(cuts)
    x = np.random.default_rng(2).normal(size=(2, length, 24)).astype(np.float32)
    whole = layer(x)

    slots_all = left + length + 2
    cache = LatentCache.allocate(layer.config, 2, slots_all)
    valid = tf.range(slots_all)[None] >= left
    outputs, start = [], 0
    for width, absorbed in zip(cuts, absorb, strict=False):
        positions = tf.range(start, start + width)[None]
        slots = positions + left
        mask = causal_mask(slots, slots_all, valid)
        out, cache = layer.attend(
            x[:, start : start + width], cache, slots, positions, mask, absorbed
        )
        outputs.append(out)
        start += width
    assert within(tf.concat(outputs, 1), whole) < 1e-5


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 40),
    count=st.integers(1, 5),
    length=st.integers(5, 200),
    shared=st.booleans(),
    variant=st.sampled_from(sorted(VARIANTS)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_decoding_as_one_operation_equals_attending(
    batch, count, length, shared, variant, dtype, seed
):
    layer = made(VARIANTS[variant], dtype=dtype)
    rng = np.random.default_rng(seed)
    rows = 1 if shared else batch
    x = tf.cast(rng.normal(size=(batch, count, 24)), dtype)
    entries = tf.cast(rng.normal(size=(batch, length, layer.config.cache_width)), dtype)
    slots = rng.integers(0, length - count + 1, (rows, 1)) + np.arange(count)
    valid = rng.random((batch, length)) < 0.7
    for row in range(batch):  # a token sees itself at least
        valid[row, slots[row % rows]] = True
    positions = tf.constant(slots + 2, tf.int32)
    slots = tf.constant(slots, tf.int32)
    mask = CausalMask(slots, length, None if shared else tf.constant(valid))

    expected, cache = layer.attend(x, LatentCache(entries), slots, positions, mask)
    out, written = layer.decode(x, LatentCache(entries), positions, mask)
    # A step of bfloat16 is 2^-8; `attend` rounds between its operations too.
    near = 1e-5 if dtype == "float32" else 0.03
    assert within(tf.cast(out, tf.float32), tf.cast(expected, tf.float32)) < near
    old, new = (tf.cast(c.entries, tf.float32) for c in (cache, written))
    assert within(new, old) < near
    kept = np.ones((batch, length), bool)
    for row in range(batch):
        kept[row, slots[row % rows]] = False
    np.testing.assert_array_equal(new[kept], tf.cast(entries, tf.float32)[kept])


def test_the_future_does_not_reach_the_past():
    layer = made(BASE)
    x = np.random.default_rng(3).normal(size=(1, 9, 24)).astype(np.float32)
    other = x.copy()
    other[:, 5:] *= -1

    np.testing.assert_array_equal(layer(x)[:, :5], layer(other)[:, :5])


@pytest.mark.parametrize("absorb", [True, False])
def test_gradients_flow_alike_through_every_path(absorb):
    layer = made(BASE)
    x = tf.constant(np.random.default_rng(4).normal(size=(1, 6, 24)), tf.float32)
    steps = tf.range(6)[None]
    with tf.GradientTape(persistent=True) as tape:
        plain = tf.reduce_sum(layer(x) ** 2)
        out, _ = layer.attend(
            x,
            LatentCache.allocate(BASE, 1, 6),
            steps,
            steps,
            causal_mask(steps, 6),
            absorb,
        )
        cached = tf.reduce_sum(out**2)
    for weight in layer.trainable_weights:
        expected = tape.gradient(plain, weight.value)
        assert within(tape.gradient(cached, weight.value), expected) < 2e-5, weight.path


def test_xla_compiles_the_same_numbers():
    layer = made(BASE)
    x = tf.random.stateless_normal([2, 7, 24], seed=[5, 6])

    assert within(tf.function(layer, jit_compile=True)(x), layer(x)) < 1e-5


def test_bfloat16_keeps_weights_norms_and_softmax_wide():
    exact, low = made(BASE), made(BASE, dtype="mixed_bfloat16")
    low.set_weights(exact.get_weights())
    x = tf.random.stateless_normal([2, 16, 24], seed=[7, 8])
    y = low(x)

    assert y.dtype == tf.bfloat16
    assert {w.dtype for w in low.weights} == {"float32"}
    assert within(tf.cast(y, tf.float32), exact(x)) < 0.05  # a few roundings of 2^-8


def test_a_query_with_nothing_to_see_does_no_harm():
    layer = made(BASE)
    x = tf.random.stateless_normal([1, 4, 24], seed=[9, 10])
    mask = causal_mask(tf.range(4)[None], 4, tf.constant([[0, 1, 1, 1]]))
    rest = layer(x[:, 1:], positions=tf.range(1, 4)[None])

    assert within(layer(x, attention_mask=mask)[:, 1:], rest) < 1e-5


def test_comes_back_from_its_config():
    layer = made(BASE)
    again = MultiHeadLatentAttention.from_config(layer.get_config())
    again.build((None, None, 24))
    again.set_weights(layer.get_weights())

    x = tf.random.stateless_normal([1, 5, 24], seed=[11, 12])
    np.testing.assert_array_equal(layer(x), again(x))
    assert again.config == BASE
    assert layer.compute_output_shape((None, 5, 24)) == (None, 5, 24)


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match="input has 23 features; hidden_size is 24"):
        MultiHeadLatentAttention(BASE)(tf.zeros([1, 2, 23]))
