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
#     title: "4 · Mixed precision"
#     minutes: 1.3
#     reading: 30
# ---

# %% [markdown]
# # 4 · Mixed precision
#
# DeepSeek-V3 was trained with matrix products of 8-bit numbers (section 3.3 of
# [arXiv 2412.19437](https://arxiv.org/abs/2412.19437)). An 8-bit float has 256 codes in all. This
# part reads them bit by bit, rounds to them by hand, and builds the scaled product that
# makes them good enough, forward and backward, until it equals `ds_precision.fp8_matmul`.
#
# ## What you will be able to do
#
# - decode a float of any format from its bits, and say where it is coarse;
# - round and saturate by hand, and say what happens below the smallest normal number;
# - explain with numbers why one scale a tensor fails and one scale a tile holds;
# - write a block-scaled product and both of its gradients;
# - say what sums of few bits, bfloat16 weights and float16 gradients lose, and what is done about
#   it;
# - look at the operands of a model in training and judge whether they fit.
#
# **Time:** 30 minutes. **Builds on:** [Foundations](1_foundations.md). The model of 4.7 has experts
# ([part 3](3_experts.md)), but nothing depends on how they work.

# %%
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from ds_model import CausalLM, ModelConfig
from ds_precision import (
    E4M3,
    E5M2,
    Fp8Policy,
    Fp8Recipe,
    cast,
    dequantize_blocks,
    fp8_matmul,
    quantize_blocks,
    watch_fp8,
)
from ds_precision.figures import plot_formats, plot_rounding
from ds_train import AdamW
from ds_train.data import state_of_the_union
from ds_train.notebook import PALETTE, Choice, Exercise, Question, Quiz, explore, start

run = start("masterclass-4", seed=0, tracker="none")
WHOLE = (10**6, 10**6)  # a block that holds any matrix of this part: one scale a tensor

# %% [markdown]
# ## 4.1 Three fields of bits
#
# A float is a sign, an exponent and a mantissa. E4M3 has 4 bits of exponent and 3 of mantissa, E5M2
# has 5 and 2, bfloat16 has 8 and 7. With $b = 2^{\text{exponent bits} - 1} - 1$:
#
# $$x = (-1)^s \cdot \begin{cases}
# 2^{e-b}\,(1 + m / 2^M) & e > 0 \quad\text{(normal)} \\
# 2^{1-b}\,(m / 2^M) & e = 0 \quad\text{(subnormal)}
# \end{cases}$$
#
# So numbers lie evenly between two powers of two, and twice as far apart after each. Below the
# smallest normal number the spacing stays as it is, down to zero.


# %%
def decode(codes, exponent_bits, mantissa_bits):
    bias = 2 ** (exponent_bits - 1) - 1
    sign = codes >> (exponent_bits + mantissa_bits)
    exponent = (codes >> mantissa_bits) % 2**exponent_bits
    fraction = (codes % 2**mantissa_bits) / 2**mantissa_bits
    normal = 2.0 ** (exponent - bias) * (1 + fraction)
    subnormal = 2.0 ** (1 - bias) * fraction
    return (-1.0) ** sign * np.where(exponent > 0, normal, subnormal)


for code in (0b0_0000_001, 0b0_0001_000, 0b0_0111_000, 0b0_0111_001, 0b1_1111_110):
    print(f"{code:08b} is {decode(np.array(code), 4, 3):g}")

# %% [markdown]
# All codes of the three formats, against what NumPy reads in the same bits as TensorFlow's types.
# The largest exponent is special: in E5M2 and bfloat16 it stands for infinity and NaN, as in
# float32. E4M3 can't spare eight codes for that: it has **no infinity**, and one NaN for each sign
# (all seven bits set).

# %%
bytes_256 = np.arange(256, dtype=np.uint8)
words = np.arange(2**16, dtype=np.uint16)
for codes, dtype, exponent_bits, mantissa_bits in (
    (bytes_256, E4M3.dtype, 4, 3),
    (bytes_256, E5M2.dtype, 5, 2),
    (words, tf.bfloat16, 8, 7),
):
    theirs = codes.view(dtype.as_numpy_dtype).astype(np.float32)
    ours = decode(codes.astype(np.int64), exponent_bits, mantissa_bits)
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[finite].astype(np.float32), theirs[finite])
    positive = theirs[finite & (theirs > 0)]
    print(
        f"{dtype.name:15} {finite.sum():5} finite codes, from {positive.min():.3g} to "
        f"{positive.max():.4g}, infinite: {np.isinf(theirs).sum()}, NaN: {np.isnan(theirs).sum()}"
    )
