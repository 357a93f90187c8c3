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
#     title: "5 · Integration"
#     minutes: 2.8
#     reading: 45
# ---

# %% [markdown]
# # 5 · Integration
#
# Attention, experts and number formats are parts. This part puts them together: a block, a stack
# of blocks, a language model with a second head that looks one token further. You build the
# forward pass and the loss by hand from the layers, compare both with the package, look at where
# gradients go, and then train a small model until it writes.
#
# ## What you will be able to do
#
# - write the pre-norm block and the whole forward pass of DeepSeek-V3 in a dozen lines;
# - count the parameters of any configuration on paper;
# - say which embedding meets which hidden state in multi-token prediction (MTP);
# - write the training loss: next token, MTP and balance, each with its labels in the right place;
# - check a gradient by finite differences, and know when that check misleads;
# - train a small model, measure it in bits per byte, and let it write faster with drafts.
#
# **Time:** 45 minutes. **Builds on:** [latent attention](2_latent_attention.md) and
# [experts](3_experts.md).

# %%
import json
import math
import os
import time

# Stock operations, which take much the same time on every processor; before any layer is made.
os.environ.setdefault("DS_PRECISION_KERNELS", "off")

import numpy as np
import tensorflow as tf
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ds_model import CausalLM, ModelConfig, Tokenizer, parameter_counts
from ds_moe.figures import plot_expert_load
from ds_train import Callback, TrainConfig, Trainer
from ds_train.data import state_of_the_union
from ds_train.evaluation import bits_per_byte, xz_bits_per_byte
from ds_train.figures import plot_loss
from ds_train.notebook import PALETTE, Choice, Exercise, Question, Quiz, benchmark, explore, start

run = start("masterclass-5", seed=0, tracker="none")

# %% tags=["hide-input"]


def table(header, rows):
    """Show rows as a small table."""
    cells = ["<tr>" + "".join(f"<td>{value}</td>" for value in row) + "</tr>" for row in rows]
    head = "".join(f"<th>{name}</th>" for name in header)
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table>")


# %% [markdown]
# Letters at the end of names say what the axes are: `B` batch, `S` sequence, `D` hidden_size,
# `T` tokens (`B * S`), `E` experts, `K` experts a token, `V` vocabulary.

# %% [markdown]
# ## 5.1 The block
#
# Think of the hidden state $h$ as a notice board that runs through all layers. No layer replaces
# it. Each reads a normed copy and *adds* what it found:
#
# $$ h' = h + \mathrm{MLA}(\mathrm{RMSNorm}(h)), \qquad
#    h'' = h' + \mathrm{FFN}(\mathrm{RMSNorm}(h')) $$
#
# $$ \mathrm{RMSNorm}(x) = \frac{x}{\sqrt{\frac{1}{D}\sum_j x_j^2 + \epsilon}} \odot w $$
#
# The norm stands before the layer and not after the sum ("pre-norm"). So there is one path from
# the last layer to the first on which nothing but additions happens, and a gradient travels it
# unchanged.
#
# ```mermaid
# flowchart LR
#   h["h"] --> n1[RMSNorm] --> mla[MLA] --> p1((+))
#   h --> p1
#   p1 --> n2[RMSNorm] --> ffn["FFN: dense, or experts"] --> p2((+))
#   p1 --> p2
#   p2 --> out["h of the next block"]
# ```
#
# The teaching model `tiny` has every branch of the architecture in two blocks. Its weights are
# drawn five times as wide as usual here, so that every layer has something to say.

# %%
config = ModelConfig.preset("tiny").replace(initializer_range=0.1)
model = CausalLM(config)
ids_BS = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12))
table(
    ["block", "attention", "feed-forward"],
    [
        [i, type(block.self_attn).__name__, type(block.mlp).__name__]
        for i, block in enumerate(model.blocks)
    ],
)

# %% [markdown]
# The first `first_k_dense_replace` blocks have a dense feed-forward, the rest have experts
# [V3: 3 of 61]. The first layers see little but the token itself; a router there has little to
# go by.
#
# Now the norm and the block. The layers `self_attn` and `mlp` are the ones of the earlier parts.

# %%


def rms_norm(x, weight, epsilon=config.rms_norm_eps):
    """Divide by the root mean square over the last axis."""
    return x * tf.math.rsqrt(tf.reduce_mean(x**2, -1, keepdims=True) + epsilon) * weight


def run_block(block, h_BSD):
    """Do one pre-norm block; a dense one has no routing."""
    h_BSD = h_BSD + block.self_attn(rms_norm(h_BSD, block.input_layernorm.weight))
    x_BSD = rms_norm(h_BSD, block.post_attention_layernorm.weight)
    y_BSD, routing = block.mlp(x_BSD) if block.moe else (block.mlp(x_BSD), None)
    return h_BSD + y_BSD, routing


h_BSD = tf.gather(tf.convert_to_tensor(model.embed_tokens.embeddings), ids_BS)
sizes = [float(tf.sqrt(tf.reduce_mean(h_BSD**2)))]
for block in model.blocks:
    h_BSD, routing = run_block(block, h_BSD)
    sizes.append(float(tf.sqrt(tf.reduce_mean(h_BSD**2))))
print("root mean square of h after the embedding and each block:", np.round(sizes, 3))

