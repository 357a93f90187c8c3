# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   ds:
#     title: "2 · Multi-head latent attention"
#     minutes: 1.5
#     reading: 60
# ---

# %% [markdown]
# # 2 · Multi-head latent attention
#
# Attention must remember the keys and values of all that it has read. Multi-head latent attention
# (MLA; [arXiv 2405.04434](https://arxiv.org/abs/2405.04434), section 2.1) remembers one small
# vector a token instead, from which the keys and values of all heads can be made. This part
# builds MLA in plain TensorFlow, until it gives the numbers of the package's own layer. Then it
# decodes with a cache, and measures what was gained and what it cost.
#
# ## What you will be able to do
#
# - write every equation of MLA as a line of code, and check it against a layer;
# - say why the key has a part of its own for the position, and prove it with numbers;
# - decode token by token from a latent cache, with the same result as the full pass;
# - move the expansion into the query and the output, and count what that saves;
# - compare MHA, GQA, MQA and MLA in bytes, time and quality, and say what such a comparison shows.
#
# **Time:** 60 minutes. **Builds on:** [part 1](1_foundations.md), sections 1.1 to 1.3.

# %%
import os

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

# Stock operations on every machine: nothing is compiled, and times compare methods.
os.environ.setdefault("DS_PRECISION_KERNELS", "off")

from ds_attention import (
    AttentionConfig,
    LatentCache,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    RMSNorm,
    apply_rope,
    attention_weights,
    causal_mask,
    memory_report,
    rope_frequencies,
)
from ds_attention.figures import plot_attention, plot_latent_spectrum
from ds_model import ModelConfig
from ds_moe import SwiGLU
from ds_train.data import state_of_the_union
from ds_train.notebook import PALETTE, Choice, Exercise, Question, Quiz, benchmark, explore, start

run = start("masterclass-2", seed=0, tracker="none")

# %% [markdown]
# Letters at the end of names say what the axes are: `B` batch, `S` new tokens, `L` cached tokens,
# `D` hidden_size, `H` heads, `N` qk_nope_head_dim, `R` qk_rope_head_dim, `Q` = N + R, `V`
# v_head_dim, `C` kv_lora_rank.

# %% [markdown]
# ## 2.1 Where we start: standard attention
#
# `attend` is the part that all kinds of attention share: scores, mask, softmax, average. Each
# query sees the keys up to its own place.


# %%
def attend(q_BSHQ, k_BLHQ, v_BLHV, scale):
    """Causal attention of the last S of L tokens."""
    scores_BHSL = tf.einsum("bshq,blhq->bhsl", q_BSHQ, k_BLHQ) * scale
    S, L = scores_BHSL.shape[-2:]
    seen_SL = tf.range(L)[None] <= tf.range(L - S, L)[:, None]
    weights_BHSL = tf.nn.softmax(tf.where(seen_SL, scores_BHSL, -1e30))
    return tf.einsum("bhsl,blhv->bshv", weights_BHSL, v_BLHV)