assert decode(np.array(0b0_1111_110), 4, 3) == E4M3.max == 448
assert decode(np.array(0b0_11110_11), 5, 2) == E5M2.max == 57344

# %%
plot_formats((E4M3, E5M2))

# %% [markdown]
# The saw of E4M3 is half as high (3 bits of mantissa against 2), its range much shorter. Its normal
# numbers reach from 2⁻⁶ to 448, subnormal ones down to 2⁻⁹; there the error grows until nothing is
# left.
#
# ## 4.2 Rounding and saturation
#
# To round is to find the spacing at a number, divide by it, round to a whole number (ties to even,
# so that errors do not all point one way), multiply back. What is too large becomes the largest
# number: it *saturates*.


# %%
def round_to(x, fmt):
    x = np.clip(np.asarray(x, np.float32), -fmt.max, fmt.max)
    exponent = np.frexp(x)[1] - 1  # of the power of two at or below |x|
    exponent = np.maximum(exponent, int(np.log2(fmt.smallest_normal)))  # subnormals: spacing stays
    spacing = np.ldexp(np.float32(1), exponent - fmt.mantissa_bits)
    return np.rint(x / spacing) * spacing


for x in (17, 18, 19, 300, 1000, 0.01, 0.001, 0.0009):
    print(f"{x:7} becomes {round_to(x, E4M3):.6g} in E4M3, {round_to(x, E5M2):.6g} in E5M2")

# %% [markdown]
# 17 lies in the middle of 16 and 18, and 19 in that of 18 and 20: each goes to the neighbour with
# an even mantissa. The same as `ds_precision.cast`, for numbers over the whole range and for those
# in the middle of two neighbours:

# %%
generator = np.random.default_rng(0)
spread = generator.normal(size=100_000) * 2.0 ** generator.uniform(-20, 20, 100_000)
numbers = decode(np.arange(0x7E), 4, 3)
middles = (numbers[:-1] + numbers[1:]) / 2
many = np.concatenate([spread, middles, -middles, [np.inf, -np.inf, 464, 465]]).astype(np.float32)
for fmt in (E4M3, E5M2):
    np.testing.assert_array_equal(round_to(many, fmt), tf.cast(cast(many, fmt), tf.float32))
normal = many[(np.abs(many) >= E4M3.smallest_normal) & (np.abs(many) <= E4M3.max)]
worst = np.max(np.abs(round_to(normal, E4M3) - normal) / np.abs(normal))
assert worst <= E4M3.worst_relative_error
print(f"{len(many):,} numbers rounded alike; worst error of a normal one in E4M3: {worst:.2%}")
print("a plain tf.cast of 1000:", tf.cast(tf.cast(1000.0, E4M3.dtype), tf.float32).numpy())

# %% [markdown]
# The last line is why saturation is not a detail: without it one large number becomes NaN, and the
# product that it takes part in too.
#
# ## 4.3 A scale for each tile
#
# E4M3 spans 18 powers of two, subnormals included. Real tensors have outliers. So numbers are
# divided by a scale first, chosen so that the largest becomes 448, and the product is multiplied by
# it afterwards. The question is **how many numbers share a scale**:
#
# $$s = \max|x| / 448, \qquad q = \mathrm{cast}(x / s), \qquad x \approx s\,q$$
#
# V3 gives one scale to each 1x128 tile of activations (one token, 128 channels), and to each
# 128x128 block of weights. An example with one outlier of a million among numbers of size 1:

# %%
x_RC = np.random.default_rng(1).normal(size=(256, 256)).astype(np.float32)
x_RC[40, 70] = 1e6
tiles = x_RC.reshape(256, 2, 128)
scales = np.abs(tiles).max(axis=-1) / E4M3.max
values = cast(tiles / scales[..., None], E4M3)

found = quantize_blocks(x_RC, block=(1, 128))
np.testing.assert_allclose(found.scales, scales, rtol=1e-6)
difference = np.abs(
    np.asarray(tf.cast(found.values, tf.float32))
    - np.asarray(tf.cast(values, tf.float32)).reshape(256, 256)
)
assert (difference > 0).mean() < 1e-3  # a last bit of the division may decide a tie
print("values", found.values.shape, found.values.dtype.name, " scales", found.scales.shape)
for row in (39, 40, 41):
    print(f"scales of row {row}:", "  ".join(f"{scale:.4g}" for scale in scales[row]))

