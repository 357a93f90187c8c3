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
#     title: "1 · Foundations"
#     minutes: 0.8
#     reading: 30
# ---

# %% [markdown]
# # 1 · Foundations
#
# DeepSeek-V3 rests on three old ideas used well: a matrix of low rank needs little room, a
# network may hold more weights than it uses for one token, and a number may have 8 bits. This
# part looks at each of them in a small experiment, after a short look at what attention does
# and at what it must remember.
#
# ## What you will be able to do
#
# - write causal attention of several heads, and say why the scores are scaled;
# - compute the bytes that a model keeps for each token that it has read;
# - replace a matrix by two thin ones, and say exactly what is lost;
# - tell the parameters of a mixture of experts from those that one token uses;
# - say where the numbers of an 8-bit format lie, and how far rounding can move one.
#
# **Time:** 30 minutes. **Builds on:** matrix products, softmax, the idea of a transformer block.
# Nothing of the other parts.

# %%
import os

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

# Stock operations on every machine: nothing is compiled, and times compare methods.
os.environ.setdefault("DS_PRECISION_KERNELS", "off")

from ds_attention import MultiHeadAttention, memory_report
from ds_model import ModelConfig, parameter_counts
from ds_moe import MoEConfig, Router
from ds_precision import E4M3, E5M2, E5M6, cast
from ds_precision.figures import plot_formats
from ds_train.data import state_of_the_union
from ds_train.notebook import PALETTE, Choice, Exercise, Question, Quiz, explore, start

run = start("masterclass-1", seed=0, tracker="none")

# %% [markdown]
# Letters at the end of names say what the axes are: `B` batch, `S` sequence, `D` hidden_size,
# `H` heads, `T` tokens, `E` experts, `K` experts a token.

# %% [markdown]
# ## 1.1 Attention is a lookup with soft answers
#
# A dictionary compares a query with its keys and returns the value of the key that fits.
# Attention does the same with vectors. The comparison is a dot product, every key fits a
# little, and the answer is an average of the values, weighted by how well their keys fit
# ([arXiv 1706.03762](https://arxiv.org/abs/1706.03762), eq. 1):
#
# $$
# \mathrm{Attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{d}}\right) V
# $$
#
# Here is the lookup itself: three keys, three values, and a query that is like the second key.


# %%
def attention(q_SQ, k_SQ, v_SQ):
    """Scaled dot-product attention of one head, without a mask."""
    scores_SS = q_SQ @ tf.transpose(k_SQ) / q_SQ.shape[-1] ** 0.5
    return tf.nn.softmax(scores_SS) @ v_SQ


keys = tf.constant([[4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]])
values = tf.constant([[10.0], [20.0], [30.0]])
answer = attention(keys[1:2] * 2, keys, values)
print("a query like the second key is answered with", float(answer[0, 0]))
assert abs(float(answer[0, 0]) - 20) < 0.1

# %% [markdown]
# ### Why divide by the square root of the width
#
# If the entries of $q$ and $k$ are independent with variance 1, then $q \cdot k$ is a sum of $d$
# such products and has variance $d$. Wide heads would give large scores, and a softmax of large
# scores is almost a hard choice, through which almost no gradient flows. Division by
# $\sqrt{d}$ takes the width out.

# %%
rng = np.random.default_rng(0)
widths = (4, 16, 64, 256, 1024)
deviation, largest = [], {"plain": [], "scaled": []}
for width in widths:
    q, k = rng.standard_normal((2, 400, 32, width)).astype(np.float32)
    scores = np.einsum("rd,rkd->rk", q[:, 0], k)  # 400 queries, 32 keys each
    deviation.append(scores.std())
    for name, scale in (("plain", 1.0), ("scaled", width**-0.5)):
        weights = tf.nn.softmax(scores * scale).numpy()
        largest[name].append(weights.max(axis=-1).mean())
print("deviation of q.k over sqrt(d):", np.round(deviation / np.sqrt(widths), 2))
np.testing.assert_allclose(deviation, np.sqrt(widths), rtol=0.1)
assert largest["plain"][-1] > 0.9 and max(largest["scaled"]) < 0.4

# %% tags=["hide-input"]
figure = Figure(figsize=(7, 3), layout="constrained")
axes = figure.subplots(1, 2)
axes[0].plot(widths, deviation, "o", color=PALETTE["blue"], label="measured")
axes[0].plot(widths, np.sqrt(widths), color=PALETTE["black"], lw=1, label="$\\sqrt{d}$")
axes[0].set(xscale="log", yscale="log", ylabel="standard deviation of $q \\cdot k$")
for name, colour in (("plain", "red"), ("scaled", "green")):
    axes[1].plot(widths, largest[name], "o-", color=PALETTE[colour], label=name)