# %% [markdown]
# What is added piles up: $h$ grows from block to block. That is why a last norm stands before the
# head. The embedding is a lookup, the head a matrix product (`lm_head`; with
# `tie_word_embeddings` it is the embedding transposed, in V3 it is a matrix of its own).

# %%


def forward(model, ids_BS):
    """Return the normed hidden states, the logits and the routings."""
    h_BSD = tf.gather(tf.convert_to_tensor(model.embed_tokens.embeddings), ids_BS)
    routings = []
    for block in model.blocks:
        h_BSD, routing = run_block(block, h_BSD)
        routings += [routing] if block.moe else []
    h_BSD = rms_norm(h_BSD, model.norm.weight)
    return h_BSD, h_BSD @ tf.convert_to_tensor(model.lm_head.kernel), routings


h_BSD, logits_BSV, routings = forward(model, ids_BS)
np.testing.assert_allclose(logits_BSV, model(ids_BS), rtol=1e-5, atol=1e-5)
print("logits", logits_BSV.shape, "equal to the package's")

# %% [markdown]
# That is the model. Everything else in `ds_model` is there to load, to save, to decode and to
# check.
#
# ## 5.2 Why the norm stands where it stands
#
# The sketch below stacks blocks $h \leftarrow h + W\,\mathrm{norm}(h)$ of random matrices, once as
# above, once with the norm after the sum, once without the sum. Left: how large $h$ is on its way.
# Right: how large the gradient of the output is with respect to each block's input. Training wants
# the right-hand curve flat.

# %% tags=["hide-input"]


def stack(depth, form, spread, width=64):
    """Return the size of h and of the gradient at each block's input."""
    rng = np.random.default_rng(0)
    weights = [
        tf.constant(rng.normal(0, spread / width**0.5, (width, width)), tf.float32)
        for _ in range(depth)
    ]
    h = tf.constant(rng.normal(size=(32, width)), tf.float32)
    inputs = []
    with tf.GradientTape() as tape:
        tape.watch(h)
        for w in weights:
            inputs.append(h)
            if form == "pre-norm":
                h = h + rms_norm(h, 1.0) @ w
            elif form == "post-norm":
                h = rms_norm(h + h @ w, 1.0)
            else:
                h = tf.nn.relu(h @ w)
        # A fixed direction of the output stands for a loss.
        loss = tf.reduce_sum(h * tf.constant(rng.normal(size=h.shape), tf.float32))
    gradients = tape.gradient(loss, inputs)
    size = [float(tf.sqrt(tf.reduce_mean(x**2))) for x in inputs]
    return size, [float(tf.norm(g)) for g in gradients]