# %%
rounded = {
    "one scale": dequantize_blocks(quantize_blocks(x_RC, WHOLE)).numpy(),
    "blocks 128x128": dequantize_blocks(quantize_blocks(x_RC, (128, 128))).numpy(),
    "tiles 1x128": dequantize_blocks(found).numpy(),
}
ordinary = np.abs(x_RC) < 100
norm = np.linalg.norm(x_RC[ordinary])
lost, error = {}, {}
for name, y in rounded.items():
    lost[name] = (y[ordinary] == 0).mean()
    error[name] = np.linalg.norm((y - x_RC)[ordinary]) / norm
    print(f"{name:15} {lost[name]:7.2%} became zero, error of the ordinary ones {error[name]:7.2%}")
assert lost["one scale"] > 0.9 and 0.2 < lost["blocks 128x128"] < 0.3
assert lost["tiles 1x128"] < 0.01 and error["tiles 1x128"] < 0.1
plot_rounding(x_RC, rounded)

# %% [markdown]
# With one scale nearly everything is lost to a single number. With blocks a quarter of the matrix
# is, with tiles 127 numbers at most. (A float has a range of its own, so it takes a large outlier:
# 4.10 shows from which size on. Whole numbers of 8 bits would fail far earlier.) Why not tiles for
# weights too, then? Weights have few outliers, and a square block serves `W` and its transpose
# alike: the same 8 bits in the forward product and in the input's gradient.
#
# ## 4.4 A block-scaled product
#
# `y = x W`, with tiles for `x [T, K]` and blocks for `W [K, N]`. Along the inner size `K` both
# change their scale every 128 numbers. So the sum is taken in pieces of 128: a product of plain
# 8-bit numbers, then the two scales:
#
# $$y_{tn} = \sum_{k} s^x_{t,k}\; s^W_{k,\lfloor n/128 \rfloor} \sum_{j \in \text{tile } k}
# q^x_{tj}\, q^W_{jn}$$

# %%
x_TK = tf.random.normal([64, 384])
w_KN = tf.random.normal([384, 256], stddev=0.05)
small_x = quantize_blocks(x_TK, (1, 128))
small_w = quantize_blocks(w_KN, (128, 128))
qx, qw = (tf.cast(small.values, tf.float32) for small in (small_x, small_w))
print("scales of x", small_x.scales.shape, " of W", small_w.scales.shape)

y_TN = tf.zeros([64, 256])
for k in range(3):
    inner = slice(128 * k, 128 * (k + 1))
    piece_TN = tf.matmul(qx[:, inner], qw[inner])
    scale_T1 = small_x.scales[:, k, None]
    scale_1N = tf.repeat(small_w.scales[k], 128)[None]
    y_TN += piece_TN * scale_T1 * scale_1N

theirs = fp8_matmul(x_TK, w_KN)
np.testing.assert_allclose(y_TN, theirs, rtol=1e-4, atol=1e-4)
exact = tf.matmul(x_TK, w_KN)
relative = (tf.norm(y_TN - exact) / tf.norm(exact)).numpy()
assert 0.005 < relative < 0.06
print(f"equal to fp8_matmul; {relative:.2%} away from the exact product")

# %% [markdown]
# Each operand is off by a few per cent and so is the result: errors of different signs mostly
# cancel in a sum, but so do its terms. What counts is that the error has no preferred direction.
#
# **Backward** there are two more products, with the gradient `dy` of the result:
#
# $$dx = Q(dy)\,Q(W)^\top \qquad dW = Q(x)^\top\,Q(dy)$$
#
# For `dx` the inner size is `N`: tiles of `dy` lie along its rows. For `dW` it is `T`: tiles run
# down the columns, 128x1, and `x` is read back from the 8 bits that it was kept in, then tiled
# anew.

# %%
dy_TN = tf.random.normal([64, 256], stddev=1e-4)


def read(x, block):
    return dequantize_blocks(quantize_blocks(x, block))


dx = tf.matmul(read(dy_TN, (1, 128)), read(w_KN, (128, 128)), transpose_b=True)
kept_x = dequantize_blocks(small_x)
dw = tf.matmul(read(kept_x, (128, 1)), read(dy_TN, (128, 1)), transpose_a=True)

with tf.GradientTape() as tape:
    tape.watch([x_TK, w_KN])
    y = fp8_matmul(x_TK, w_KN, Fp8Recipe())
their_dx, their_dw = tape.gradient(y, [x_TK, w_KN], output_gradients=dy_TN)
for ours, theirs in ((dx, their_dx), (dw, their_dw)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())
true_dw = tf.matmul(x_TK, dy_TN, transpose_a=True)
print(
    "gradients equal; dW", f"{tf.norm(dw - true_dw) / tf.norm(true_dw):.2%} away from the exact one"
)