axes[1].axhline(1 / 32, color=PALETTE["black"], lw=1, ls=":", label="uniform")
axes[1].set(xscale="log", ylim=(0, 1), ylabel="largest of 32 weights, mean")
for axis in axes:
    axis.set_xlabel("head width $d$")
    axis.legend(frameon=False)
figure

# %% [markdown]
# ## 1.2 What a cache holds
#
# A language model writes one token after another. Token $t$ attends to the tokens up to $t$,
# never to later ones: attention is *causal*. So nothing that was computed for an old token
# changes when a new one arrives. We can see that on the package's layer: append a token, and
# the outputs before it stay as they were.

# %%
layer = MultiHeadAttention(num_attention_heads=4, head_dim=16, initializer_range=0.2)
x_BSD = tf.random.stateless_normal([1, 9, 64], seed=(0, 1))
short, long = layer(x_BSD[:, :8]), layer(x_BSD)
np.testing.assert_allclose(short, long[:, :8], rtol=1e-4, atol=1e-5)
print("largest change of an old output:", float(tf.reduce_max(tf.abs(short - long[:, :8]))))

# %% [markdown]
# The keys and values of old tokens can therefore be kept. Without them, writing $n$ tokens would
# project $1 + 2 + \dots + n$ tokens instead of $n$.

# %%
n = 2048
print(f"projections of {n:,} tokens: {n * (n + 1) // 2:,} without a cache, {n:,} with one")

# %% [markdown]
# The price is memory. For each token and each layer, multi-head attention (MHA) keeps a key and a
# value for every head:
#
# $$
# \text{bytes} = \text{tokens} \times \text{layers} \times
# \underbrace{n_h\,(d_k + d_v)}_{\text{numbers}} \times \text{bytes a number}
# $$
#
# Let us put in the sizes of DeepSeek-V3 (61 layers, 128 heads, width 128; arXiv 2412.19437,
# section 4.2) as if it used MHA, in bfloat16, which has 2 bytes.

# %%
v3 = ModelConfig.preset("v3-671b")
heads, width, layers = v3.num_attention_heads, v3.v_head_dim, v3.num_hidden_layers
numbers = heads * (v3.qk_nope_head_dim + v3.v_head_dim)
per_token = numbers * 2 * layers
print(f"{numbers:,} numbers a token and layer; {per_token / 1e6:.1f} MB a token in all layers")
for tokens in (2_048, 131_072):
    print(f"{tokens:>8,} tokens: {tokens * per_token / 1e9:7.1f} GB")
assert numbers == 32_768

# %% [markdown]
# Often one reads 16 GB for the shorter of the two. Then every number was counted with the 4 bytes
# of float32, and caches are kept in 2. And the shorter line is not the one that hurts: the model
# reads up to 131,072 tokens, and at that length one conversation would fill several accelerators.
#
# `memory_report` allocates the tensors and weighs them. It must agree with the formula. It also
# weighs what DeepSeek-V3 really keeps, and [part 2](2_latent_attention.md) is about that.

# %%
report = memory_report(v3.attention, length=16)
assert report.mha_bytes == 16 * numbers * 2
print(f"one layer, 16 tokens: {report.mha_bytes:,} bytes with MHA, {report.mla_bytes:,} in V3")
print(f"saved: {report.saving:.1%}")
assert round(100 * report.saving, 1) == 98.2

# %% [markdown]
# Two ways out are older. *Multi-query attention* (MQA, arXiv 1911.02150) keeps one key and one
# value for all heads. *Grouped-query attention* (GQA, arXiv 2305.13245) keeps one for each group
# of heads. Both give heads less to look at. The third way keeps all heads different, and stores
# what they are all made of. For that we need low rank.

# %% [markdown]
# ## 1.3 Low rank: what a thin product can hold
#
# A matrix $W$ with $m$ rows and $n$ columns has $mn$ entries. A product $AB$ of an $m \times r$
# and an $r \times n$ matrix has $r(m+n)$, fewer if $r$ is small. Such a product reads: *compress
# to $r$ numbers, then expand*. Its rank is at most $r$, so most matrices cannot be written this
# way. How close can it come?
#
# The singular value decomposition answers that. It writes $W = \sum_i \sigma_i u_i v_i^\top$ with
# orthonormal $u_i$, orthonormal $v_i$ and $\sigma_1 \ge \sigma_2 \ge \dots \ge 0$. By the theorem
# of Eckart and Young, the first $r$ terms are the best approximation of rank $r$, and
#
# $$
# \min_{\mathrm{rank}(X) \le r} \lVert W - X \rVert_F^2 = \sum_{i > r} \sigma_i^2 .
# $$
#
# As an example we take a matrix that the world made: how often one character follows another at
# distances 1 to 8 in the State of the Union addresses. Beside it stands noise of the same shape
# and the same norm.