def split(x, heads):
    """[B, S, heads * width] to [B, S, heads, width]."""
    return tf.reshape(x, [*x.shape[:2], heads, x.shape[-1] // heads])


def join(x):
    """[B, S, heads, width] to [B, S, heads * width]."""
    return tf.reshape(x, [*x.shape[:2], x.shape[2] * x.shape[3]])


# %% [markdown]
# MHA projects the hidden state to queries, keys and values. In GQA and MQA several query heads
# share a key and a value. One function does all three. It equals the package's layer:


# %%
def standard_attention(x_BSD, layer):
    heads, groups = layer.num_attention_heads, layer.num_key_value_heads
    q = split(x_BSD @ layer.q_proj.kernel, heads)
    k, v = (split(x_BSD @ p.kernel, groups) for p in (layer.k_proj, layer.v_proj))
    k, v = (tf.repeat(y, heads // groups, axis=2) for y in (k, v))
    return join(attend(q, k, v, layer.head_dim**-0.5)) @ layer.o_proj.kernel


x_BSD = tf.random.stateless_normal([2, 12, 96], seed=(0, 1))
for groups in (6, 2, 1):
    layer = MultiHeadAttention(6, 16, groups, rope_theta=None, initializer_range=0.1)
    wanted = layer(x_BSD)
    np.testing.assert_allclose(standard_attention(x_BSD, layer), wanted, rtol=1e-5, atol=1e-5)
    print(f"{groups} key-value heads: equal; {layer.cache_width} numbers a token in the cache")

# %% [markdown]
# ## 2.2 The reference, and its weights
#
# Here is a small MLA layer. Its norms start with weights of one, and we move them, so that a
# forgotten weight cannot hide.

# %%
config = AttentionConfig(
    hidden_size=96,
    num_attention_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    initializer_range=0.1,
)
reference = MultiHeadLatentAttention(config)
reference.build((None, None, config.hidden_size))
for number, norm in enumerate((reference.q_a_layernorm, reference.kv_a_layernorm)):
    norm.weight.assign(tf.random.stateless_uniform(norm.weight.shape, (0, number), 0.5, 1.5))

W = {weight.path.split("/", 1)[1]: tf.convert_to_tensor(weight) for weight in reference.weights}
for name, weight in W.items():
    print(f"{name:28s} {tuple(weight.shape)}")
H, N, R = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
V, C = config.v_head_dim, config.kv_lora_rank

# %% [markdown]
# The released names are terse. `q_a_proj` is $W^{DQ}$, "down" for the query. `q_b_proj` is
# $W^{UQ}$ and $W^{QR}$ side by side, `kv_a_proj_with_mqa` is $W^{DKV}$ and $W^{KR}$, `kv_b_proj`
# is $W^{UK}$ and $W^{UV}$. Equation numbers below are those of
# [arXiv 2412.19437](https://arxiv.org/abs/2412.19437), section 2.1.1.
#
# ## 2.3 Compression
#
# **Keys and values** (eq. 1). The hidden state is projected to $C$ numbers, which are normalised.
# This is the latent, of which the keys and values of all heads will be made:
#
# $$ c^{KV}_t = \mathrm{RMSNorm}(W^{DKV} h_t) $$
#
# **Queries** (eq. 6) are compressed too, into a latent of their own. It is never cached. It saves
# parameters, and memory in training:
#
# $$ c^{Q}_t = \mathrm{RMSNorm}(W^{DQ} h_t) $$
#
# So there are two latents, not one: queries, keys and values do not come from a common vector.


# %%
def rms_norm(x, weight):
    return x * tf.math.rsqrt(tf.reduce_mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight


compressed = x_BSD @ W["kv_a_proj_with_mqa/kernel"]
c_kv, k_rope_raw = compressed[..., :C], compressed[..., C:]
c_kv = rms_norm(c_kv, W["kv_a_layernorm/weight"])
c_q = rms_norm(x_BSD @ W["q_a_proj/kernel"], W["q_a_layernorm/weight"])
print("latent of keys and values", c_kv.shape, "| of queries", c_q.shape)

# %% [markdown]
# The queries are expanded at once (eq. 7 and 8, before the rotation): for each head a part
# without rotation, then a part that will be rotated.

# %%
q_BSHQ = split(c_q @ W["q_b_proj/kernel"], H)
q_nope, q_rope_raw = q_BSHQ[..., :N], q_BSHQ[..., N:]
print("query of each head:", q_nope.shape, "and", q_rope_raw.shape)

# %% [markdown]
# ## 2.4 Positions: RoPE turns pairs
#
# Rotary embedding (arXiv 2104.09864) takes the numbers of a vector two by two, as points in
# planes. At position $m$ the point of pair $i$ is turned by the angle $m\,\theta^{-2i/R}$. As a
# complex number, that is one product:
#
# $$ (x_{2i} + \mathrm{i}\,x_{2i+1}) \; e^{\mathrm{i}\, m\, \theta^{-2i/R}} $$
#
# In the released weights the pairs lie side by side (*interleaved*). The result lists the first
# members of all pairs, then the second. Query and key are laid out alike, so their product does
# not notice.


# %%
def rope(x, positions, theta=10000.0):
    """Turn the last axis of [B, S, R] or [B, S, H, R]; positions: [S]."""
    pairs = tf.complex(x[..., 0::2], x[..., 1::2])
    angles_SR = tf.cast(positions, tf.float32)[:, None] * rope_frequencies(x.shape[-1], theta)
    turn = tf.complex(tf.cos(angles_SR), tf.sin(angles_SR))
    turned = pairs * (turn if len(x.shape) == 3 else turn[:, None])
    return tf.concat([tf.math.real(turned), tf.math.imag(turned)], axis=-1)


steps = tf.range(12)
q_rope, k_rope = rope(q_rope_raw, steps), rope(k_rope_raw, steps)
np.testing.assert_allclose(q_rope, apply_rope(q_rope_raw, steps[None]), rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(k_rope, apply_rope(k_rope_raw, steps[None]), rtol=1e-5, atol=1e-5)

# %% [markdown]
# A rotation keeps lengths. And the product of a query turned by $m$ and a key turned by $n$
# depends on $m - n$ only: attention sees distances, not places.

# %%
one_q, one_k = q_rope_raw[:1, :1, 0], k_rope_raw[:1, :1]
at = [float(tf.reduce_sum(rope(one_q, [m]) * rope(one_k, [m - 3]))) for m in (3, 10, 100, 1000)]
print("query 3 places after the key, at 3, 10, 100, 1000:", np.round(at, 4))
np.testing.assert_allclose(at, at[0], rtol=1e-2, atol=2e-3)  # float32 angles at 1,000

# %% [markdown]
# ## 2.5 Why the rotated part stands apart
#
# Why not rotate the key of every head, as other models do? Let us try. The score of head $h$ at
# distance $d$ would be
#
# $$ (R_m W^{UQ} c^Q)^\top (R_n W^{UK} c^{KV}) = {c^Q}^\top W^{UQ\top}\, R_{n-m}\, W^{UK} c^{KV} $$
#
# Without the rotation, $W^{UQ\top} W^{UK}$ is one fixed matrix. It can be multiplied into the
# query once, and the latent is used as it is. With the rotation between, the matrix is another one
# for every distance. So either all keys are expanded again for each new token, or the expanded
# keys are cached. Both give away what the latent was for.
#
# Now in numbers: the same query, the same latent, the distance grows.

# %%
head = 0
up_CHX = tf.reshape(W["kv_b_proj/kernel"], [C, H, N + V])
up_k, up_v = up_CHX[..., :N], up_CHX[..., N:]  # W_uk and W_uv of each head
distances = tf.range(64)
query, latent = q_nope[0, 5, head], c_kv[0, 5]
key = tf.linalg.matvec(up_k[:, head], latent, transpose_a=True)
turned_query = rope(tf.repeat(query[None, None], 64, axis=1), distances)[0]
rotated = tf.linalg.matvec(turned_query, rope(key[None, None], [0])[0, 0]).numpy()
absorbed_query = tf.linalg.matvec(up_k[:, head], query)  # W_uk once and for all
absorbed = float(tf.tensordot(absorbed_query, latent, 1))
plain = float(tf.tensordot(query, key, 1))
print(f"no rotation: score {plain:.6f}, with W_uk absorbed {absorbed:.6f}")
np.testing.assert_allclose(absorbed, plain, rtol=1e-4, atol=1e-5)

# %% tags=["hide-input"]
figure = Figure(figsize=(7, 2.8), layout="constrained")
axis = figure.subplots()
axis.plot(distances, rotated, color=PALETTE["blue"], label="key of the head rotated")
axis.axhline(absorbed, color=PALETTE["orange"], ls="--", label="one absorbed matrix")
axis.set(xlabel="distance of query and key [tokens]", ylabel="score")
axis.margins(y=0.2)
axis.legend(frameon=False, loc="upper center", ncols=2)
figure

# %% [markdown]
# Could another fixed matrix serve all distances? The best one in least squares is the mean of
# the matrices over the distances. We measure how far they are from it:

# %%
eye_N = tf.repeat(tf.eye(N)[:, None], 64, axis=1)  # [N, 64, N]: each basis vector, 64 times
turned = rope(eye_N, distances)
turned_up = rope(up_k[:, head][:, None], [0])[:, 0]  # [C, N], at position 0
needed = tf.einsum("nda,ca->dnc", turned, turned_up)  # the matrix for each distance
np.testing.assert_allclose(needed[0], tf.transpose(up_k[:, head]), rtol=1e-5, atol=1e-6)
best = tf.reduce_mean(needed, axis=0)
residual = float(tf.norm(needed - best) / tf.norm(needed))
print(f"the best fixed matrix misses {residual:.0%} of what the 64 distances need")
assert residual > 0.4

# %% [markdown]
# The way out is to *decouple*: most of the key ($N$ numbers a head) has no rotation and is made
# from the latent. A short second key ($R$ numbers) is made from the hidden state directly, rotated,
# and shared by all heads (eq. 3). It is cached as it is. Scores are the sum of both products.
#
# ## 2.6 Expansion, scores, output
#
# Keys and values of all heads come from the latent by one product (eq. 2 and 5). The shared key is
# put beside each (eq. 4):

# %%
kv = split(c_kv @ W["kv_b_proj/kernel"], H)
k_nope, v_BSHV = kv[..., :N], kv[..., N:]
k_BSHQ = tf.concat([k_nope, tf.repeat(k_rope[:, :, None], H, axis=2)], axis=-1)
q_BSHQ = tf.concat([q_nope, q_rope], axis=-1)
print("q", q_BSHQ.shape, "k", k_BSHQ.shape, "v", v_BSHV.shape)

# %% [markdown]
# Then it is attention as always (eq. 10), with the width of both parts under the root, and the
# output projection (eq. 11):
#
# $$
# o_{t,i} = \sum_{j \le t} \mathrm{softmax}_j\!\left(
# \frac{q_{t,i}^\top k_{j,i}}{\sqrt{N + R}}\right) v_{j,i},
# \qquad u_t = W^O [o_{t,1}; \dots; o_{t,H}]
# $$

# %%
mine = join(attend(q_BSHQ, k_BSHQ, v_BSHV, (N + R) ** -0.5)) @ W["o_proj/kernel"]
full = reference(x_BSD)
print("largest output", float(tf.reduce_max(tf.abs(full))))
print("largest difference from the layer", float(tf.reduce_max(tf.abs(mine - full))))
np.testing.assert_allclose(mine, full, rtol=1e-5, atol=1e-5)

# %% [markdown]
# That is the layer, to rounding. Twelve lines of arithmetic, and each has an equation number.

# %% [markdown]
# ## 2.7 The cache
#
# What does a new token need of the old ones? The latent and the rotated key: $C + R$ numbers. The
# package keeps them in a `LatentCache`. Its slots are places in memory, its positions are what RoPE
# sees. They are the same here, and differ when rows are padded.

# %%
cache = LatentCache.allocate(config, batch=2, length=12)
print("entries", cache.entries.shape, "|", cache.nbytes, "bytes")
outputs = []
for t in range(12):
    place = tf.constant([[t]])
    out, cache = reference.attend(x_BSD[:, t : t + 1], cache, place, place, causal_mask(place, 12))
    outputs.append(out)
decoded = tf.concat(outputs, axis=1)
print("token by token against the full pass:", float(tf.reduce_max(tf.abs(decoded - full))))
np.testing.assert_allclose(decoded, full, rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(cache.entries, tf.concat([c_kv, k_rope], axis=-1), rtol=1e-5, atol=1e-5)

# %% [markdown]
# Decoding and the full pass are the same function. In float32 they may differ by rounding, here by
# less than 0.00001. An implementation that differs in the first digit has a fault, whatever text
# it writes. The second assertion says that the cache holds what we computed by hand, and nothing
# else.

# %% [markdown]
# ## 2.8 Absorption
#
# To attend to $L$ cached tokens we could expand the keys and values of all of them, for every new
# token again. It is better to move the matrices. The score without rotation is
#
# $$ q^\top (W^{UK} c_j) = (W^{UK\top} q)^\top c_j , $$
#
# so $W^{UK}$ is applied to the one query, and not to $L$ latents. Likewise for the values:
#
# $$ \sum_j p_j\, (W^{UV} c_j) = W^{UV} \Big(\sum_j p_j\, c_j\Big) . $$
#
# Attention then runs in the latent space, and all heads look at the same $L$ vectors: to the memory
# it is MQA with one wide key.


# %%
def absorbed_attention(q_nope, q_rope, c_kv, k_rope, up_k, up_v):
    """Attention without keys and values; returns [B, S, H, V]."""
    q_BSHC = tf.einsum("bshn,chn->bshc", q_nope, up_k)  # W_uk into the query
    q = tf.concat([q_BSHC, q_rope], axis=-1)
    k = tf.concat([c_kv, k_rope], axis=-1)[:, :, None]  # one key for all heads
    heads = q.shape[2]
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    latent_BSHC = attend(q, tf.repeat(k, heads, 2), tf.repeat(c_kv[:, :, None], heads, 2), scale)
    return tf.einsum("bshc,chv->bshv", latent_BSHC, up_v)  # W_uv into the output


in_latent = absorbed_attention(q_nope, q_rope, c_kv, k_rope, up_k, up_v)
np.testing.assert_allclose(join(in_latent) @ W["o_proj/kernel"], full, rtol=1e-5, atol=1e-5)
last = slice(11, 12)  # one new token, eleven old ones
one = absorbed_attention(q_nope[:, last], q_rope[:, last], c_kv, k_rope, up_k, up_v)
np.testing.assert_allclose(join(one) @ W["o_proj/kernel"], full[:, last], rtol=1e-5, atol=1e-5)
print("absorbed and expanded are equal, for twelve new tokens and for one")

# %% [markdown]
# Mind the scale: the query is now $C + R$ numbers wide, but the score is the same number as
# before, so the divisor is still $\sqrt{N + R}$.
#
# ### Counting multiplications
#
# For $S$ new tokens and $L$ cached ones, projections that both forms share left out:
#
# | | expanded | absorbed |
# |---|---|---|
# | expansion | $L\,C\,H\,(N+V)$ | $S\,C\,H\,(N+V)$ |
# | scores and average | $S\,L\,H\,(N+R+V)$ | $S\,L\,H\,(2C+R)$ |


# %%
def multiplications(c, new, cached):
    n, r, v, latent = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    heads = c.num_attention_heads
    expanded = cached * latent * heads * (n + v) + new * cached * heads * (n + r + v)
    absorbed = new * latent * heads * (n + v) + new * cached * heads * (2 * latent + r)
    return expanded, absorbed


v3 = ModelConfig.preset("v3-671b")
for new in (1, 16, 128, 256, 4096):
    expanded, absorbed_count = multiplications(v3.attention, new, 4096)
    ratio = expanded / absorbed_count
    print(
        f"{new:4d} new, 4,096 cached: expanded {expanded / 1e9:7.1f}, absorbed "
        f"{absorbed_count / 1e9:7.1f} billion, ratio {ratio:6.2f}"
    )
few, many = multiplications(v3.attention, 1, 4096), multiplications(v3.attention, 4096, 4096)
assert few[0] > 50 * few[1]
assert many[0] < many[1]

# %% [markdown]
# For one new token absorption saves a factor of more than 50. For a long prompt it costs more,
# since the latent is wider than a head. So prompts are read expanded and tokens are written
# absorbed. With all keys and values *kept*, as MHA does, a new token would need fewer
# multiplications than either:

# %%
c = v3.attention
kept = 4096 * c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)  # each number once
print(f"one new token, 4,096 cached, MHA: {kept / 1e9:.2f} billion, one for each cached number")
print(f"MLA absorbed: {few[1] / 1e9:.2f} billion, {few[1] / (4096 * c.cache_width):.0f} for each")
assert kept < few[1]

# %% [markdown]
# The last line is the point. In MHA each cached number is read from memory for one multiplication,
# and the arithmetic units wait for memory. MLA reads a small cache and multiplies each number for
# every head. It trades multiplications, which accelerators have in plenty, for bytes, which they
# have not.

# %% [markdown]
# ## 2.9 Four kinds of attention side by side
#
# ### Bytes
#
# First the shape of V3: 61 layers, bfloat16. GQA has 8 key-value heads.

# %%
layers = v3.num_hidden_layers
widths = {
    "MHA": MultiHeadAttention(128, 128).cache_width,
    "GQA-8": MultiHeadAttention(128, 128, 8).cache_width,
    "MQA": MultiHeadAttention(128, 128, 1).cache_width,
    "MLA": v3.attention.cache_width,
}
for name, width in widths.items():
    print(
        f"{name:6s} {width:6,} numbers a token and layer, {width * 2 * layers / 1e3:8.1f} kB in all"
    )
report = memory_report(v3.attention, length=64)
assert report.mla_bytes == 64 * widths["MLA"] * 2
assert report.mha_bytes == 64 * widths["MHA"] * 2
print(
    f"MLA saves {report.saving:.1%} of MHA; it is as large as GQA with "
    f"{widths['MLA'] / widths['MQA']:.2f} key-value heads"
)
assert round(100 * report.saving, 1) == 98.2
assert widths["MLA"] / widths["MQA"] == 2.25

# %% [markdown]
# The 2.25 is also what the paper on V2 says (arXiv 2405.04434, section 2.1.4). The saving grows
# with the number of heads, since the latent does not. A small layer saves less. Ours is small:

# %%
toy = memory_report(config, length=64, dtype="float32")
print(f"the toy layer: {toy.mla_bytes:,} bytes against {toy.mha_bytes:,}, {toy.saving:.1%} less")
assert toy.saving == 1 - (C + R) / (H * (N + V))


# %%
def draw_cache(heads, kv_lora_rank, context):
    numbers = {
        "MHA": heads * 256,
        "GQA-8": min(heads, 8) * 256,
        "MQA": 256,
        "MLA": kv_lora_rank + 64,
    }
    gigabytes = [width * 2 * layers * context / 1e9 for width in numbers.values()]
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axis = figure.subplots()
    colours = [PALETTE[name] for name in ("blue", "green", "sky", "orange")]
    bars = axis.barh(list(numbers), gigabytes, color=colours)
    axis.bar_label(bars, [f" {value:.3g} GB" for value in gigabytes])
    axis.set(xscale="log", xlim=(1e-2, 3e3), xlabel="cache of one sequence [GB, bfloat16]")
    axis.set_title(f"61 layers, {heads} heads of 128, latent {kv_lora_rank}, {context:,} tokens")
    axis.invert_yaxis()
    return figure


explore(
    draw_cache,
    heads=Choice((4, 16, 32, 64, 128), 128),
    kv_lora_rank=Choice((128, 256, 512, 1024), 512),
    context=Choice((4096, 32768, 131072), 131072),
)

# %% [markdown]
# Try:
#
# 1. How many heads must there be before MLA with a latent of 512 is smaller than MHA? Compute
#    first.
# 2. Which latent would be as small as MQA? What would the layer have left to say?
# 3. How many sequences of 131,072 tokens fit into 80 GB in each case, with nothing else in memory?

# %% [markdown]
# ### Time
#
# One decoding step needs a cache. The package's MHA layer has none, since it is a yardstick,
# so we write one: keys and values in `[B, G, L, Q]`, a new token scattered into its place. The step
# must equal the layer's full pass.


# %%
def standard_step(layer, x, keys, values, place):
    """One new token: x [1, 1, D], keys and values [1, G, L, Q]."""
    groups, heads, length = keys.shape[1], layer.num_attention_heads, keys.shape[2]
    at = tf.reshape(place, [1, 1])
    q = apply_rope(split(layer.q_proj(x), heads), at, interleave=False)
    k = apply_rope(split(layer.k_proj(x), groups), at, interleave=False)
    v = split(layer.v_proj(x), groups)
    where = tf.stack([tf.zeros(groups, tf.int32), tf.range(groups), tf.fill([groups], place)], 1)
    keys = tf.tensor_scatter_nd_update(keys, where, k[0, 0])
    values = tf.tensor_scatter_nd_update(values, where, v[0, 0])
    q = tf.reshape(q, [1, groups, heads // groups, layer.head_dim]) * layer.head_dim**-0.5
    scores = tf.matmul(q, keys, transpose_b=True)
    weights = tf.nn.softmax(tf.where(tf.range(length) <= place, scores, -1e30))
    out = tf.reshape(tf.matmul(weights, values), [1, 1, heads * layer.head_dim])
    return layer.o_proj(out), keys, values


layer = MultiHeadAttention(6, 16, 2, initializer_range=0.1)
wanted = layer(x_BSD[:1])
keys = values = tf.zeros([1, 2, 12, 16])
for t in range(12):
    out, keys, values = standard_step(layer, x_BSD[:1, t : t + 1], keys, values, t)
np.testing.assert_allclose(out[:, 0], wanted[:, -1], rtol=1e-5, atol=1e-5)

# %% [markdown]
# Now layers of a size that takes measurable time: hidden size 512, 8 heads of 64, 2,048 cached
# tokens, float32. The full pass reads 512 tokens. The first cell switched the package's compiled
# operations off, and all layers get the same dense mask, so that we compare methods.

# %%
context, hidden = 2048, 512
big = AttentionConfig(
    hidden_size=hidden,
    num_attention_heads=8,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
)
new_token = tf.random.stateless_normal([1, 1, hidden], seed=(0, 2))
prompt = tf.random.stateless_normal([1, 512, hidden], seed=(0, 3))
place = tf.constant(context - 1)
allowed = causal_mask(tf.range(512)[None], 512)
times, cached_bytes = {}, {}

for name, groups in (("MHA", 8), ("GQA-2", 2), ("MQA", 1)):
    layer = MultiHeadAttention(8, 64, groups)
    layer.build((None, None, hidden))
    past = tf.random.stateless_normal([1, groups, context, 64], seed=(0, 4))
    step = tf.function(lambda x, k, v, t, layer=layer: standard_step(layer, x, k, v, t)[0])
    whole = tf.function(lambda x, layer=layer: layer(x, attention_mask=allowed))
    times[name] = (
        benchmark(step, new_token, past, past, place, repeats=15),
        benchmark(whole, prompt, repeats=5),
    )
    cached_bytes[name] = 2 * int(tf.size(past)) * 4

mla = MultiHeadLatentAttention(big)
mla.build((None, None, hidden))
past = LatentCache(tf.random.stateless_normal([1, context, big.cache_width], seed=(0, 5)))
seen = causal_mask(tf.reshape(place, [1, 1]), context)


def latent_step(absorb):
    def step(x, entries, t):
        at = tf.reshape(t, [1, 1])
        return mla.attend(x, LatentCache(entries), at, at, seen, absorb=absorb)[0]

    return tf.function(step)


whole = benchmark(tf.function(lambda x: mla(x, attention_mask=allowed)), prompt, repeats=5)
for name, absorb in (("MLA absorbed", True), ("MLA expanded", False)):
    step = benchmark(latent_step(absorb), new_token, past.entries, place, repeats=15)
    times[name] = (step, whole)
    cached_bytes[name] = past.nbytes

# %%
print(f"{'':14s}  cache [kB]   one step [ms]   full pass [ms]")
for name, (step, whole) in times.items():
    print(
        f"{name:14s} {cached_bytes[name] / 1e3:11,.0f} {1e3 * step.median:15.2f} "
        f"{1e3 * whole.median:16.1f}"
    )
assert times["MLA expanded"][0].median > times["MLA absorbed"][0].median

# %% [markdown]
# What holds on every machine is asserted: expanding 2,048 latents for one token costs more than
# absorbing. The rest depends on the machine and is for you to read off. Two things to know:
# writing a token copies the whole cache here, in all rows, so a small cache gains twice. A server
# writes in place. And one sequence at this size is far from a server's load, where many sequences
# share the weights and the cache is what fills the memory.
#
# The full pass is where MLA pays. Its queries and keys are wider by the rotated part, and keys and
# values take two products. How much it multiplies can be counted. Whether that shows in the times
# above depends on the machine, since softmax and moving data take time as well.


# %%
def full_pass(layer, tokens):
    """Multiplications of a full pass: all kernels, then scores and averages over all pairs."""
    kernels = sum(int(tf.size(w)) for w in layer.weights if len(w.shape) == 2)
    if isinstance(layer, MultiHeadLatentAttention):
        pair = layer.config.num_attention_heads * (layer.config.qk_head_dim + big.v_head_dim)
    else:
        pair = layer.num_attention_heads * 2 * layer.head_dim
    return tokens * kernels + tokens**2 * pair


work = {}
for name, groups in (("MHA", 8), ("GQA-2", 2), ("MQA", 1)):
    layer = MultiHeadAttention(8, 64, groups)
    layer.build((None, None, hidden))
    work[name] = full_pass(layer, 512)
work["MLA"] = full_pass(mla, 512)
print({name: f"{count / 1e6:,.0f} million" for name, count in work.items()})
assert work["MLA"] > work["GQA-2"] > work["MQA"]

# %% [markdown]
# ### Quality
#
# Does a smaller memory make a worse model? We train four small language models on characters of
# the State of the Union addresses: two blocks, hidden size 96, equal but for attention. What
# attention saves in parameters goes to the feed-forward layer, so that all have about the same
# budget. All see the same batches. Each is trained from two random starts, so that we see how much
# chance does.

# %%
documents = state_of_the_union()
text = "".join(d.text for d in documents[-40:-4])
held_out = "".join(d.text for d in documents[-4:])
letters = np.frombuffer((text + held_out).encode(), np.uint8)
alphabet, codes = np.unique(letters, return_inverse=True)
codes, border = codes.astype(np.int32), len(text.encode())
D, SPAN, STEPS = 96, 64, 100
rng = np.random.default_rng(0)
starts = rng.integers(0, border - SPAN - 1, [STEPS, 6])
batches = codes[starts[..., None] + np.arange(SPAN + 1)]
test_starts = np.linspace(border, len(codes) - SPAN - 1, 48).astype(int)
test = codes[test_starts[:, None] + np.arange(SPAN + 1)]
print(f"{border:,} characters to train on, {len(alphabet)} different ones; batches {batches.shape}")

# %%
INIT = D**-0.5
small_mla = AttentionConfig(
    hidden_size=D,
    num_attention_heads=6,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    initializer_range=INIT,
)
kinds = {
    "MHA": lambda: MultiHeadAttention(6, 16, 6, initializer_range=INIT),
    "GQA-2": lambda: MultiHeadAttention(6, 16, 2, initializer_range=INIT),
    "MQA": lambda: MultiHeadAttention(6, 16, 1, initializer_range=INIT),
    "MLA": lambda: MultiHeadLatentAttention(small_mla),
}


def language_model(kind, seed):
    """Returns its variables, its blocks, and a function from ids to logits and attention inputs."""
    keras.utils.set_random_seed(seed)
    table = tf.Variable(tf.random.normal([len(alphabet), D]) * INIT)
    blocks, variables = [], [table]
    for _ in range(2):
        attention = kinds[kind]()
        attention.build((None, None, D))
        spent = sum(int(tf.size(weight)) for weight in attention.weights)
        ffn = SwiGLU(D, round((4 * D * D + 3 * D * 256 - spent) / (3 * D)), INIT)
        blocks.append((RMSNorm(), attention, RMSNorm(), ffn))
        for part in blocks[-1]:
            if not part.built:
                part.build((None, None, D))
            variables += [weight.value for weight in part.trainable_weights]
    final = RMSNorm()
    final.build((None, None, D))
    variables.append(final.weight.value)

    def forward(ids):
        h, seen = tf.gather(table, ids), []
        for before, attention, between, ffn in blocks:
            seen.append(before(h))
            h += attention(seen[-1])
            h += ffn(between(h))
        return tf.einsum("bsd,vd->bsv", final(h), table), seen  # the head is the table

    return variables, blocks, forward


def cross_entropy(logits, ids):
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(ids[:, 1:], logits)
    return tf.reduce_mean(losses)


# %% [markdown]
# Training is Adam in its plainest form, in one graph for each kind. The second start reuses the
# graph with other weights.


# %%
def train(kind, seeds=(0, 1)):
    variables, blocks, forward = language_model(kind, 0)
    first = [tf.Variable(tf.zeros_like(v)) for v in variables]
    second = [tf.Variable(tf.zeros_like(v)) for v in variables]

    @tf.function
    def step(ids, t):
        with tf.GradientTape() as tape:
            loss = cross_entropy(forward(ids[:, :-1])[0], ids)
        rate = 4e-3 * tf.minimum(1.0, t / 10) * (1.1 - t / STEPS)
        for v, g, m, s in zip(
            variables, tape.gradient(loss, variables), first, second, strict=True
        ):
            g = tf.convert_to_tensor(g)
            m.assign(0.9 * m + 0.1 * g)
            s.assign(0.98 * s + 0.02 * g * g)
            v.assign_sub(rate * (m / (1 - 0.9**t)) / (tf.sqrt(s / (1 - 0.98**t)) + 1e-8))
        return loss

    losses, tests = [], []
    for seed in reversed(seeds):  # the model that is returned is that of the first seed
        for variable, fresh in zip(variables, language_model(kind, seed)[0], strict=True):
            variable.assign(fresh)
        for moment in first + second:
            moment.assign(tf.zeros_like(moment))
        losses.append(
            [float(step(tf.constant(ids), tf.constant(t + 1.0))) for t, ids in enumerate(batches)]
        )
        tests.append(float(cross_entropy(forward(tf.constant(test[:, :-1]))[0], test)))
    parameters = sum(int(tf.size(v)) for v in variables)
    return {
        "losses": losses,
        "tests": tests,
        "parameters": parameters,
        "blocks": blocks,
        "forward": forward,
    }


trained = {kind: train(kind) for kind in kinds}

# %%
frequency = np.bincount(codes[:border], minlength=len(alphabet)) / border
entropy = -np.sum(frequency[frequency > 0] * np.log(frequency[frequency > 0]))
print(f"guessing by frequency alone: {entropy:.3f} nats a character\n")
print("         parameters   cache numbers   held-out loss of two starts [nats]")
for kind, result in trained.items():
    attention = result["blocks"][0][1]
    width = attention.config.cache_width if kind == "MLA" else attention.cache_width
    print(
        f"{kind:6s} {result['parameters']:12,} {width:12d}      "
        + "  ".join(f"{loss:10.3f}" for loss in result["tests"])
    )
means = {kind: np.mean(result["tests"]) for kind, result in trained.items()}
chance = np.mean([abs(np.diff(result["tests"])[0]) for result in trained.values()])
between = max(means.values()) - min(means.values())
print(
    f"\nlargest difference between kinds {between:.3f}, mean difference of two starts {chance:.3f}"
)
assert max(means.values()) < entropy - 0.2
assert between < 0.3

# %% tags=["hide-input"]
figure = Figure(figsize=(7, 3), layout="constrained")
axis = figure.subplots()
for (kind, result), colour in zip(trained.items(), ("blue", "green", "sky", "orange"), strict=True):
    curves = [np.convolve(loss, np.ones(8) / 8, "valid") for loss in result["losses"]]
    for number, curve in enumerate(curves):
        axis.plot(
            np.arange(8, STEPS + 1),
            curve,
            color=PALETTE[colour],
            ls=("-", "--")[number],
            lw=1.2,
            label=kind if number == 0 else None,
        )
axis.axhline(entropy, color=PALETTE["black"], lw=1, ls=":", label="frequencies")
axis.set(xlabel="step", ylabel="training loss [nats a character]")
axis.legend(frameon=False, ncols=3)
figure

# %% [markdown]
# What this shows: all four learn, at about the same pace, and the latent layer trains like the
# others. What it does not show: which is best. Compare the two numbers below the table. As long as
# the difference between kinds is not several times that between two starts, so short a training of
# so small a model cannot order them. Also, the context is 64 characters, too short for a memory to
# matter.
#
# The paper on V2 has a comparison at full size: with 7B dense models GQA and MQA fall behind MHA
# (arXiv 2405.04434, appendix D.1, table 8), and with mixture-of-experts models MLA is better than
# MHA while it caches far less (appendix D.2, table 9).

# %% [markdown]
# ## 2.10 Inside a trained layer
#
# Which characters does each head look at? These are the weights of the second block of the MLA
# model, on text that it has not seen. Rows are queries. Each row sums to one, and nothing lies
# above the diagonal.

# %%
line = held_out[1000:1024]
line_ids = np.searchsorted(alphabet, np.frombuffer(line.encode(), np.uint8)).astype(np.int32)
line_ids = line_ids[:24]
model = trained["MLA"]
inputs = model["forward"](tf.constant(line_ids[None]))[1]
weights = attention_weights(model["blocks"][1][1], inputs[1])
np.testing.assert_allclose(tf.reduce_sum(weights, axis=-1), np.ones([1, 6, 24]), rtol=1e-4)
assert float(tf.reduce_max(tf.abs(weights - tf.linalg.band_part(weights, -1, 0)))) < 1e-6
plot_attention(weights[0], words=[chr(alphabet[i]) for i in line_ids], title="second block, MLA")

# %% [markdown]
# How many directions of the latent carry its variance? If a few did, the latent could be narrower.
# We look at the latents of held-out text in both blocks, and in a model that has not learnt.


# %%
def latents(blocks, forward):
    found = []
    for (_, attention, _, _), x in zip(blocks, forward(tf.constant(test[:, :-1]))[1], strict=True):
        compressed = attention.kv_a_proj_with_mqa(x)[..., : small_mla.kv_lora_rank]
        latent = attention.kv_a_layernorm(compressed)
        found.append(tf.reshape(latent, [-1, small_mla.kv_lora_rank]).numpy())
    return found


_, fresh_blocks, fresh_forward = language_model("MLA", 0)
learnt, fresh = latents(model["blocks"], model["forward"]), latents(fresh_blocks, fresh_forward)
plot_latent_spectrum({"block 1": learnt[0], "block 2": learnt[1], "block 1, untrained": fresh[0]})

# %% [markdown]
# The curves say how many of the 32 directions hold 90% and 99% of the variance. Variance is not
# importance, though: a direction of small variance may decide a score. The spectrum is a hint about
# the width, and the loss decides.

# %% [markdown]
# ## Quiz

# %%
quiz = Quiz(
    Question(
        "What does MLA keep of each past token?",
        options=(
            "The latent of the queries and that of keys and values",
            "The latent of keys and values, and one rotated key",
            "The latent of keys and values alone",
        ),
        answer=1,
        why=(
            "Queries of the past are never used again, nor is their latent.",
            "Right: 512 and 64 numbers in V3.",
            "The rotated key is made from the hidden state, which is gone. It must be kept.",
        ),
    ),
    Question(
        "Why is the rotated key not made from the latent of each head's key?",
        options=(
            "A rotation between the two matrices would be another one for each distance, and could "
            "not be absorbed",
            "Rotations are not linear",
            "The latent is too small to hold positions",
        ),
        answer=0,
        why=(
            "Right: section 2.5 measures it.",
            "They are linear. They do not commute with the expansion, that is all.",
            "Positions are not stored: the rotation is applied. Its place is the matter.",
        ),
    ),
    Question(
        "The absorbed query has C + R numbers. By what are the scores divided?",
        options=(
            "The root of C + R",
            "The root of C",
            "The root of N + R",
        ),
        answer=2,
        why=(
            "The score is the same number as before, only computed in another order.",
            "Neither the width of the latent nor the order of the products changes the score.",
            "Right: absorption changes how the number is computed, not the number.",
        ),
    ),
    Question(
        "A prompt of 4,096 tokens is read at once. Which form multiplies less at V3's shape?",
        options=(
            "Expanded: each latent is expanded once for all queries",
            "Absorbed: it always multiplies less",
            "Both the same, since they give the same numbers",
        ),
        answer=0,
        why=(
            "Right: 4,096 queries share the cost of the expansion, and heads are narrower than the "
            "latent.",
            "It does for few new tokens. Look at the last line of the count.",
            "Equal results do not mean equal work.",
        ),
    ),
    Question(
        "The number of heads is doubled, all else stays. What happens to the cache?",
        options=(
            "MHA doubles, MLA stays",
            "Both double",
            "Both stay",
        ),
        answer=0,
        why=(
            "Right: the latent and the shared key do not depend on the number of heads.",
            "In MLA the heads share all that is cached.",
            "In MHA every head has a key and a value of its own.",
        ),
    ),
    Question(
        "Your decoded outputs differ from the full pass by 0.6, and outputs are about 1. The text "
        "reads well. What now?",
        options=(
            "Nothing: caching always costs accuracy",
            "Raise the tolerance to 1",
            "Search for the fault: the two must agree to rounding",
        ),
        answer=2,
        why=(
            "It does not: the cache holds the same numbers that the full pass computes.",
            "Then the test could not fail any more.",
            "Right: most often it is positions, the mask, or a norm applied twice or not at all.",
        ),
    ),
)
quiz

# %% [markdown]
# ## Exercise
#
# Put it together: some new tokens, a cache that grows. The pieces may be of any length.


# %%
def latent_attention(x_BSD, entries_BLC, layer):
    """Read S new tokens after L cached ones.

    entries_BLC: [B, L, C + R], what is cached so far; L may be 0.
    layer: a built MultiHeadLatentAttention with q_lora_rank, whose weights are used.
    Returns the outputs [B, S, D] and the entries [B, L + S, C + R].

    At hand: rms_norm, rope, split, join, attend, absorbed_attention.
    """
    raise NotImplementedError


# %% tags=["hide-input"]
def latent_attention_solution(x_BSD, entries_BLC, layer):
    c = layer.config
    heads, nope, latent = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
    first = entries_BLC.shape[1]
    positions = tf.range(first, first + x_BSD.shape[1])
    # What is kept of the new tokens.
    compressed = x_BSD @ layer.kv_a_proj_with_mqa.kernel
    c_kv = rms_norm(compressed[..., :latent], layer.kv_a_layernorm.weight)
    k_rope = rope(compressed[..., latent:], positions)
    entries = tf.concat([entries_BLC, tf.concat([c_kv, k_rope], axis=-1)], axis=1)
    # Their queries.
    c_q = rms_norm(x_BSD @ layer.q_a_proj.kernel, layer.q_a_layernorm.weight)
    q = split(c_q @ layer.q_b_proj.kernel, heads)
    q_nope, q_rope = q[..., :nope], rope(q[..., nope:], positions)
    # Attention in the latent space, over all that is kept.
    up = tf.reshape(layer.kv_b_proj.kernel, [latent, heads, nope + c.v_head_dim])
    out = absorbed_attention(
        q_nope, q_rope, entries[..., :latent], entries[..., latent:], up[..., :nope], up[..., nope:]
    )
    return join(out) @ layer.o_proj.kernel, entries


def _with_a_mistake(x_BSD, entries_BLC, layer, restart=False, norm=True, mask=True, rotate=True):
    c = layer.config
    heads, nope, latent = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
    first = 0 if restart else entries_BLC.shape[1]
    positions = tf.range(first, first + x_BSD.shape[1])
    # What is kept of the new tokens.
    compressed = x_BSD @ layer.kv_a_proj_with_mqa.kernel
    c_kv, k_rope = compressed[..., :latent], compressed[..., latent:]
    c_kv = rms_norm(c_kv, layer.kv_a_layernorm.weight) if norm else c_kv
    k_rope = rope(k_rope, positions) if rotate else k_rope
    entries = tf.concat([entries_BLC, tf.concat([c_kv, k_rope], axis=-1)], axis=1)
    # Their queries.
    c_q = rms_norm(x_BSD @ layer.q_a_proj.kernel, layer.q_a_layernorm.weight)
    q = split(c_q @ layer.q_b_proj.kernel, heads)
    q_nope, q_rope = q[..., :nope], rope(q[..., nope:], positions)
    # Attention in the latent space, over all that is kept.
    up = tf.reshape(layer.kv_b_proj.kernel, [latent, heads, nope + c.v_head_dim])
    if not mask:  # one of the mistakes below: all new tokens stand at the end
        q_nope, q_rope = (tf.reshape(y, [-1, 1, *y.shape[2:]]) for y in (q_nope, q_rope))
        past = tf.repeat(entries, x_BSD.shape[1], axis=0)
    else:
        past = entries
    out = absorbed_attention(
        q_nope, q_rope, past[..., :latent], past[..., latent:], up[..., :nope], up[..., nope:]
    )
    out = tf.reshape(out, [*x_BSD.shape[:2], heads * c.v_head_dim])
    return out @ layer.o_proj.kernel, entries


def positions_restart(x, entries, layer):
    return _with_a_mistake(x, entries, layer, restart=True)


def norm_forgotten(x, entries, layer):
    return _with_a_mistake(x, entries, layer, norm=False)


def mask_forgotten(x, entries, layer):
    return _with_a_mistake(x, entries, layer, mask=False)


def rotation_forgotten(x, entries, layer):
    return _with_a_mistake(x, entries, layer, rotate=False)


def check_latent_attention(candidate):
    def close(a, b):
        return a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-4)

    wanted = tf.concat([c_kv, k_rope], axis=-1)
    given = candidate(x_BSD[:, :5], tf.zeros([2, 0, C + R]), reference)
    assert isinstance(given, tuple) and len(given) == 2, "return outputs and entries"
    out, entries = given
    assert entries.shape == (2, 5, C + R), f"entries {entries.shape}, expected (2, 5, {C + R})"
    assert close(entries[..., :C], wanted[:, :5, :C]), (
        "the first C numbers of an entry are the latent after its norm"
    )
    assert close(entries[..., C:], wanted[:, :5, C:]), (
        "the last R numbers of an entry are the shared key, rotated by its position"
    )
    assert close(out[:, 0], full[:, 0]), "the very first token sees itself alone"
    assert close(out, full[:, :5]), (
        "entries are right, outputs are not: does a new token see later ones? Is the scale "
        "(N + R) ** -0.5, are the queries rotated?"
    )
    for first, end in ((5, 6), (6, 10), (10, 12)):
        out, entries = candidate(x_BSD[:, first:end], entries, reference)
        assert close(entries, wanted[:, :end]), (
            "the second piece leaves wrong entries: its positions go on from those in the cache"
        )
        assert close(out, full[:, first:end]), "entries are right, outputs of a later piece not"


exercise = Exercise(
    "Complete `latent_attention` so that reading a text in pieces equals reading it at once.",
    check=check_latent_attention,
    solution=latent_attention_solution,
    mistakes={
        "positions start again with every piece": positions_restart,
        "the latent is cached without its norm": norm_forgotten,
        "the key is cached without its rotation": rotation_forgotten,
        "new tokens see later ones": mask_forgotten,
    },
)
exercise

# %%
exercise.check(latent_attention)

# %%
exercise.show_solution()

# %% [markdown]
# ## What goes wrong
#
# | what you see | why | what to do |
# |---|---|---|
# | the first decoded token is right, later ones are off | positions start at 0 again in every step | pass the position of the token, not its index in the piece |
# | released weights give nonsense, own training works | pairs half a vector apart, where the weights have them side by side | `rope_interleave` |
# | outputs too large or too small | the latent's norm is missing, or applied when expanding too | norm once, before the cache |
# | scores too small in decoding only | divided by the root of C + R after absorption | the root of N + R, in both forms |
# | decoding is slow and grows with the context | keys and values are expanded for every token | `absorb=True` |
# | reading a prompt is slow | absorbed for thousands of queries | `absorb=False` for prompts |
# | 98% hoped for, 69% got | few heads: the latent is large beside them | compute `(C + R) / (H (N + V))` first |
#
# The first of them, in numbers: each token is told that it stands at position 0.

# %%
cache, outputs = LatentCache.allocate(config, batch=2, length=12), []
for t in range(12):
    slot, wrong = tf.constant([[t]]), tf.constant([[0]])
    out, cache = reference.attend(x_BSD[:, t : t + 1], cache, slot, wrong, causal_mask(slot, 12))
    outputs.append(out)
difference = tf.reduce_max(tf.abs(tf.concat(outputs, axis=1) - full), axis=[0, 2]).numpy()
print("difference by token:", np.array2string(difference, precision=3, suppress_small=True))
assert difference[0] < 1e-5 and difference[1:].max() > 1e-2

# %% [markdown]
# The first token is right, since its position *is* 0. A test of one step would have passed.

# %% [markdown]
# ## Checkpoint
#
# You can move on if you can say, without looking:
#
# - which of the matrices compress and which expand, and where the two norms stand;
# - what is cached, how many numbers that is in V3, and why the heads do not count;
# - why the rotated key is apart from the latent and shared by the heads;
# - what absorption moves where, when it saves work and when it costs work;
# - what our four small models do not tell about the four kinds of attention.
#
# Next: [part 3, the experts](3_experts.md). The layer that you rebuilt is described in
# [phase 1, the model](../../phases/1-model.md).

# %%
run.finish(
    v3_saving=report.saving,
    toy_saving=toy.saving,
    held_out={kind: result["tests"] for kind, result in trained.items()},
    step_ms={name: 1e3 * step.median for name, (step, _) in times.items()},
)