# %% [markdown]
# All of this is arithmetic on numbers that were read back into float32: the same products and sums
# that FP8 hardware makes, not its speed. [The page on FP8](../../phases/1-fp8.md) says which
# arithmetic runs where.
#
# ## 4.5 Sums of few bits
#
# Hardware also rounds the *sum*. The paper reports about 14 bits for a running sum on the H800
# (section 3.3.2), and moves it to float32 every 128 numbers. With few bits a long sum loses the
# lower part of what it is given. All terms positive, so that the sum grows:


# %%
def sum_errors(inner):
    random = np.random.default_rng(inner)
    x = tf.constant(random.uniform(size=(32, inner)), tf.float32)
    w = tf.constant(random.uniform(size=(inner, 32)), tf.float32)
    exact = fp8_matmul(x, w).numpy()  # the same 8-bit operands, summed in float32
    recipes = {
        "14 bits": Fp8Recipe(accumulator_bits=14),
        "14 bits, promoted every 128": Fp8Recipe(accumulator_bits=14, promote_every=128),
    }
    return {
        name: float(np.abs(fp8_matmul(x, w, recipe) / exact - 1).mean())
        for name, recipe in recipes.items()
    }


inner_sizes = (128, 256, 512, 1024, 2048, 4096)
errors = {inner: sum_errors(inner) for inner in inner_sizes}
assert errors[4096]["14 bits"] > 5 * errors[4096]["14 bits, promoted every 128"]

# %% tags=["hide-input"]
figure = Figure(figsize=(7, 3.2), layout="constrained")
axes = figure.subplots()
for name, colour in zip(errors[128], (PALETTE["red"], PALETTE["blue"]), strict=True):
    axes.loglog(
        inner_sizes, [errors[n][name] for n in inner_sizes], "o-", color=colour, label=name, base=2
    )
axes.set_xlabel("inner size: numbers that are summed")
axes.set_ylabel("mean relative error of a sum")
axes.legend(frameon=False)
axes.grid(alpha=0.3)
figure

# %% [markdown]
# Cutting off always errs downwards, so errors add up: they grow with the length of the sum.
# Promotion stops that, because no narrow sum is ever longer than 128.
#
# ## 4.6 Master weights
#
# Weights are rounded for the product, but **kept** in float32. An update is the learning rate times
# something of size 1, much smaller than the weight. bfloat16 has 8 significant bits: below 1 its
# numbers lie 2⁻⁸ apart, so an update of less than half of that changes nothing. Not a little:
# nothing, however often it comes.

# %%
master, rough = tf.Variable(1.0), tf.Variable(tf.constant(1.0, tf.bfloat16))
path = []
for _ in range(1000):
    master.assign_sub(1e-4)
    rough.assign_sub(tf.constant(1e-4, tf.bfloat16))
    path.append((float(master), float(tf.cast(rough, tf.float32))))
print(f"after 1,000 updates of 0.0001: float32 {path[-1][0]:.4f}, bfloat16 {path[-1][1]:.4f}")
assert path[-1][1] == 1.0 and abs(path[-1][0] - 0.9) < 1e-3
weights = tf.Variable(tf.random.normal([1000], stddev=0.02))
step = 1e-5
kept = tf.cast(weights, tf.bfloat16)
moved = tf.cast(kept - tf.constant(step, tf.bfloat16), tf.float32) != tf.cast(kept, tf.float32)
print(f"of 1,000 weights of size 0.02, a step of {step} moves {np.mean(moved):.0%} in bfloat16")

# %% [markdown]
# Hence the rule of the paper (section 3.3.2): master weights and gradients in float32, products in
# 8 bits, between products bfloat16, AdamW's two moments in bfloat16.
#
# ## 4.7 Three precisions, the same batches
#
# A model of preset `tiny` (bytes, one dense and one expert layer), the same first weights and the
# same 60 batches, three dtype policies.

# %%
text = "\n".join(document.text for document in state_of_the_union()[-20:])
data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
STEPS = 60
starts = np.random.default_rng(0).integers(0, len(data) - 65, [STEPS, 4])
batches = data[starts[..., None] + np.arange(65)]
config = ModelConfig.preset("tiny").replace(num_nextn_predict_layers=0)


def cross_entropy(model, tokens):
    logits = model(tokens[:, :-1])
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tokens[:, 1:], logits))


def train(policy):
    keras.utils.set_random_seed(0)
    model = CausalLM(config, dtype=policy)
    first = model.blocks[0].mlp.gate_up_proj.kernel.numpy()
    optimizer = AdamW(1e-3, weight_decay=0.0)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(tokens):
        with tf.GradientTape() as tape:
            loss = cross_entropy(model, tokens)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients)
        return loss

    return model, first, np.array([float(step(tf.constant(tokens))) for tokens in batches])