# %%
text = "".join(document.text for document in state_of_the_union()[-40:])
letters = np.frombuffer(text.encode(), np.uint8)
alphabet, codes = np.unique(letters[:400_000], return_inverse=True)
counts = np.zeros((len(alphabet), 8, len(alphabet)))
for distance in range(1, 9):
    np.add.at(counts[:, distance - 1], (codes[:-distance], codes[distance:]), 1)
W_text = np.log1p(counts).reshape(len(alphabet), -1)
W_text -= W_text.mean()
W_noise = rng.standard_normal(W_text.shape)
W_noise *= np.linalg.norm(W_text) / np.linalg.norm(W_noise)
print("shape of both:", W_text.shape)

# %% [markdown]
# Now the theorem in numbers. `truncate` keeps $r$ terms. The error is compared with the sum of
# the squares that were dropped.


# %%
def truncate(W, r):
    """The best approximation of rank r, and its relative error."""
    u, s, vt = np.linalg.svd(W, full_matrices=False)
    best = (u[:, :r] * s[:r]) @ vt[:r]
    return best, np.linalg.norm(W - best) / np.linalg.norm(W)


rank = 8
s = np.linalg.svd(W_text, compute_uv=False)
best, error = truncate(W_text, rank)
np.testing.assert_allclose(np.linalg.norm(W_text - best) ** 2, (s[rank:] ** 2).sum(), rtol=1e-6)
m, n = W_text.shape
print(f"rank {rank}: {rank * (m + n):,} numbers instead of {m * n:,}, relative error {error:.1%}")

# %% [markdown]
# That no other product does better is the second half of the theorem. We cannot try all of them.
# We can start from a random product and improve one factor at a time by least squares, which is
# what a training loop does in spirit: the error falls towards the bound and never below it.

# %%
right = rng.standard_normal((rank, n))
for sweep_number in range(31):
    left = W_text @ np.linalg.pinv(right)
    error_now = np.linalg.norm(W_text - left @ right) / np.linalg.norm(W_text)
    assert error_now >= error - 1e-9  # Eckart and Young
    if sweep_number in (0, 1, 3, 10, 30):
        print(f"after {sweep_number:2d} improvements: {error_now:.4f}   (bound {error:.4f})")
    right = np.linalg.pinv(left) @ W_text
assert error_now < 1.02 * error

# %% [markdown]
# How much is lost depends on the matrix. In the text matrix few directions carry most of the
# sum. In noise all directions carry about the same, and low rank loses nearly everything.


# %%
def draw_rank(rank, matrix):
    W = {"text": W_text, "noise": W_noise}[matrix]
    s = np.linalg.svd(W, compute_uv=False)
    tail = np.sqrt(np.maximum(1 - np.cumsum(s**2) / (s**2).sum(), 0))
    m, n = W.shape
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    order = np.arange(1, len(s) + 1)
    left.semilogy(order, s, ".", color=PALETTE["blue"])
    left.axvline(rank + 0.5, color=PALETTE["red"], lw=1)
    left.set(
        xlabel="index $i$", ylabel="singular value $\\sigma_i$", title=matrix, ylim=(1e-1, None)
    )
    right.plot(order, tail, color=PALETTE["blue"])
    right.plot(rank, tail[rank - 1], "o", color=PALETTE["red"])
    right.set(xlabel="rank $r$", ylabel="relative error", ylim=(0, 1))
    right.set_title(f"{tail[rank - 1]:.1%} lost, {rank * (m + n) / (m * n):.1%} of the numbers")
    return figure


explore(draw_rank, rank=Choice((2, 4, 8, 16, 32, 64), 8), matrix=("text", "noise"))

# %% [markdown]
# Try:
#
# 1. Which rank halves the error of rank 2 for the text? And for the noise?
# 2. From which rank on does the product need *more* numbers than the matrix? Compute it from $m$
#    and $n$ first.
# 3. Set the rank to 64. Why is the error of the text not exactly zero?

# %%
print(f"the product is smaller up to rank {m * n // (m + n)} of {min(m, n)}")
assert truncate(W_text, rank)[1] < 0.5 * truncate(W_noise, rank)[1]

# %% [markdown]
# ### Why one latent for keys and values together
#
# Keys and values are both linear maps of the same hidden vector: $k = W^K h$ and $v = W^V h$. What
# the two have in common needs to be stored only once. So, with $r$ numbers a token to spend,
# one latent of width $r$ for both can never be worse than two latents of width $r/2$: the two
# together are one special latent of width $r$, with many zeros in its maps.
#
# We check it on text: a hidden vector made of the last four characters, random maps to keys and
# values, the best latent in each case. The singular values alone tell the errors.