def draw_stack(depth, form, spread):
    """Draw both curves of a form over those of pre-norm."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    forms = dict.fromkeys(["pre-norm", form])
    for name, colour in zip(forms, (PALETTE["blue"], PALETTE["orange"]), strict=False):
        size, gradient = stack(depth, name, spread)
        left.plot(size, color=colour, label=name)
        right.plot(gradient, color=colour, label=name)
    for axes, label in ((left, "root mean square of h"), (right, "norm of the gradient")):
        axes.set_yscale("log")
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    return figure


explore(
    draw_stack,
    depth=Choice((8, 32, 64), 32),
    form=Choice(("post-norm", "no residual", "pre-norm"), "no residual"),
    spread=Choice((0.5, 1.0, 2.0), 1.0),
)

# %% [markdown]
# Try it: how does the gradient of the *first* block change with depth in each form? At which
# `spread` does "no residual" keep its gradient, and how narrow is that window? What does the sum of
# many additions do to $h$?
#
# Without the sum the gradient vanishes or explodes, by a factor for every block. With it, it is
# there at every depth; in pre-norm it grows a little towards the first block, since each block
# adds paths. Post-norm looks as good in this sketch. In real transformers it divides the residual
# path by the norm in every block, and needs a slow warm-up to survive that (arXiv 2002.04745).

# %%
first = {form: stack(32, form, 1.0)[1][0] for form in ("pre-norm", "no residual")}
assert first["pre-norm"] > 100 * first["no residual"]
print({form: f"{norm:.2g}" for form, norm in first.items()}, "at the first of 32 blocks")

# %% [markdown]
# ## 5.3 What there is to learn: parameters
#
# A matrix from $a$ to $b$ numbers has $ab$ parameters. With the names of `config.json`:

# %%


def count_attention(c):
    """Count the weights of one latent attention."""
    heads, key = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
    query = c.hidden_size * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * heads * key
    latent = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    expand = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    return query + latent + expand + heads * c.v_head_dim * c.hidden_size


def count_experts(c, routed):
    """Count the weights of `routed` experts, the shared ones and the router."""
    expert = 3 * c.hidden_size * c.moe_intermediate_size  # gate, up, down
    return (routed + c.n_shared_experts) * expert + c.hidden_size * c.n_routed_experts


def count(c, routed=None):
    """Return the parts of the main model, and one MTP module."""
    routed = c.n_routed_experts if routed is None else routed
    dense, depth = c.first_k_dense_replace, c.num_hidden_layers
    moe = count_experts(c, routed)
    return {
        "embedding": c.vocab_size * c.hidden_size,
        "attention": depth * count_attention(c),
        "dense feed-forward": dense * 3 * c.hidden_size * c.intermediate_size,
        "experts and routers": (depth - dense) * moe,
        "norms": (2 * depth + 1) * c.hidden_size,
        "head": c.vocab_size * c.hidden_size,
    }, (
        # Two norms on the way in, the projection, a block with its two norms, one norm on the
        # way out; the router's bias, which no gradient reaches.
        5 * c.hidden_size + 2 * c.hidden_size**2 + count_attention(c) + moe + c.n_routed_experts
    )


# %%
names = {"tiny": config, "V3": ModelConfig.preset("v3-671b")}
for each in names.values():
    parts, mtp = count(each)
    known = parameter_counts(each)
    assert sum(parts.values()) == known.main
    assert mtp == known.mtp
    active = count(each, each.num_experts_per_tok)[0]
    assert sum(active.values()) - active["embedding"] == known.active

by_name = {name: count(each) for name, each in names.items()}
rows = [
    [part, *(f"{found[0][part]:,}" for found in by_name.values())] for part in by_name["tiny"][0]
]
rows.append(["<b>main model</b>", *(f"{sum(found[0].values()):,}" for found in by_name.values())])
rows.append(["MTP module", *(f"{found[1]:,}" for found in by_name.values())])
rows.append(
    ["active for one token", *(f"{parameter_counts(each).active:,}" for each in names.values())]
)
table(["part", *names], rows)

# %% [markdown]
# The counts agree with `ds_model.parameter_counts` to the last digit, active ones included: those
# that take part in the products of one token, without the embedding, of which a token reads one
# row. In V3 nearly all weights are experts, and one token uses one in eighteen of the whole.

# %% [markdown]
# ## 5.4 One token further: MTP
#
# The main model turns position $i$ into a prediction of token $i+1$. MTP module $k$ predicts
# token $i+k+1$ (arXiv 2412.19437, section 2.2). It would be unfair to let it guess what lies
# between, so it is given the embedding of token $i+k$, beside the hidden state of depth $k-1$
# (eq. 21):
#
# $$ h'^{\,k}_i = M_k \, [\mathrm{RMSNorm}(\mathrm{Emb}(t_{i+k})) \,;\,
#    \mathrm{RMSNorm}(h^{k-1}_i)] $$
#
# (the released weights put the embedding first; the paper's formula has the other order). Then one
# block, a norm, and the *same* embedding and head. Who meets whom, for $k = 1$:

# %% tags=["hide-input"]
words = ["The", "state", "of", "our", "Union", "is", "strong"]
figure = Figure(figsize=(7, 2.9), layout="constrained")
axes = figure.subplots()
rows_shown = [
    ("hidden state of position i", 0, PALETTE["sky"]),
    ("embedding of token i + 1", 1, PALETTE["yellow"]),
    ("main model predicts", 1, "white"),
    ("MTP module 1 predicts", 2, "white"),
]
for line, (label, shift, colour) in enumerate(rows_shown):
    axes.text(-0.7, -line, label, ha="right", va="center")
    for i in range(len(words) - 2):
        axes.add_patch(Rectangle((i - 0.45, -line - 0.35), 0.9, 0.7, fc=colour, ec="black", lw=0.7))
        axes.text(i, -line, words[i + shift], ha="center", va="center")
for i in range(len(words) - 2):
    axes.text(i, 0.65, f"i = {i}", ha="center", va="center", fontsize="small")
axes.set_xlim(-3.9, len(words) - 2.4)
axes.set_ylim(-3.6, 0.95)
axes.set_axis_off()
figure

# %% [markdown]
# A sequence of $S$ tokens gives $S-k$ positions at depth $k$: the last $k$ have no token $i+k$ to
# be given. In the released models $h^0$ is the main model's hidden state *after* its final norm.

# %%


def run_mtp(model, h_BSD, ids_BS):
    """Return the logits of MTP module 1, and its routing."""
    module = model.mtp[0]
    ahead_BSD = tf.gather(tf.convert_to_tensor(model.embed_tokens.embeddings), ids_BS[:, 1:])
    joined = tf.concat(
        [rms_norm(ahead_BSD, module.enorm.weight), rms_norm(h_BSD[:, :-1], module.hnorm.weight)],
        axis=-1,
    )
    out_BSD, routing = run_block(module.block, joined @ tf.convert_to_tensor(module.eh_proj.kernel))
    out_BSD = rms_norm(out_BSD, module.norm.weight)
    return out_BSD @ tf.convert_to_tensor(model.lm_head.kernel), routing


mtp_BSV, mtp_routing = run_mtp(model, h_BSD, ids_BS)
np.testing.assert_allclose(mtp_BSV, model.mtp_logits(ids_BS)[0], rtol=1e-5, atol=1e-5)
print("main", logits_BSV.shape, "MTP", mtp_BSV.shape)

# %% [markdown]
# The chain stays causal: logits at position $i$ must not change when a token after $i+1$ does.

# %%
other_BS = ids_BS.copy()
other_BS[:, 8:] = (other_BS[:, 8:] + 1) % config.vocab_size
moved = np.abs(model.mtp_logits(other_BS)[0] - mtp_BSV).max(axis=(0, 2))
print("largest change of the MTP logits at each position:", np.round(moved, 4))
assert moved[:7].max() < 1e-4 < moved[7:].min()

# %% [markdown]
# Token 8 is the first that changed, and position 7 the first that sees it: position $i$ is given
# token $i+1$.

# %% [markdown]
# ## 5.5 The loss
#
# Three terms (eq. 17 to 20 and 24 to 25), with $\lambda$ = 0.3, later 0.1, and $\alpha$ = 0.0001:
#
# $$ L = \mathrm{CE} + \lambda \cdot \frac{1}{K_{\mathrm{MTP}}}\sum_k \mathrm{CE}_k
#    + \alpha \sum_{\text{layers}} \sum_e f_e P_e $$
#
# $f_e$ is the share of choices that went to expert $e$ times the number of experts, $P_e$ the
# mean share of the scores that it got, both within one sequence. Even routing gives 1 a layer. It
# is a small fence: the real balancing is done by the bias, [as in part 3](3_experts.md).

# %%


def cross_entropy(logits_BSV, labels_BS):
    """Return the mean of -log P(label), in nats."""
    log_p_BSV = tf.nn.log_softmax(logits_BSV)
    return -tf.reduce_mean(tf.gather(log_p_BSV, labels_BS, batch_dims=2))


def balance(routing, batch):
    """Return the sum of f P over experts, mean over sequences."""
    experts, chosen = routing.scores.shape[-1], routing.indices.shape[-1]
    picked_TE = tf.reduce_sum(tf.one_hot(routing.indices, experts), axis=1)
    f_BE = tf.reduce_mean(tf.reshape(picked_TE, [batch, -1, experts]), 1) * experts / chosen
    share_TE = routing.scores / tf.reduce_sum(routing.scores, -1, keepdims=True)
    p_BE = tf.reduce_mean(tf.reshape(share_TE, [batch, -1, experts]), 1)
    return tf.reduce_mean(tf.reduce_sum(f_BE * p_BE, -1))


def training_loss(model, tokens_BS, mtp_weight=0.3, alpha=1e-4):
    """Return the loss and its parts; `tokens_BS` has one token more than the input."""
    inputs = tokens_BS[:, :-1]
    h_BSD, logits_BSV, routings = forward(model, inputs)
    mtp_BSV, mtp_routing = run_mtp(model, h_BSD, inputs)
    parts = {
        "cross_entropy": cross_entropy(logits_BSV, tokens_BS[:, 1:]),
        "mtp_cross_entropy": cross_entropy(mtp_BSV, tokens_BS[:, 2:]),
        "balance_loss": tf.add_n([balance(r, len(inputs)) for r in [*routings, mtp_routing]]),
    }
    loss = parts["cross_entropy"] + mtp_weight * parts["mtp_cross_entropy"]
    return loss + alpha * parts["balance_loss"], parts


# %% [markdown]
# Is that the loss that the trainer minimises? Give it text for exactly one batch, compute the
# loss by hand from the same weights, then let it do one step and compare with what it reports. A
# batch of two sequences of 16 inputs is 33 tokens: the label of the first sequence's last input
# is the second's first.

# %%


class Watch(Callback):
    """Keep what the trainer says of each step."""

    def __init__(self):
        self.steps = []

    def on_step(self, metrics):
        self.steps.append(metrics)


one_step = TrainConfig.from_dict(
    {
        "model": {"preset": "tiny", "initializer_range": 0.1},
        "data": {"sequence_length": 16},
        "schedule": {"peak": 1e-3, "warmup_steps": 0},
        "train": {"steps": 1, "batch_size": 2},
    }
)
text = np.random.default_rng(1).integers(0, 256, 33).astype(np.uint16)
watch = Watch()
trainer = Trainer(one_step, text, run.folder / "one-step", callbacks=[watch])
batch_BS = np.stack([text[:17], text[16:]]).astype(np.int32)
loss, parts = training_loss(trainer.model, batch_BS)
trainer.train()

reported = watch.steps[0]
rows = [["loss", f"{loss:.6f}", f"{reported.loss:.6f}"]]
np.testing.assert_allclose(loss, reported.loss, rtol=1e-5)
for name, value in parts.items():
    np.testing.assert_allclose(value, getattr(reported, name), rtol=1e-5)
    rows.append([name, f"{value:.6f}", f"{getattr(reported, name):.6f}"])
table(["", "by hand", "the trainer's step"], rows)

# %% [markdown]
# A model that knows nothing gives each of $V$ tokens $1/V$ and has a cross-entropy of $\ln V$.
# Random weights as wide as these do a little worse: they are sure of wrong things.

# %%
print(f"ln {config.vocab_size} = {math.log(config.vocab_size):.3f} nats")

# %% [markdown]
# ## 5.6 Where gradients go
#
# One backward pass, and the norm of what each part receives.

# %%
variables = model.trainable_variables
tokens_BS = np.random.default_rng(2).integers(0, config.vocab_size, (4, 33))
with tf.GradientTape() as tape:
    loss, _ = training_loss(model, tokens_BS)
gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, variables)]


def part_of(path):
    """Return the layer and the part that a variable belongs to."""
    pieces = path.split("/")[1:-1]  # without the model's name and the variable's own
    return "/".join(pieces[: 3 if pieces[:2] == ["mtp_0", "block"] else 2])


squares = {}
for variable, gradient in zip(variables, gradients, strict=True):
    part = part_of(variable.path)
    squares[part] = squares.get(part, 0.0) + float(tf.reduce_sum(gradient**2))
norms = {part: square**0.5 for part, square in squares.items()}

figure = Figure(figsize=(7, 4.6), layout="constrained")
axes = figure.subplots()
axes.barh(list(norms), list(norms.values()), color=PALETTE["blue"])
axes.invert_yaxis()
axes.set_xlabel("norm of the gradient [nats per unit of weight]")
axes.set_xscale("log")
axes.grid(axis="x", alpha=0.3)
figure

# %% [markdown]
# Every part gets its share. The embedding and the head are trained by both losses; the MTP module
# only by its own, with weight $\lambda$. One group of numbers gets nothing at all:

# %%
frozen = [weight.path for weight in model.non_trainable_variables]
assert all(path.endswith("e_score_correction_bias") for path in frozen)
assert min(norms.values()) > 0
print("no gradient reaches:", *frozen, sep="\n  ")

# %% [markdown]
# The choice of experts is a step function; there is no slope to follow. The bias that steers it
# moves by a rule. Gates do have a slope, and through them the router's weight learns.
#
# **Is the gradient right?** Move one weight by $\pm\epsilon$ and look at the loss:
#
# $$ \frac{\partial L}{\partial w} \approx \frac{L(w + \epsilon) - L(w - \epsilon)}{2\epsilon} $$

# %%
kernel = model.blocks[0].mlp.down_proj.kernel
slope = gradients[[v is kernel for v in variables].index(True)].numpy()
where = np.unravel_index(np.abs(slope).argmax(), slope.shape)
before = kernel.numpy()


def moved_loss(step):
    """Return the loss, and all choices of experts, with one weight moved."""
    now = before.copy()
    now[where] += step
    kernel.assign(now)
    output = model.forward(tokens_BS[:, :-1], mtp=True)
    found = float(training_loss(model, tokens_BS)[0])
    kernel.assign(before)
    return found, np.concatenate([np.sort(r.indices, -1) for r in output.routings])


rows, errors = [], []
for epsilon in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
    (up, chosen_up), (down, chosen_down) = moved_loss(epsilon), moved_loss(-epsilon)
    numeric = (up - down) / (2 * epsilon)
    errors.append(abs(numeric / slope[where] - 1))
    changed = int((chosen_up != chosen_down).any(-1).sum())
    rows.append([f"{epsilon:.0e}", f"{numeric:.5f}", f"{errors[-1]:.1%}", changed])
assert min(errors) < 0.05
print(f"by backpropagation: {slope[where]:.5f}")
table(["epsilon", "by difference", "apart", "tokens that changed experts"], rows)

# %% [markdown]
# Steps that are too large leave the straight part of the curve, or tip a token over to another
# expert: the loss jumps there, and no derivative tells of it. Steps that are too small drown in
# rounding: float32 holds a loss of 6 to about 0.0000005, and that error is divided by
# $2\epsilon$.

# %% [markdown]
# ## 5.7 Until it writes
#
# Now all of it together: a tokenizer, a model of 1.5 million parameters, the paper's optimizer
# and schedule, and the State of the Union addresses. What differs from the paper is stated: the
# rate is higher and the biases move faster, since this run has a few hundred steps. The last
# address is held out; neither tokenizer nor model sees it.

# %%
documents = state_of_the_union()
held_out, training = documents[-1:], documents[-60:-1]
tokenizer = Tokenizer.train((d.text for d in training), vocab_size=1024)
rows = tokenizer.encode_batch([d.text for d in training], split_special_tokens=True)
ids = np.concatenate(
    [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows]
).astype(np.uint16)
size = sum(len(d.text.encode()) for d in training)
print(
    f"{len(training)} addresses, {size:,} bytes, {len(ids):,} tokens; held out: {held_out[0].name}"
)

# %%
STEPS = 300
small = TrainConfig.from_dict(
    {
        "model": {
            "preset": "mini",
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 384,
            "moe_intermediate_size": 96,
            "num_hidden_layers": 3,
            "q_lora_rank": 64,
            "kv_lora_rank": 48,
        },
        "data": {"sequence_length": 128},
        "schedule": {
            "peak": 5e-3,
            "floor": 5e-4,
            "final": 1.5e-4,
            "warmup_steps": 20,
            "constant_until": 0.1,
        },
        "loss": {"bias_update_speed": 0.01},
        "train": {"steps": STEPS, "batch_size": 8, "log_every": 5, "seed": 0},
        "checkpoint": {"every": STEPS},
    }
)
small_config = small.model.build().replace(
    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
)
trainer = Trainer(small, ids, run.folder / "small", small_config)
writer = trainer.model
print(f"{writer.count_params():,} parameters, {STEPS * 8 * 128:,} tokens to read")

# %% [markdown]
# Before training: its text, and what its guesses cost. **Bits per byte** is the code length of
# a text under the model over its size, so models with different tokenizers can be compared:
# $-\sum_i \log_2 P(t_i \mid \text{before}) \,/\, \text{bytes}$.

# %%
PROMPT = "My fellow Americans, the state of our Union is"
prompt = np.array([[tokenizer.bos_token_id, *tokenizer.encode(PROMPT)]])


def write(**how):
    """Continue the prompt; return the new text and the tokens."""
    found = writer.generate(prompt, max_new_tokens=60, eos_token_id=(), **how).numpy()
    return tokenizer.decode(found[0, prompt.shape[1] :].tolist()), found


print(write()[0])
untrained = bits_per_byte(writer, tokenizer, held_out, context=128).bits_per_byte

# %%
began = time.perf_counter()
trainer.train()
seconds = time.perf_counter() - began
lines = (run.folder / "small" / "metrics.jsonl").read_text().splitlines()
rows = [json.loads(line) for line in lines]
end = [np.mean([row[key] for row in rows[-10:]]) for key in ("cross_entropy", "mtp_cross_entropy")]
assert abs(end[0] - end[1]) < 0.5
print(f"{STEPS} steps in {seconds:.0f} s; at the end {end[0]:.2f} and {end[1]:.2f} nats (MTP)")
plot_loss(rows)

# %% [markdown]
# The curve starts near $\ln 1024$ = 6.9 nats and falls. Does it surprise you that the MTP curve is
# close to the other, often even below it? Look at the boxes of 5.4 again. Guessing token $i+2$
# from everything up to token $i+1$ is *the same task* that the main model has one position later.
# The module has one block more for it. What makes it worth having is the price: when text is
# written, the guess costs one block, not a pass of the whole model.
#
# And the experts:

# %%
plot_expert_load(
    [row["loads"] for row in rows],
    [row["step"] for row in rows],
    ["block 1", "block 2", "MTP module"],
)

# %% [markdown]
# White is an even share. At the start the rate is high and a few experts get nearly everything
# (brown) while others starve (violet). Then the biases push back, and the load evens out.

# %%
late = np.sum([row["loads"] for row in rows[-10:]], axis=0)
early = np.sum([row["loads"] for row in rows[2:12]], axis=0)
uneven = [float((load.std(-1) / load.mean(-1)).max()) for load in (early, late)]
assert uneven[1] < 0.5 * uneven[0]
print(
    f"standard deviation of the load over its mean, worst layer: {uneven[0]:.2f}, {uneven[1]:.2f}"
)

# %% [markdown]
# What does it write? Greedy first (always the likeliest token), then drawn.

# %%
greedy, greedy_ids = write()
drawn, _ = write(temperature=0.8, top_p=0.95, seed=0)
print("GREEDY:", PROMPT, greedy, "\n\nDRAWN: ", PROMPT, drawn)

# %% [markdown]
# Words of speeches, some grammar, no thought: that is what a model of this size has after reading
# three hundred thousand tokens. Greedy text tends to go round in circles; that is a property of
# greedy decoding of weak models, not an error.

# %% [markdown]
# ## 5.8 How good is that?
#
# Beside the model two yardsticks that know nothing of language. *Byte unigrams*: code each byte
# of the held-out address by its frequency in the training text, computed here by hand. *xz -9*:
# what the address adds to a compressed file of the training text.

# %%
counts = np.ones(256)
for document in training:
    counts += np.bincount(np.frombuffer(document.text.encode(), np.uint8), minlength=256)
bits = -np.log2(counts / counts.sum())
held_bytes = np.frombuffer(held_out[0].text.encode(), np.uint8)
unigram = float(bits[held_bytes].mean())
xz = xz_bits_per_byte([d.text.encode() for d in training], [held_bytes.tobytes()])
trained = bits_per_byte(writer, tokenizer, held_out, context=128).bits_per_byte
assert trained < min(0.75 * unigram, untrained - 0.5)
table(
    ["coder", "bits per byte"],
    [
        ["this model, untrained", f"{untrained:.3f}"],
        ["byte unigrams", f"{unigram:.3f}"],
        ["this model, trained", f"{trained:.3f}"],
        ["xz -9, training text before it", f"{xz:.3f}"],
    ],
)

# %% [markdown]
# The untrained model beats byte frequencies already: a guess among 1,024 tokens covers several
# bytes at once, so the tokenizer did part of the work. The trained one is far better than either.
# Whether it beats `xz` is in the table, and after two minutes it usually does not: `xz` may look
# up the whole training text, phrase by phrase. Preset `mini` of [the
# quickstart](../../how-to/train-on-your-text.md), three times as large and trained longer, does.

# %% [markdown]
# ## 5.9 The same text in fewer passes
#
# The MTP module guesses the token after the next. So let it draft: the next pass of the model
# reads the newest token *and* the draft. If the model itself would have written the draft, one
# pass has made two tokens; if not, the draft is thrown away. Nothing of it shows in the text
# (section 5.4.3: in V3 85 to 90% of second tokens are accepted, and text comes 1.8 times as
# fast).

# %%
drafted, drafted_ids = write(draft=True)
stats = writer.last_generation
np.testing.assert_array_equal(drafted_ids, greedy_ids)
assert 0 < stats.accepted <= stats.drafted
assert stats.steps < stats.new_tokens - 1
plain = benchmark(lambda: write(), warmup=1, repeats=3).median
quick = benchmark(lambda: write(draft=True), warmup=1, repeats=3).median
table(
    ["", "passes", "drafts accepted", "seconds"],
    [
        ["plain", stats.new_tokens - 1, "-", f"{plain:.3f}"],
        ["with drafts", stats.steps, f"{stats.accepted} of {stats.drafted}", f"{quick:.3f}"],
    ],
)

# %% [markdown]
# Fewer passes, the same tokens. Whether it is also less *time* depends: each round runs the MTP
# module too, which is a quarter of the layers here and one of 62 in V3. And in float32 the two
# ways agree; in lower precision a near-tie between two tokens may fall the other way.

# %% [markdown]
# ## 5.10 Keep it
#
# `save_pretrained` writes the released layout: `config.json`, safetensors with the released
# names. With the tokenizer beside it the folder is all that `ds-serve` or `transformers` need.

# %%
writer.save_pretrained(run.folder / "model")
tokenizer.save_pretrained(run.folder / "model")
again = CausalLM.from_pretrained(run.folder / "model")
np.testing.assert_allclose(again(prompt), writer(prompt), rtol=1e-6, atol=1e-6)
table(
    ["file", "bytes"],
    [[f.name, f"{f.stat().st_size:,}"] for f in sorted((run.folder / "model").iterdir())],
)

# %% [markdown]
# ## Quiz

# %%
quiz = Quiz(
    Question(
        "In pre-norm, what does the next block receive?",
        options=(
            "the normed hidden state",
            "the hidden state plus what attention and feed-forward added",
            "the output of the feed-forward alone",
        ),
        answer=1,
        why=(
            "Only the layer's input is a normed copy; the sum itself is never normed inside the "
            "stack. One norm stands before the head.",
            "Each layer adds to h, so a path of pure additions runs from the first to the last.",
            "Without the sum there is no residual path; section 5.2 shows what the gradient does.",
        ),
    ),
    Question(
        "MTP module 1 at position i is given the embedding of which token?",
        options=("token i", "token i + 1", "token i + 2"),
        answer=1,
        why=(
            "That token is in the hidden state already; the module would have to guess two steps.",
            "It knows what comes next, and guesses the one after.",
            "That is the token it has to predict: the loss would fall to nothing and drafts be "
            "worthless.",
        ),
    ),
    Question(
        "The loss is at 0.01 nats after twenty steps. What is the first thing to check?",
        options=(
            "whether the labels are the inputs, not shifted by one",
            "whether the learning rate is too low",
            "whether the experts are balanced",
        ),
        answer=0,
        why=(
            "A model with attention learns to copy its input at once; predicting text is never "
            "that easy.",
            "A low rate gives a loss that falls too slowly, not too fast.",
            "Imbalance costs quality; it cannot make text predictable.",
        ),
    ),
    Question(
        "Why has e_score_correction_bias no gradient?",
        options=(
            "it is multiplied by zero in the gates",
            "it only enters the choice of experts, which is a step function",
            "it is frozen to save memory",
        ),
        answer=1,
        why=(
            "It is not in the gates at all: they are made of the unbiased scores.",
            "A step has slope zero wherever it has one, so a rule moves the bias instead.",
            "A bias is 256 numbers a layer in V3; memory is no reason.",
        ),
    ),
    Question(
        "Drafting accepted 0 of 50 drafts. What is the greedy text?",
        options=("worse", "the same", "shorter"),
        answer=1,
        why=(
            "Drafts that the model disagrees with are thrown away; its own token is taken.",
            "Every token is the model's own choice. It took as many passes as without drafts, and "
            "more work in each.",
            "Each pass adds one token at least, whatever becomes of the draft.",
        ),
    ),
)
quiz

# %% [markdown]
# ## Exercise

# %% tags=["hide-input"]


def mtp_pairs(h_BSD, tokens_BS, k):
    """Return hidden states, tokens to embed, and labels of depth k, all `[B, S - k, ...]`."""
    return h_BSD[:, :-k], tokens_BS[:, k:-1], tokens_BS[:, k + 1 :]


def check_pairs(candidate):
    """Check shapes first, then who meets whom."""
    tokens = np.arange(20).reshape(2, 10)  # 9 inputs and one label more
    h = np.repeat(np.arange(18.0).reshape(2, 9, 1), 4, axis=2)
    for k in (1, 2, 3):
        states, given, labels = (np.asarray(part) for part in candidate(h, tokens, k))
        want = mtp_pairs(h, tokens, k)
        assert states.shape == want[0].shape, (
            f"at depth {k} the hidden states have shape {states.shape}; of 9 inputs {9 - k} "
            "positions have a token k ahead among the inputs"
        )
        assert given.shape == labels.shape == (2, 9 - k), (
            f"at depth {k} there are {9 - k} positions, each with one token given and one label; "
            f"got {given.shape} and {labels.shape}"
        )
        assert (states == want[0]).all(), "position i keeps its own hidden state: drop the LAST k"
        assert (given == want[1]).all(), (
            f"position 0 is given token {given[0, 0]}; at depth {k} it should know token {k}"
        )
        assert (labels == want[2]).all(), (
            f"position 0 has label {labels[0, 0]}; it was given token {k}, so it predicts the next"
        )


pairs_exercise = Exercise(
    "**Who meets whom.** `tokens_BS` is `[B, S + 1]`: S inputs and one label more. `h_BSD` is "
    "`[B, S, D]`, the hidden states of the inputs. Return for depth `k`: the hidden states, the "
    "tokens whose embeddings join them, and the labels, each with `S - k` positions.",
    check=check_pairs,
    solution=mtp_pairs,
    mistakes={
        "first states dropped": lambda h, t, k: (h[:, k:], t[:, k:-1], t[:, k + 1 :]),
        "the label is given": lambda h, t, k: (h[:, :-k], t[:, k + 1 :], t[:, k + 1 :]),
        "label is the given token": lambda h, t, k: (h[:, :-k], t[:, k:-1], t[:, k:-1]),
        "depth ignored": lambda h, t, k: (h[:, :-1], t[:, 1:-1], t[:, 2:]),
    },
)
pairs_exercise

# %%


def my_pairs(h_BSD, tokens_BS, k):
    """Return hidden states, tokens to embed and labels of depth k."""
    raise NotImplementedError


pairs_exercise.check(my_pairs)

# %%
pairs_exercise.show_solution()

# %% tags=["hide-input"]


def next_token_loss(logits_BSV, tokens_BS):
    """Return the mean cross-entropy in nats; position i is scored against token i + 1."""
    log_p_BSV = tf.nn.log_softmax(logits_BSV)
    return -tf.reduce_mean(tf.gather(log_p_BSV, tokens_BS[:, 1:], batch_dims=2))


def check_loss(candidate):
    """Compare with the trained trainer's own number and with a case that is known."""
    certain = np.full((1, 3, 4), -30.0, np.float32)
    tokens = np.array([[0, 1, 2, 3]])
    certain[0, [0, 1, 2], [1, 2, 3]] = 30.0  # sure of each next token
    found = float(candidate(certain, tokens))
    assert found < 30, (
        f"a model that is sure of every NEXT token gets {found:.1f} nats: position i is scored "
        "against token i + 1"
    )
    assert found > -1e-3, f"a cross-entropy is not negative, this is {found:.1f}: check the sign"
    even = float(candidate(np.zeros((2, 5, 7), np.float32), np.zeros((2, 6), np.int64)))
    assert abs(even - math.log(7)) < 1e-4, (
        f"with all logits 0 over 7 tokens every position costs ln 7 = {math.log(7):.4f} nats, "
        f"this gives {even:.4f}: take the mean over positions, of natural logarithms"
    )