runs = {
    "float32": train("float32"),
    "bfloat16": train("mixed_bfloat16"),
    "FP8": train(Fp8Policy()),
}
for _, first, _ in runs.values():
    np.testing.assert_array_equal(first, runs["float32"][1])

# %%
final = {name: losses[-20:].mean() for name, (_, _, losses) in runs.items()}
for name, loss in final.items():
    difference = loss / final["float32"] - 1
    print(f"{name:8} cross-entropy of the last 20 steps {loss:.4f} ({difference:+.2%} of float32)")
    assert abs(difference) < 0.03
    assert runs[name][2][:3].mean() - loss > 1.0  # it did learn

# %% tags=["hide-input"]
figure = Figure(figsize=(8, 3.2), layout="constrained")
left, right = figure.subplots(1, 2)
colours = (PALETTE["black"], PALETTE["orange"], PALETTE["blue"])
for (name, (_, _, losses)), colour in zip(runs.items(), colours, strict=True):
    left.plot(losses, color=colour, label=name, linewidth=1)
    right.plot(100 * (losses / runs["float32"][2] - 1), color=colour, linewidth=1)
left.set_ylabel("cross-entropy [nats]")
right.set_ylabel("above float32's [%]")
for axes in (left, right):
    axes.set_xlabel("optimizer step")
left.legend(frameon=False)
figure

# %% [markdown]
# The curves lie on each other at this scale. That is **not** evidence that FP8 trains as well as
# bfloat16: 60 steps of a model of width 64 have few outliers, short sums, and one seed. The width
# is even below a tile. The measurement with a larger model, 600 steps, and several seeds, with what
# is and what is not shown by it, stands on [the page on
# FP8](../../phases/1-fp8.md#does-it-train-as-well).
#
# ## 4.8 Looking at the operands
#
# `watch_fp8` calls a function for each operand that is rounded. So one can ask the trained model:
# how large do numbers get, how many become zero? Names end in `/input`, `/weight`, `/gradient`.

# %%
model = runs["FP8"][0]
seen = {}


def note(name, x, small, fmt):
    values = np.abs(np.asarray(tf.cast(small.values, tf.float32)))
    there = np.asarray(x) != 0
    seen[name.split("/", 1)[1]] = {
        "x": np.asarray(x),
        "amax": np.abs(x).max(),
        "underflow": (values[there] == 0).mean(),
        "scale": (np.min(small.scales), np.max(small.scales)),
    }


with watch_fp8(note), tf.GradientTape() as tape:
    loss = cross_entropy(model, tf.constant(batches[0]))
    tape.gradient(loss, model.trainable_variables)

print(f"{len(seen)} operands. Those of the dense feed-forward and of the experts:")
print(f"{'operand':45} {'largest':>9} {'to zero':>8}   scales")
for name, operand in sorted(seen.items()):
    if "mlp" in name:
        low, high = operand["scale"]
        print(
            f"{name:45} {operand['amax']:9.2e} {operand['underflow']:8.2%}"
            f"   {low:.1e} to {high:.1e}"
        )

# %% [markdown]
# Scales of 1 belong to tiles of zeros: rows that fill up an expert's last tile. Gradients are tiny.
# With a scale a tile hardly any of their numbers becomes zero; without one most would:

# %%
gradients = {name: o["x"] for name, o in seen.items() if name.endswith("/gradient")}
every = np.concatenate([x[x != 0].ravel() for x in gradients.values()])
vanish = (np.asarray(tf.cast(cast(every, E4M3), tf.float32)) == 0).mean()
print(f"without any scale {vanish:.2%} of {len(every):,} numbers of gradients would become zero")
assert vanish > 0.8

# %% [markdown]
# `watch_every` of a training file keeps such a table over a whole
# run; what grows there (a largest magnitude, a share of zeros, a scale that drifts) is an early
# sign of trouble.
#
# **E4M3 or E5M2 for gradients?** Earlier recipes took E5M2, for its range ([arXiv
# 2209.05433](https://arxiv.org/abs/2209.05433)). The real gradients that were just seen, both ways,
# with both kinds of scale:


# %%
def rounding_error(x, block, fmt):
    y = dequantize_blocks(quantize_blocks(x, block, fmt)).numpy()
    there = x != 0
    return np.linalg.norm(y - x) / np.linalg.norm(x), (y[there] == 0).mean()


