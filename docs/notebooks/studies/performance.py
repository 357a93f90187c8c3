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
#     title: "Study: where the time goes"
#     minutes: 1
#     reading: 10
# ---

# %% [markdown]
# # Study: where the time goes
#
# **Question.** In a small `CausalLM`, which part of a training step takes the time, what does a
# batch do for prefill and decoding, and how far is all of it from the rate at which this machine
# multiplies matrices?
#
# ## What would count as an answer
#
# Fixed before measuring:
#
# 1. The parts, timed alone, add up to between 0.6 and 1.4 of the whole step: then the division
#    means something.
# 2. The training step reaches at least 20% of the machine's own rate for a float32 product.
# 3. Prefill reaches at least 20% of it.
# 4. Decoding eight rows writes at least twice the tokens a second of decoding one.
#
# All four are about speed. Nothing here is compared with other programs; that is what [the
# benchmarks](../../benchmarks.md) do, with a model many times this size and peers in turn. At a
# size that runs in seconds, starting operations weighs more than it does there.

# %%
import numpy as np
import tensorflow as tf
from IPython.display import Markdown
from matplotlib.figure import Figure

from ds_attention import CausalMask
from ds_model import CausalLM, ModelConfig, parameter_counts
from ds_precision import use_kernels
from ds_train import AdamW
from ds_train.losses import next_token_loss
from ds_train.notebook import PALETTE, benchmark, start

config = ModelConfig.preset("tiny").replace(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=192,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    num_nextn_predict_layers=0,
)
BATCH, LENGTH = 4, 64
TOKENS = BATCH * LENGTH
run = start("study-performance", seed=0, config={"batch": BATCH, "length": LENGTH})


# %% tags=["hide-input"]
def table(*rows):
    """Return rows, the first of them the head, as a Markdown table."""
    head, *body = ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return Markdown("\n".join([head, "|" + " --- |" * len(rows[0]), *body]))


# %% [markdown]
# ## The machine's own rate
#
# The best that TensorFlow's product of two square matrices reaches here, in this process, now. And
# whether the project's [compiled operations](../../how-to/make-it-fast.md) run, since everything
# below depends on it.

# %%
square = tf.random.normal([1024, 1024], seed=1)
product = benchmark(tf.function(tf.matmul, autograph=False), square, square, repeats=10)
rate = 2 * 1024**3 / product.low
compiled = use_kernels(square)
print(f"{rate / 1e9:.0f} GFLOP/s; compiled operations: {'yes' if compiled else 'no'}")

# %% [markdown]
# ## A training step, whole and in parts
#
# The whole: forward, loss, backward, AdamW. The parts are the model's own layers on inputs of the
# same shape, each with its gradient, times the number of times that they occur; the optimizer is
# timed on the whole model's variables. `ds_train.losses` is internal and may change any day.

# %%
model = CausalLM(config)
counts = parameter_counts(config)
optimizer = AdamW(1e-4)
optimizer.build(model.trainable_variables)
ids = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, LENGTH + 1))
ids = tf.constant(ids, tf.int32)


def training_step(tokens):
    with tf.GradientTape() as tape:
        loss = next_token_loss(model(tokens[:, :-1]), tokens)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply(gradients)
    return loss


positions = tf.range(LENGTH)[None]
mask = CausalMask(positions, tf.constant(LENGTH))
h_BSD = tf.random.normal([BATCH, LENGTH, config.hidden_size], seed=2)
dense, moe = model.blocks[0], model.blocks[1]


def with_gradient(function, variables):
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
            loss = tf.reduce_sum(y * y) if y.shape.rank else y
        return tape.gradient(loss, [x, *variables])

    return tf.function(step, autograph=False)


head_variables = model.lm_head.trainable_variables
PARTS = {
    "attention": (
        with_gradient(
            lambda x: dense.self_attn(x, positions, mask), dense.self_attn.trainable_variables
        ),
        config.num_hidden_layers,
    ),
    "dense feed-forward": (
        with_gradient(dense.mlp, dense.mlp.trainable_variables),
        config.first_k_dense_replace,
    ),
    "experts": (
        with_gradient(lambda x: moe.mlp(x)[0], moe.mlp.trainable_variables),
        config.num_hidden_layers - config.first_k_dense_replace,
    ),
    "norms": (
        with_gradient(dense.input_layernorm, dense.input_layernorm.trainable_variables),
        2 * config.num_hidden_layers + 1,
    ),
    "head and loss": (
        with_gradient(lambda x: next_token_loss(model.head(x), ids), head_variables),
        1,
    ),
}
gradients = [tf.ones_like(variable) * 1e-3 for variable in model.trainable_variables]
update = tf.function(lambda: optimizer.apply(gradients), autograph=False)
whole = benchmark(tf.function(training_step, autograph=False), ids, repeats=7)
timed = {name: (benchmark(f, h_BSD, repeats=7), times) for name, (f, times) in PARTS.items()}
timed["optimizer"] = (benchmark(update, repeats=7), 1)
total = sum(times * t.median for t, times in timed.values())
for name, (t, times) in timed.items():
    run.log(**{f"{name.replace(' ', '_')}_ms": 1e3 * times * t.median})