# %%
embedding = rng.standard_normal((len(alphabet), 24))
window = np.lib.stride_tricks.sliding_window_view(codes[:1200], 4)
h_TD = embedding[window].reshape(len(window), -1)
h_TD -= h_TD.mean(axis=0)
W_k, W_v = rng.standard_normal((2, h_TD.shape[1], 64)) / h_TD.shape[1] ** 0.5
K, V = h_TD @ W_k, h_TD @ W_v
both = np.concatenate([K, V], axis=1)
print("width of h", h_TD.shape[1], "| keys and values", both.shape[1])
squares = {
    name: np.linalg.svd(Y, compute_uv=False) ** 2
    for name, Y in (("both", both), ("K", K), ("V", V))
}
total = squares["both"].sum()
for r in (16, 32, 64, 96):
    lost_together = (squares["both"][r:].sum() / total) ** 0.5
    lost_apart = ((squares["K"][r // 2 :].sum() + squares["V"][r // 2 :].sum()) / total) ** 0.5
    print(f"{r:3d} numbers a token: lost {lost_together:6.1%} together, {lost_apart:6.1%} apart")
    assert lost_together <= lost_apart + 1e-9
assert lost_together < 1e-6 < lost_apart

# %% [markdown]
# The last line is exact: keys and values have 128 numbers, but they come from 96, so a latent of
# 96 loses nothing. In DeepSeek-V3 keys and values of all heads have 32,768 numbers and come from a
# hidden vector of 7,168. The latent has 512. That does lose something, and no SVD chooses it: it
# is trained with everything else, and learns to keep what attention needs.

# %% [markdown]
# ## 1.4 Mixture of experts: many parameters, few of them active
#
# A feed-forward layer multiplies every token by all of its weights. A mixture of experts holds
# many such layers, the *experts*, and a *router* that picks a few of them for each token. The
# number of parameters grows with the experts held, the number of multiplications with the
# experts picked.

# %%
totals = parameter_counts(v3)
print(f"parameters {totals.main / 1e9:.1f} billion, active for one token {totals.active / 1e9:.1f}")
assert round(totals.main / 1e9) == 671 and round(totals.active / 1e9) == 37

# %% [markdown]
# The paper names the same, rounded: 671B and 37B (arXiv 2412.19437, abstract). Most of it can be had by
# hand. An expert has three matrices of 7,168 by 2,048. There are 256 in each of 58 layers (the
# first 3 of 61 layers are dense), and a token goes to 8 of them. The shared expert, the ninth,
# takes every token.

# %%
expert = 3 * v3.hidden_size * v3.moe_intermediate_size
moe_layers = v3.num_hidden_layers - v3.first_k_dense_replace
routed = moe_layers * v3.n_routed_experts * expert
picked = moe_layers * v3.num_experts_per_tok * expert
print(f"routed experts: {routed / 1e9:.1f} billion, {routed / totals.main:.1%} of all parameters")
print(f"of these active: {picked / 1e9:.1f} billion, {picked / routed:.2%}")
embedding_table = v3.vocab_size * v3.hidden_size
assert totals.main - (routed - picked) - embedding_table == totals.active

# %% [markdown]
# The last line says what "active" means here: everything but the experts that were not picked
# and the embedding table, of which a token reads one row.
#
# ### The router's scores: softmax or sigmoid
#
# The router gives each expert a number, its logit. V2 makes scores of the logits by a softmax, V3
# by a sigmoid. Under a softmax the scores of a token sum to one: what one expert gains the others
# lose. Under a sigmoid each expert is judged by itself. Here the logit of one expert rises, and
# the others stay.

# %%
logits = tf.constant(rng.standard_normal(16).astype(np.float32))
raised = tf.linspace(-4.0, 4.0, 33)
moved = tf.concat([raised[:, None], tf.repeat(logits[None, 1:], 33, axis=0)], axis=1)
scores = {"softmax": tf.nn.softmax(moved).numpy(), "sigmoid": tf.sigmoid(moved).numpy()}
other = 1 + int(np.argmax(logits[1:]))  # the best of the others
assert np.all(np.diff(scores["softmax"][:, other]) < 0)  # it pays
assert np.ptp(scores["sigmoid"][:, other]) == 0  # it does not notice

# %% tags=["hide-input"]
figure = Figure(figsize=(7, 2.8), layout="constrained")
for axis, (name, value) in zip(figure.subplots(1, 2, sharey=True), scores.items(), strict=True):
    axis.plot(raised, value[:, 0], color=PALETTE["blue"], label="the expert that rises")
    axis.plot(
        raised, value[:, other], color=PALETTE["orange"], ls="--", label="the best of the others"
    )
    axis.set(title=name, xlabel="logit of the expert that rises")
axis.figure.axes[0].set_ylabel("score")
axis.figure.axes[0].legend(frameon=False)
figure

# %% [markdown]
# Both functions rise with the logit, so the *choice* of the best experts is the same. What differs
# is the weights, the *gates*, with which their outputs are summed. The package's router shows both:


# %%
def router(scoring_func):
    made = Router(
        MoEConfig(
            hidden_size=32,
            moe_intermediate_size=8,
            n_routed_experts=16,
            num_experts_per_tok=4,
            scoring_func=scoring_func,
            topk_method="greedy",
            initializer_range=0.3,
        )
    )
    made.build((None, 32))
    return made


soft, sharp = router("softmax"), router("sigmoid")
sharp.weight.assign(soft.weight)
x_TD = tf.random.stateless_normal([200, 32], seed=(0, 2))
first, second = soft(x_TD), sharp(x_TD)
assert np.array_equal(np.sort(first.indices), np.sort(second.indices))
np.testing.assert_allclose(tf.reduce_sum(second.gates, axis=-1), np.ones(200), rtol=1e-5)
for name, routing in (("softmax", first), ("sigmoid", second)):
    share = tf.reduce_mean(tf.reduce_max(routing.gates, axis=-1))
    print(f"{name}: the best of 4 experts gets {float(share):.0%} of the output on average")
assert tf.reduce_mean(tf.reduce_max(first.gates, -1)) > tf.reduce_mean(
    tf.reduce_max(second.gates, -1)
)

# %% [markdown]
# Sigmoid scores have a second use. V3 keeps the load even by adding a small bias to each expert's
# score before the choice. A bias of one size means the same for every token only if the scores do
# not depend on each other. [Part 3](3_experts.md) builds this.

# %% [markdown]
# ## 1.5 Floating point: how numbers of 8 bits lie
#
# A floating-point number is a sign, an exponent $e$ and a mantissa of $m$ bits. Between $2^e$ and
# $2^{e+1}$ lie $2^m$ numbers, evenly spaced. The spacing is the *unit in the last place*,
#
# $$ \mathrm{ulp}(x) = 2^{\lfloor \log_2 |x| \rfloor - m}, $$
#
# and doubles with each power of two. E4M3 has 4 bits of exponent and 3 of mantissa. Eight bits
# make 256 codes, few enough to look at all of them.


# %%
def numbers_of(fmt):
    """All finite numbers of an 8-bit format, sorted."""
    every = np.arange(256, dtype=np.uint8).view(fmt.dtype.as_numpy_dtype).astype(np.float32)
    return np.unique(every[np.isfinite(every)])


for fmt in (E4M3, E5M2):
    finite = numbers_of(fmt)
    positive = finite[finite > 0]
    print(f"{fmt.name}: {len(finite)} numbers, from {positive[0]:.3g} to {positive[-1]:,.0f}")
    assert positive[-1] == fmt.max and positive[0] == fmt.smallest_subnormal
print("E4M3 from 1 to 4:", *numbers_of(E4M3)[(numbers_of(E4M3) >= 1) & (numbers_of(E4M3) <= 4)])

# %% [markdown]
# In E4M3 there are eight steps from 1 to 2, and eight from 2 to 4, each twice as wide. Below
# `smallest_normal` the exponent cannot fall further, and the spacing stays: these are the
# *subnormal* numbers.


# %%
def ulp(x, fmt):
    exponent = np.floor(np.log2(np.maximum(np.abs(x), fmt.smallest_normal)))
    return 2.0 ** (exponent - fmt.mantissa_bits)


for fmt in (E4M3, E5M2):
    positive = numbers_of(fmt)[numbers_of(fmt) >= 0]
    np.testing.assert_array_equal(np.diff(positive), ulp(positive[:-1], fmt))
print("ulp of E4M3 at 0.001, 1, 100, 400:", [float(ulp(x, E4M3)) for x in (0.001, 1, 100, 400)])

# %% [markdown]
# Rounding to the nearest number moves $x$ by at most half an ulp. Relative to $x$ that is at most
# $2^{-(m+1)}$ in the normal range: 6.25% for E4M3, 12.5% for E5M2. E5M6, which V3 uses in one
# place, has 12 bits. The worst place is half-way above a power of two, where the error is
# $1 / (2^{m+1} + 1)$, a little below the bound. Measured over the normal range:

# %%
for fmt in (E4M3, E5M2, E5M6):
    span = np.log2([fmt.smallest_normal, fmt.max])
    x = (2.0 ** rng.uniform(*span, 200_000)).astype(np.float32)
    rounded = tf.cast(cast(x, fmt), tf.float32).numpy()
    relative = np.abs(rounded - x) / x
    bound = fmt.worst_relative_error
    mean, worst = relative.mean(), relative.max()
    print(f"{fmt.name}: error {mean:.2%} on average, {worst:.2%} at worst; bound {bound:.2%}")
    assert 0.8 * bound < worst <= bound * (1 + 1e-6)

# %%
plot_formats()

# %% [markdown]
# Each format has a band in which its error is bounded. Left of it numbers become coarse and then
# zero. Right of it they saturate. So before numbers are rounded to 8 bits they are multiplied
# into that band. Here is a normal sample of small standard deviation, rounded as it is, and
# scaled so that the largest magnitude becomes 448:

# %%
x = rng.standard_normal(100_000).astype(np.float32)
for deviation in (1.0, 1e-2, 1e-3):
    small = x * deviation
    scale = np.abs(small).max() / E4M3.max
    plain = tf.cast(cast(small, E4M3), tf.float32).numpy()
    scaled = tf.cast(cast(small / scale, E4M3), tf.float32).numpy() * scale
    lost = [np.linalg.norm(y - small) / np.linalg.norm(small) for y in (plain, scaled)]
    zero = np.mean(plain == 0)
    print(
        f"deviation {deviation:g}: error {lost[0]:.1%} plain ({zero:.1%} became zero), "
        f"{lost[1]:.1%} scaled"
    )
assert lost[0] > 0.5 and lost[1] < 0.04 and zero > 0.5

# %% [markdown]
# DeepSeek-V3 uses E4M3 for all three products of a layer, forward, gradient of the input and
# gradient of the weight, and a scale for each tile of numbers (arXiv 2412.19437, section 3.3). One
# often reads that E5M2 is for weights. It is not: its classic use was gradients (arXiv
# 2209.05433), and V3 does without it. [Part 4](4_precision.md) builds the products.

# %% [markdown]
# ## Quiz

# %%
quiz = Quiz(
    Question(
        "Keys and values are cached, queries are not. Why?",
        options=(
            "Queries are larger",
            "A query is used once, at its own position",
            "Queries can be made from the keys",
        ),
        answer=1,
        why=(
            "In MHA a query is as wide as a key. Size is not the reason.",
            "Right: later tokens compare their own queries with old keys. The old queries have "
            "done their work.",
            "They come from the same hidden vector, but through another matrix. Neither gives the "
            "other.",
        ),
    ),
    Question(
        "The head width is quadrupled and the division by its root is forgotten. What happens to "
        "the scores at the start of training?",
        options=(
            "Their deviation doubles",
            "Their deviation is four times as large",
            "Nothing, the softmax normalises",
        ),
        answer=0,
        why=(
            "Right: the variance grows with the width, the deviation with its root.",
            "That is the variance. The deviation is its root.",
            "A softmax takes out a shift of all scores. It does not take out a factor.",
        ),
    ),
    Question(
        "The singular values of a matrix are 4, 2, 2 and 1. Which squared error has the best "
        "approximation of rank 1?",
        options=("5", "9", "25"),
        answer=1,
        why=(
            "That is the sum of the dropped values. The squares are summed.",
            "Right: 4 + 4 + 1.",
            "That is the squared norm of the whole matrix: rank 0.",
        ),
    ),
    Question(
        "DeepSeek-V3 would get twice as many routed experts, still 8 for a token. What doubles, "
        "roughly?",
        options=(
            "Parameters, and the products of one token",
            "Only the products of one token",
            "Only the parameters",
        ),
        answer=2,
        why=(
            "A token still goes through 8 experts.",
            "The products depend on the experts picked, which stay 8.",
            "Right: nearly all parameters are experts. The router's own product grows too, but it "
            "is small.",
        ),
    ),
    Question(
        "Which numbers of E4M3 can be wrong by more than 6.25% after rounding?",
        options=(
            "Those below the smallest normal number, and those above 448",
            "Those near 448",
            "None",
        ),
        answer=0,
        why=(
            "Right: below, the spacing stops shrinking, and above, everything becomes 448.",
            "There the ulp is 32, and half of it is 16, or 6.25% of 256 at the most.",
            "The bound holds for normal numbers within the range only.",
        ),
    ),
)
quiz

# %% [markdown]
# ## Exercise
#
# **One.** Bytes of a cache, for four kinds of attention.


# %%
def cache_bytes(kind, config, tokens, kv_heads=8, bytes_a_number=2):
    """Bytes that `tokens` tokens leave in ONE layer.

    kind: "MHA", "GQA" (kv_heads key-value heads), "MQA" or "MLA".
    config: has num_attention_heads, qk_nope_head_dim, v_head_dim, kv_lora_rank, qk_rope_head_dim.
    """
    raise NotImplementedError


# %% tags=["hide-input"]
def cache_bytes_solution(kind, config, tokens, kv_heads=8, bytes_a_number=2):
    if kind == "MLA":  # one latent and one rotated key, whatever the number of heads
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        heads = {"MHA": config.num_attention_heads, "GQA": kv_heads, "MQA": 1}[kind]
        numbers = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return tokens * numbers * bytes_a_number


def queries_too(kind, config, tokens, kv_heads=8, bytes_a_number=2):
    more = config.num_attention_heads * config.qk_nope_head_dim if kind == "MHA" else 0
    return cache_bytes_solution(kind, config, tokens, kv_heads, bytes_a_number) + (
        tokens * more * bytes_a_number
    )


def rotated_key_forgotten(kind, config, tokens, kv_heads=8, bytes_a_number=2):
    if kind == "MLA":
        return tokens * config.kv_lora_rank * bytes_a_number
    return cache_bytes_solution(kind, config, tokens, kv_heads, bytes_a_number)


def keys_only(kind, config, tokens, kv_heads=8, bytes_a_number=2):
    if kind == "MLA":
        return cache_bytes_solution(kind, config, tokens, kv_heads, bytes_a_number)
    return cache_bytes_solution(kind, config, tokens, kv_heads, bytes_a_number) // 2


def check_cache_bytes(candidate):
    for name in ("tiny", "v3-671b"):
        config = ModelConfig.preset(name).attention
        report = memory_report(config, length=24)
        found = candidate("MHA", config, 24)
        assert found is not None, "the function returns nothing"
        assert found <= report.mha_bytes, "MHA: too many. Which of query, key, value is kept?"
        assert found == report.mha_bytes, "MHA: too few. Keys and values are kept, of every head."
        heads = config.num_attention_heads
        for kind, kv_heads in (("GQA", heads // 2), ("MQA", 1)):
            layer = MultiHeadAttention(heads, config.v_head_dim, kv_heads)
            wanted = 24 * layer.cache_width * 2
            found = candidate(kind, config, 24, kv_heads=kv_heads)
            assert found == wanted, f"{kind} with {kv_heads} key-value heads: {wanted:,} expected"
        assert candidate("MLA", config, 24) == report.mla_bytes, (
            "MLA keeps one latent and one rotated key for all heads together"
        )
    config = ModelConfig.preset("tiny").attention
    twice = candidate("MLA", config, 24, bytes_a_number=4)
    assert twice == 2 * candidate("MLA", config, 24), "bytes_a_number is not used"


exercise_one = Exercise(
    "Complete `cache_bytes`. MLA keeps a latent of `kv_lora_rank` numbers and one key of "
    "`qk_rope_head_dim` numbers that all heads share.",
    check=check_cache_bytes,
    solution=cache_bytes_solution,
    mistakes={
        "the queries are counted too": queries_too,
        "keys without values": keys_only,
        "the latent without the rotated key": rotated_key_forgotten,
    },
)
exercise_one

# %%
exercise_one.check(cache_bytes)

# %%
exercise_one.show_solution()

# %% [markdown]
# **Two.** Causal attention of several heads, equal to the package's layer.


# %%
def causal_attention(x_BSD, q_kernel, k_kernel, v_kernel, o_kernel, heads):
    """Multi-head attention without positions. Kernels: [D, heads * width]; o: [heads * width, D].

    Project, split into heads, score, hide what is later, softmax, average, join, project.
    """
    raise NotImplementedError


# %% tags=["hide-input"]
def causal_attention_solution(x_BSD, q_kernel, k_kernel, v_kernel, o_kernel, heads):
    batch, length, _ = x_BSD.shape
    width = q_kernel.shape[-1] // heads
    q, k, v = (
        tf.reshape(x_BSD @ kernel, [batch, length, heads, width])
        for kernel in (q_kernel, k_kernel, v_kernel)
    )
    scores = tf.einsum("bihw,bjhw->bhij", q, k) / width**0.5
    earlier = tf.linalg.band_part(tf.ones([length, length], tf.bool), -1, 0)
    weights = tf.nn.softmax(tf.where(earlier, scores, -1e30))
    out = tf.einsum("bhij,bjhw->bihw", weights, v)
    return tf.reshape(out, [batch, length, heads * width]) @ o_kernel


def _attend_wrongly(x_BSD, q_kernel, k_kernel, v_kernel, o_kernel, heads, fault):
    batch, length, _ = x_BSD.shape
    width = q_kernel.shape[-1] // heads
    q, k, v = (
        tf.reshape(x_BSD @ kernel, [batch, length, heads, width])
        for kernel in (q_kernel, k_kernel, v_kernel)
    )
    scores = tf.einsum("bihw,bjhw->bhij", q, k)
    if fault != "scale":
        scores /= width**0.5
    earlier = tf.linalg.band_part(tf.ones([length, length], tf.bool), -1, 0)
    if fault == "after":
        weights = tf.where(earlier, tf.nn.softmax(scores), 0.0)
    else:
        weights = tf.nn.softmax(scores if fault == "mask" else tf.where(earlier, scores, -1e30))
    out = tf.einsum("bhij,bjhw->bihw", weights, v)
    return tf.reshape(out, [batch, length, heads * width]) @ o_kernel


def without_mask(*arguments):
    return _attend_wrongly(*arguments, fault="mask")


def mask_after_softmax(*arguments):
    return _attend_wrongly(*arguments, fault="after")


def without_scale(*arguments):
    return _attend_wrongly(*arguments, fault="scale")


def check_causal_attention(candidate):
    layer = MultiHeadAttention(4, 16, rope_theta=None, initializer_range=0.25)
    x = tf.random.stateless_normal([2, 12, 64], seed=(0, 3))
    wanted = layer(x).numpy()
    kernels = [
        tf.convert_to_tensor(projection.kernel)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    ]
    found = candidate(x, *kernels, 4)
    assert found is not None, "the function returns nothing"
    assert tuple(found.shape) == wanted.shape, f"shape {found.shape}, expected {wanted.shape}"
    found = found.numpy()
    alone = (x[:, :1] @ kernels[2] @ kernels[3]).numpy()
    assert np.allclose(found[:, :1], alone, rtol=1e-3, atol=1e-3), (
        "the first token sees itself alone, with weight 1. Hide later scores before the softmax."
    )
    shorter = candidate(x[:, :6], *kernels, 4).numpy()
    assert np.allclose(found[:, :6], shorter, rtol=1e-3, atol=1e-3), (
        "an output changes when later tokens are cut off: something looks ahead"
    )
    assert np.allclose(found, wanted, rtol=1e-3, atol=1e-3), (
        "causal, but not equal to the layer: are scores divided by the root of the head width, "
        "and is the last axis split into heads first, then width?"
    )


exercise_two = Exercise(
    "Complete `causal_attention` so that it equals `MultiHeadAttention(rope_theta=None)`.",
    check=check_causal_attention,
    solution=causal_attention_solution,
    mistakes={
        "no mask": without_mask,
        "the mask after the softmax": mask_after_softmax,
        "no scaling": without_scale,
    },
)
exercise_two

# %%
exercise_two.check(causal_attention)

# %%
exercise_two.show_solution()

# %% [markdown]
# ## What goes wrong
#
# | what you see | why | what to do |
# |---|---|---|
# | the loss is far too good, and generated text is nonsense | the mask is missing, so a token sees its successor | change a late token: earlier outputs must not move |
# | NaN in rows that are padded | minus infinity on every key, and the softmax divides 0 by 0 | a large finite number, as in `ds_attention` |
# | attention is one-hot from the first step | no division by the root of the width | the deviation of the scores should start near 1 or below |
# | a cache estimate is wrong by a factor of two | bytes of float32 for bfloat16, or keys without values | weigh the tensor: `memory_report` |
# | a low-rank fit of weights loses nearly everything | the singular values do not fall | look at the spectrum first |
# | a running sum stops growing | the addend is below half an ulp of the sum | sum in float32 |
#
# The last row, in bfloat16, which has 7 bits of mantissa: from 256 on the ulp is 2, and adding 1
# is rounded away.

# %%
total = tf.constant(0.0, tf.bfloat16)
for _ in range(1000):
    total += tf.constant(1.0, tf.bfloat16)
print("1,000 ones, summed in bfloat16:", float(total))
assert float(total) == 256

# %% [markdown]
# ## Checkpoint
#
# You can move on if you can say why:
#
# - scores are divided by $\sqrt{d}$, and what happens if they are not;
# - MHA at V3's shape would keep 32,768 numbers a token and layer;
# - the best error of rank $r$ is known from the singular values alone, and one latent for keys
#   and values is never worse than two of half the width;
# - DeepSeek-V3 holds 671B parameters and uses 37B for a token;
# - softmax and sigmoid pick the same experts and weigh them differently;
# - E4M3 is good to 6.25% in its band and useless outside of it.
#
# Next: [part 2, multi-head latent attention](2_latent_attention.md).

# %%
run.finish(
    mha_bytes_a_token=per_token,
    rank_error=float(error),
    parameters=totals.main,
    active=totals.active,
)