table = {}
for fmt in (E4M3, E5M2):
    for kind, block in (("tiles", (1, 128)), ("one scale", WHOLE)):
        each = [rounding_error(x, block, fmt) for x in gradients.values() if np.any(x)]
        table[fmt.name, kind] = np.mean(each, axis=0)
        error, zero = table[fmt.name, kind]
        print(f"{fmt.name}, {kind:9}: error {error:.2%}, {zero:.3%} to zero")
assert table["E4M3", "tiles"][0] < 0.75 * table["E5M2", "tiles"][0]

# %% [markdown]
# E5M2 loses fewer numbers to zero and is about twice as far off for all the others. With a scale a
# tile there is hardly a range left that needs E5M2, so precision wins: V3 takes E4M3 for
# everything. The second and fourth row say something else too: in this small model one scale a
# tensor does almost as well: these gradients have no outlier of the size that 4.3 needed. The paper
# gives outliers of activations as its reason for tiles; this model does not show them.
#
# ## 4.9 float16: scaling the loss
#
# float16 has 10 bits of mantissa, but only 5 of exponent: what is below 2⁻²⁵ becomes zero. It has
# no scale of its own either. The old remedy ([arXiv 1710.03740](https://arxiv.org/abs/1710.03740)):
# multiply the **loss** by a large number. Every gradient is then larger by that factor, and is
# divided by it before the update. The same real gradients:

# %%
shares = {}
for power in (0, 8, 16):
    with np.errstate(over="ignore"):
        halves = (every * 2.0**power).astype(np.float16)
    shares[power] = (halves == 0).mean(), (np.abs(halves.astype(np.float32)) < 2.0**-14).mean()
    zero, coarse = shares[power]
    print(
        f"loss times 2^{power:<2}: {zero:.2%} zero, {coarse:.2%} below the smallest normal number, "
        f"{np.isinf(halves).mean():.2%} infinite"
    )
assert shares[16][1] < shares[0][1]

# %% [markdown]
# Too small a factor loses gradients, too large a one makes infinities. So it is moved during
# training: halved after a step whose gradient is not finite, which is skipped, and doubled after a
# long time without. `dtype_policy = "mixed_float16"` does that. bfloat16 has float32's exponent and
# needs none of it; FP8 has its scales, at every tile.
#
# ## 4.10 Try it: tiles and outliers
#
# 64 rows of 2,048 numbers of size 1; one in a thousand is an outlier of the chosen size.
#
# - Outliers of 100: does the tile matter? From which size on does one scale a tensor fail?
# - Halve the tile several times, for outliers of a million. What is gained each time, and what do
#   the scales cost in memory?
# - With E5M2: where does it beat E4M3?


# %% tags=["hide-input"]
def draw(tile, outlier, format):  # noqa: A002 - a control's name
    fmt = {"E4M3": E4M3, "E5M2": E5M2}[format]
    random = np.random.default_rng(0)
    base = random.normal(size=(64, 2048)).astype(np.float32)
    where = random.uniform(size=base.shape) < 1e-3
    sizes = np.array([1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])

    def error(size, block):
        x = np.where(where, np.sign(base) * size, base)
        y = dequantize_blocks(quantize_blocks(x, block, fmt)).numpy()
        return np.linalg.norm((y - x)[~where]) / np.linalg.norm(x[~where])

    for block, name, colour in (
        (WHOLE, "one scale a tensor", PALETTE["red"]),
        ((1, tile), f"tiles 1x{tile}", PALETTE["blue"]),
    ):
        left.loglog(sizes, [error(size, block) for size in sizes], "o-", color=colour, label=name)
        left.plot(
            outlier, error(outlier, block), "D", color=colour, markersize=10, fillstyle="none"
        )
    left.set_ylim(1e-2, 2)
    left.set_xlabel("size of the outliers (of the others: 1)")
    left.set_ylabel("relative error of the others")
    left.legend(frameon=False, fontsize="small")
    left.grid(alpha=0.3)
    right.bar(["values", "scales"], [8, 32 / tile], color=[PALETTE["sky"], PALETTE["blue"]])
    right.set_ylabel("memory [bits a number]")
    figure.suptitle(f"{format}: outliers of {outlier:g}: {error(outlier, (1, tile)):.1%} error")
    return figure


explore(
    draw,
    tile=Choice((16, 32, 64, 128, 512, 2048), 128),
    outlier=Choice((1.0, 1e2, 1e4, 1e5, 1e6), 1e5),
    format=("E4M3", "E5M2"),
)

# %% [markdown]
# ## Quiz