table(
    ("part", "times", "each, median [ms]", "quartiles [ms]", "of all parts", "first call [s]"),
    *(
        (
            name,
            times,
            f"{1e3 * t.median:.2f}",
            f"{1e3 * t.low:.2f} to {1e3 * t.high:.2f}",
            f"{times * t.median / total:.0%}",
            f"{t.first:.2f}",
        )
        for name, (t, times) in timed.items()
    ),
    (
        "**whole step**",
        1,
        f"{1e3 * whole.median:.2f}",
        f"{1e3 * whole.low:.2f} to {1e3 * whole.high:.2f}",
        f"parts add up to {total / whole.median:.2f} of it",
        f"{whole.first:.2f}",
    ),
)

# %% [markdown]
# The first call traces and compiles the graph; a run of thousands of steps pays it once, a test of
# one step pays little else.
#
# A training step multiplies each active weight three times a token (forward, and both gradients),
# two operations each: $6\,N\,T$ floating-point operations for $N$ active parameters and $T$ tokens.
# That leaves out attention's scores, so the share is understated.

# %%
train_share = 6 * counts.active * TOKENS / whole.median / rate
print(f"{counts.active:,} active of {counts.main:,} parameters; {train_share:.1%} of the rate")

# %% [markdown]
# ## Prefill and decoding over the batch
#
# Prefill: logits of the last position of 64 tokens. Decoding: the time for 13 new tokens less the
# time for one, so that the prompt is not in it. One graph serves every batch.

# %%
ROWS, PROMPT, NEW = [1, 4, 8], 64, 12
prefill = tf.function(
    lambda tokens: model(tokens, logits_to_keep=1),
    [tf.TensorSpec([None, None], tf.int32)],
    autograph=False,
)
served = []
for rows in ROWS:
    prompt = np.random.default_rng(rows).integers(0, config.vocab_size, (rows, PROMPT))

    def write(count, prompt=prompt):
        return model.generate(prompt, max_new_tokens=count, eos_token_id=())

    first = benchmark(prefill, tf.constant(prompt, tf.int32), repeats=5)
    one, many = (benchmark(write, count, repeats=5) for count in (1, NEW + 1))
    decode = max((many.median - one.median) / NEW, 1e-9)
    share = 2 * counts.active * rows * PROMPT / first.median / rate
    served.append((rows, first, decode, share, one.first))
    run.log(step=rows, prefill_ms=1e3 * first.median, decode_ms=1e3 * decode)
table(
    (
        "rows",
        "prefill [ms]",
        "prefill [tokens/s]",
        "of the rate",
        "a decoding step [ms]",
        "decoding [tokens/s]",
        "of the rate",
    ),
    *(
        (
            rows,
            f"{1e3 * t.median:.1f} ({1e3 * t.low:.1f} to {1e3 * t.high:.1f})",
            f"{rows * PROMPT / t.median:,.0f}",
            f"{share:.1%}",
            f"{1e3 * decode:.2f}",
            f"{rows / decode:,.0f}",
            f"{2 * counts.active * rows / decode / rate:.2%}",
        )
        for rows, t, decode, share, _ in served
    ),
)

# %% tags=["hide-input"]
figure = Figure(figsize=(7.5, 3.2), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
names = list(timed)
left.barh(names, [1e3 * n * t.median for t, n in timed.values()], color=PALETTE["blue"])
left.set(xlabel="in one training step [ms]")
left.invert_yaxis()
right.plot(ROWS, [r / d for r, _, d, *_ in served], "o-", color=PALETTE["blue"], label="decoding")
right.plot(
    ROWS,
    [r * PROMPT / t.median for r, t, *_ in served],
    "o-",
    color=PALETTE["orange"],
    label="prefill",
)
right.set(xlabel="rows", ylabel="tokens a second", yscale="log", xticks=ROWS)
right.legend(frameon=False)
run.figure("where_time_goes", figure)
figure

# %% [markdown]
# A decoding step reads all weights that it touches for few rows: its share of the rate of large
# products must be small, and a batch is what raises it.
#
# ## Conclusion
#
# Computed from the cells above.

# %%
sums = total / whole.median
best_prefill = max(share for *_, share, _ in served)
gain = (ROWS[-1] / served[-1][2]) / (ROWS[0] / served[0][2])
criteria = [
    ("1. parts add up to 0.6 to 1.4 of the step", f"{sums:.2f}", 0.6 <= sums <= 1.4),
    ("2. training at 20% of the machine's rate", f"{train_share:.1%}", train_share >= 0.2),
    ("3. prefill at 20% of it", f"{best_prefill:.1%} at best", best_prefill >= 0.2),
    ("4. eight rows decode twice as fast as one", f"{gain:.1f} x", gain >= 2),
]
run.finish(
    gflops=rate / 1e9,
    compiled_operations=compiled,
    parts_over_whole=float(sums),
    training_share=float(train_share),
    prefill_share=float(best_prefill),
    decoding_gain=float(gain),
    met=[bool(met) for *_, met in criteria],
)
table(
    ("criterion", "measured", "result"),
    *((text, found, "met" if met else "**not met**") for text, found, met in criteria),
)

# %% [markdown]
# Where criteria 2 and 3 are not met, the table of parts says where to look, and the line about
# compiled operations what ran: they are written for AVX-512, and processors without it take stock
# TensorFlow's, which are faster there.
#
# ## What to try next
#
# - `ModelConfig.preset("bench")` in the place of this one: which share grows with the width?
# - `CausalLM(config, dtype="mixed_bfloat16")`, with the machine's rate measured in bfloat16 as
#   well.
# - A longer `LENGTH`: attention's share is the one that grows.
# - [The benchmarks](../../benchmarks.md), for the same figures beside other programs.