loss_exercise = Exercise(
    "**The next token.** `logits_BSV` belongs to the inputs `tokens_BS[:, :S]`; `tokens_BS` is "
    "`[B, S + 1]`. Return the mean cross-entropy in nats.",
    check=check_loss,
    solution=next_token_loss,
    mistakes={
        "not shifted": lambda logits, tokens: cross_entropy(logits, tokens[:, :-1]),
        "wrong sign": lambda logits, tokens: -cross_entropy(logits, tokens[:, 1:]),
        "a sum": lambda logits, tokens: cross_entropy(logits, tokens[:, 1:]) * tokens[:, 1:].size,
        "bits": lambda logits, tokens: cross_entropy(logits, tokens[:, 1:]) / math.log(2),
    },
)
loss_exercise

# %%


def my_loss(logits_BSV, tokens_BS):
    """Return the mean cross-entropy of the next token in nats."""
    raise NotImplementedError


loss_exercise.check(my_loss)

# %%
loss_exercise.show_solution()

# %% [markdown]
# ## What goes wrong
#
# | you see | why | what to do |
# |---|---|---|
# | the loss falls to 0 within minutes | labels not shifted: the model copies | score position $i$ against token $i+1$ |
# | MTP's loss falls far below the main one | the module is given the token that it predicts | token $i+k$ in, token $i+k+1$ out |
# | MTP loss right, drafts never accepted | the hidden state was taken before the final norm in one place, after it in the other | after, in training and decoding |
# | gradient check off by a lot at one $\epsilon$ | rounding, or a token changed its experts | try several $\epsilon$; compare the choices |
# | `loss nan` | the rate, or no warm-up | lower `peak`, more `warmup_steps` |
# | text repeats itself | greedy decoding of a weak model | draw, with `temperature` and `top_p`; train longer |
#
# The first row, shown: the trained model scored against its *inputs* instead of the next tokens.
# It was trained to say what comes next, so it is much worse at this; trained on such labels it
# would be perfect, and useless.

# %%
some = np.asarray(ids[: 8 * 129].reshape(8, 129), np.int32)
logits = writer(some[:, :-1])
shifted = float(cross_entropy(logits, some[:, 1:]))
copied = float(cross_entropy(logits, some[:, :-1]))
assert copied > shifted + 1
print(f"against the next token {shifted:.2f} nats, against the input itself {copied:.2f} nats")

# %% [markdown]
# ## Checkpoint
#
# - I can write `h += MLA(RMSNorm(h)); h += FFN(RMSNorm(h))` and say why the norm stands inside.
# - I know where V3's 671 billion parameters are, and why one token uses 37 billion.
# - I can say for any $i$ and $k$ what MTP is given and what it predicts.
# - I have built the training loss and seen the trainer report the same number.
# - I know that the choice of experts has no gradient, and what moves it instead.
# - I can say what a draft saves, and why it cannot change the text.
#
# Next: [what it takes in production](6_production.md).

# %%
run.finish(
    bits_per_byte=trained,
    bits_per_byte_unigram=unigram,
    bits_per_byte_xz=xz,
    drafts_accepted=stats.accepted / stats.drafted,
    training_seconds=seconds,
)