# %%
quiz = Quiz(
    Question(
        "What does E4M3's code 0 0000 101 stand for?",
        options=("5/8 of 2^-6", "(1 + 5/8) times 2^-7", "Zero, since the exponent is zero"),
        answer=0,
        why=(
            (
                "Exponent 0 means subnormal: no leading one, and the exponent of the smallest "
                "normal number, 1 - 7 = -6."
            ),
            "That would hold for a normal number; with exponent 0 there is no leading one.",
            "Only mantissa 0 is zero then; the others are the subnormal numbers.",
        ),
    ),
    Question(
        "One value of an activation grows to a million. What happens with one scale a tensor?",
        options=(
            "The large value overflows",
            "The large value is kept and most of the others become zero",
            "Every value is off by the same few per cent",
        ),
        answer=1,
        why=(
            "The scale follows the largest value, so it fits exactly.",
            "All others are divided by a scale made for it, and fall below the smallest subnormal.",
            "Only values within E4M3's range of normal numbers of the largest one are.",
        ),
    ),
    Question(
        "Why do weights have square blocks and activations tiles of one row?",
        options=(
            "Weights are larger matrices",
            "Square blocks serve W and its transpose; outliers lie in single tokens' channels",
            "The hardware multiplies squares only",
        ),
        answer=1,
        why=(
            "Size does not matter for precision; activations can be larger than weights.",
            (
                "The 8 bits of W are used in the forward product and, transposed, in the input's "
                "gradient. Activations have outliers, and a tile confines one to 128 channels of "
                "one token."
            ),
            "The grouping is a choice of the recipe; the sums take their scales afterwards.",
        ),
    ),
    Question(
        "A weight of 0.5 is kept in bfloat16, and each step would move it by 0.0001. After 1,000 "
        "steps it is",
        options=("about 0.4", "exactly 0.5", "0.4, with an error of a few per cent"),
        answer=1,
        why=(
            "That is what float32 would give.",
            (
                "The numbers next to 0.5 are 2^-9 below and 2^-8 above it: 0.0001 is less than "
                "half of either, so each step is rounded away."
            ),
            "Rounding errors of lost updates do not average out: each one is lost whole.",
        ),
    ),
    Question(
        "Why does promotion to float32 every 128 numbers help a sum of 14 bits?",
        options=(
            "A short sum stays small, so little of each new term is cut off",
            "Because the products are made in float32 then",
            "Because it makes the errors random",
        ),
        answer=0,
        why=(
            (
                "What is lost at each addition grows with the sum so far; the float32 sum that "
                "gathers the pieces has 24 bits."
            ),
            "Products are as before; only the sum changes place.",
            "Cutting off still errs in one direction, but only within 128 numbers.",
        ),
    ),
)
quiz

# %% [markdown]
# ## Exercise


# %%
def quantize_solution(x_RC, tile, scales_RQ=None):
    x_RQJ = tf.reshape(x_RC, [x_RC.shape[0], -1, tile])
    if scales_RQ is None:
        amax_RQ = tf.reduce_max(tf.abs(x_RQJ), axis=-1)
        scales_RQ = tf.where(amax_RQ == 0.0, 1.0, amax_RQ / 448.0)
    scaled = tf.clip_by_value(x_RQJ / scales_RQ[..., None], -448.0, 448.0)
    return tf.reshape(tf.cast(scaled, E4M3.dtype), x_RC.shape), scales_RQ


# %% tags=["hide-input"]
def check_quantize(quantize):
    random = np.random.default_rng(4)
    x = random.normal(size=(4, 64)).astype(np.float32)
    x[1, 5], x[2, 32:] = 1000.0, 0.0
    values, scales = quantize(tf.constant(x), 32)
    values, scales = np.asarray(tf.cast(values, tf.float32)), np.asarray(scales)
    assert scales.shape == (4, 2), (
        f"scales have shape {scales.shape}; 4 rows of 2 tiles need (4, 2): is there one a tile?"
    )
    assert np.ptp(scales[:, 0]) > 0, "all scales are the same: each tile has its own largest number"
    assert np.isfinite(values).all(), (
        "a tile of zeros gave NaN: 0/0; its scale can be anything else"
    )
    largest = np.abs(values.reshape(4, 2, 32)).max(axis=-1)[0, 0]
    assert largest == 448, (
        f"the largest number of a tile became {largest:g}; to use the whole of E4M3 it has to "
        "become 448 (240 is the largest of another format with the same fields)"
    )
    judge = quantize_blocks(x, (1, 32))
    np.testing.assert_allclose(scales[:2], judge.scales[:2], rtol=1e-5)
    np.testing.assert_allclose(values * np.repeat(scales, 32, 1), dequantize_blocks(judge), 0.13)
    given = tf.constant(np.full((4, 2), 0.01, np.float32))  # of an earlier step; now too small
    late, same = quantize(tf.constant(x), 32, given)
    late = np.asarray(tf.cast(late, tf.float32))
    np.testing.assert_array_equal(same, given, "given scales are to be used as they are")
    assert late[1, 5] == 448, (
        f"1000 with a given scale of 0.01 became {late[1, 5]}; E4M3 has no infinity: clip before "
        "the cast"
    )


def per_tensor(x_RC, tile, scales_RQ=None):
    if scales_RQ is None:
        scales_RQ = tf.fill([x_RC.shape[0], x_RC.shape[1] // tile], tf.norm(x_RC, np.inf) / 448.0)
    return quantize_solution(x_RC, tile, scales_RQ)


def to_240(x_RC, tile, scales_RQ=None):
    if scales_RQ is None:
        scales_RQ = quantize_solution(x_RC, tile)[1] * 448.0 / 240.0
    return quantize_solution(x_RC, tile, scales_RQ)


def without_saturation(x_RC, tile, scales_RQ=None):
    if scales_RQ is None:
        return quantize_solution(x_RC, tile)
    spread = tf.repeat(scales_RQ, tile, axis=1)
    return tf.cast(x_RC / spread, E4M3.dtype), scales_RQ


def zeros_over_zero(x_RC, tile, scales_RQ=None):
    if scales_RQ is None:
        x_RQJ = tf.reshape(x_RC, [x_RC.shape[0], -1, tile])
        scales_RQ = tf.reduce_max(tf.abs(x_RQJ), axis=-1) / 448.0
    return quantize_solution(x_RC, tile, scales_RQ)


# %%
exercise = Exercise(
    "Write `quantize(x_RC, tile, scales_RQ=None)`: give each tile of `tile` neighbours in a row "
    "the scale `amax / 448`, divide, and round to E4M3. Return values `[R, C]` of dtype "
    "`E4M3.dtype` and scales `[R, C / tile]`. If scales are given (those of an earlier step, say), "
    "use them instead: then numbers may be too large, and must saturate. Mind tiles of zeros. "
    "Use `tf.cast(..., E4M3.dtype)`, which rounds but does not saturate.",
    check=check_quantize,
    solution=quantize_solution,
    mistakes={
        "one scale for the tensor": per_tensor,
        "240 instead of 448": to_240,
        "no saturation": without_saturation,
        "a tile of zeros divided by zero": zeros_over_zero,
    },
)
exercise


# %%
def quantize(x_RC, tile, scales_RQ=None):
    raise NotImplementedError


# %%
exercise.check(quantize)

# %%
exercise.show_solution()

# %% [markdown]
# ## What goes wrong
#
# | what you see | why | what to do |
# |---|---|---|
# | NaN after a cast to E4M3 | it has no infinity; a plain cast makes NaN of what is too large | saturate: `ds_precision.cast` |
# | most of a tensor is zero after rounding | one outlier sets the scale of all | a scale for each tile |
# | the gradient through a cast is `None` | rounding has no useful derivative, and TensorFlow defines none | round inside a product with its own gradient, as `fp8_matmul` does |
# | the loss stops falling late in training, in bfloat16 | updates below the spacing of the weights | float32 master weights |
# | products are biased low, more so with long sums | a narrow sum that cuts off | promote it to float32 every 128 numbers |
# | float16 loss becomes NaN, or gradients are zero | range of 5 exponent bits | loss scaling, or bfloat16 |
# | a router chooses other experts than in float32 | rounded scores | keep router, norms, embedding and head in high precision |
# | FP8 is slower here than bfloat16 | numbers are rounded and read back; there is no FP8 unit in a CPU | expect numbers, not speed, from the emulation |
#
# The third row in code:

# %%
with tf.GradientTape() as tape:
    tape.watch(x_TK)
    y = tf.reduce_sum(tf.cast(cast(x_TK, E4M3), tf.float32))
print("gradient through a cast:", tape.gradient(y, x_TK))

# %% [markdown]
# ## Checkpoint
#
# - I can read a float's bits, and know that E4M3 ends at 448 without an infinity.
# - I can say what a scale a tile prevents, with the share of numbers lost in each case.
# - I know which way tiles lie in each of the three products, and which 8 bits are used twice.
# - Weights are kept in float32, because a small update of a coarse number is lost whole.
# - A small run in which three precisions look alike shows that the code works, and no more.
#
# Next: [Integration](5_integration.md), where attention, experts and precision become one model.
