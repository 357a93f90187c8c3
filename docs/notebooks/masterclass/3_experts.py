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
#     title: "3 · Mixture of experts"
#     minutes: 1.8
#     reading: 45
# ---

# %% [markdown]
# # 3 · Mixture of experts
#
# A mixture-of-experts layer holds many feed-forward networks and sends each token to a few of them.
# So a model can hold many more weights than it multiplies for one token. This part builds
# DeepSeek-V3's layer from its equations until it equals `ds_moe.MixtureOfExperts`, then trains a
# small language model three times to see what happens when nobody keeps the experts evenly loaded.
#
# ## What you will be able to do
#
# - write an expert, V3's router and the layer around them in plain TensorFlow;
# - say what the bias of a router changes and what it leaves alone;
# - count the parameters of a layer, and those that one token uses;
# - recognise routing collapse in a figure and in two numbers, and cure it in two ways;
# - name what V3's router does differently from V2's;
# - read which experts a text goes to.
#
# **Time:** 45 minutes. **Builds on:** [Foundations](1_foundations.md): matrix products, softmax,
# gradients.

# %%
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from ds_model import CausalLM, ModelConfig, parameter_counts
from ds_moe import (
    MixtureOfExperts,
    MoEConfig,
    Router,
    SwiGLU,
    max_violation,
    sequence_balance_loss,
    update_biases,
)
from ds_moe.figures import plot_expert_load, plot_flow, plot_routing
from ds_train import AdamW
from ds_train.data import state_of_the_union
from ds_train.notebook import (
    PALETTE,
    Choice,
    Exercise,
    Question,
    Quiz,
    benchmark,
    explore,
    start,
)

run = start("masterclass-3", seed=0, tracker="none")

# %% [markdown]
# Names end in the letters of their axes: `T` tokens, `D` hidden size, `I` inner size of an expert,
# `E` experts, `K` experts a token, `G` groups, `M` experts of a group. Equation numbers are those
# of the V3 paper, [arXiv 2412.19437](https://arxiv.org/abs/2412.19437).
#
# ## 3.1 One expert
#
# An expert is what a dense model's block has as its whole feed-forward, only narrower: SwiGLU. One
# product makes a *gate*, one makes *values*; the gate decides how much of each value passes, and a
# third product brings the result back to the width of the model:
#
# $$\mathrm{FFN}(x) = W_{down}\,\bigl(\mathrm{silu}(W_{gate}\,x) \odot W_{up}\,x\bigr),
# \qquad \mathrm{silu}(z) = z\,\sigma(z)$$
#
# `W_gate` and `W_up` have the same input, so they are kept side by side as one matrix `[D, 2I]`.


# %%
def expert(x_TD, gate_up, down):
    gate, up = tf.split(tf.matmul(x_TD, gate_up), 2, axis=-1)
    return tf.matmul(tf.nn.silu(gate) * up, down)


layer = SwiGLU(hidden_size=32, intermediate_size=48, initializer_range=0.2)
x_TD = tf.random.normal([6, 32])
theirs = layer(x_TD)
ours = expert(x_TD, layer.gate_up_proj.kernel, layer.down_proj.kernel)
np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
print("gate and up", layer.gate_up_proj.kernel.shape, " down", layer.down_proj.kernel.shape)

# %% [markdown]
# ## 3.2 The router
#
# The router is one small matrix: a column for each expert, as long as a token's hidden state. The
# dot product says how well a token suits an expert. What follows is a choice, in five steps.
# A random layer serves as an example, with **random biases**: with biases of zero two of the
# mistakes that one can make here would not show.

# %%
config = MoEConfig(
    hidden_size=32,
    moe_intermediate_size=48,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    initializer_range=0.2,
)
moe = MixtureOfExperts(config)
moe.build((None, None, 32))
router = moe.gate
router.e_score_correction_bias.assign(tf.random.normal([16], stddev=0.2))
weight_DE, bias_E = router.weight, tf.convert_to_tensor(router.e_score_correction_bias)
x_TD = tf.random.normal([64, 32])

# %% [markdown]
# **Step 1: scores** (eq. 15). A sigmoid for each expert on its own: a token may suit many experts,
# or none. All in float32, whatever the rest computes in: a rounded score changes the choice.
#
# $$s_{i,t} = \sigma(u_t^\top e_i)$$

# %%
scores_TE = tf.sigmoid(tf.matmul(x_TD, weight_DE))
print("scores of token 0:", scores_TE[0].numpy().round(2))

# %% [markdown]
# **Step 2: bias, for the choice alone** (eq. 16). An expert that gets too little work has its
# `b_i` raised until it is chosen more often.
#
# $$\text{choose by } s_{i,t} + b_i$$

# %%
choice_TE = scores_TE + bias_E
print("biases:           ", bias_E.numpy().round(2))
print("biased scores:    ", choice_TE[0].numpy().round(2))

# %% [markdown]
# **Step 3: groups.** In V3 the experts of a group live on the same machine. A token may use
# `topk_group` of the groups, so it crosses the network to few machines (section 2.1.2, node-limited
# routing). A group counts by the sum of its **two** best biased scores.

# %%
choice_TGM = tf.reshape(choice_TE, [-1, config.n_group, config.experts_per_group])
group_TG = tf.reduce_sum(tf.math.top_k(choice_TGM, 2).values, axis=-1)
kept_groups = tf.math.top_k(group_TG, config.topk_group).indices
print("group scores of token 0:", group_TG[0].numpy().round(2), " kept:", kept_groups[0].numpy())

# %% [markdown]
# What lies outside the kept groups becomes minus infinity, so that no top-k can take it. Zero would
# not do: biased scores can be negative, and then zero is a good score.

# %%
kept_TG = tf.reduce_any(tf.one_hot(kept_groups, config.n_group, True, False, dtype=tf.bool), 1)
limited_TGM = tf.where(kept_TG[..., None], choice_TGM, -np.inf)
limited_TE = tf.reshape(limited_TGM, choice_TE.shape)
print("left for token 0: ", limited_TE[0].numpy().round(2))

# %% [markdown]
# **Step 4: the best K of what is left.**

# %%
indices_TK = tf.math.top_k(limited_TE, config.num_experts_per_tok).indices
print("token 0 goes to experts", indices_TK[0].numpy())

# %% [markdown]
# **Step 5: gates** (eq. 13, 14). The chosen experts' scores **without** the bias, divided by their
# sum, times `routed_scaling_factor` [2.5 in V3]. So the bias moves tokens between experts but never
# makes an expert louder.
#
# $$g_{i,t} = \lambda\,\frac{s_{i,t}}{\sum_{j \in \text{chosen}} s_{j,t}}$$

# %%
gates_TK = tf.gather(scores_TE, indices_TK, batch_dims=1)
gates_TK *= config.routed_scaling_factor / tf.reduce_sum(gates_TK, axis=-1, keepdims=True)
print("gates of token 0:", gates_TK[0].numpy().round(3), " sum:", gates_TK[0].numpy().sum())

# %% tags=["hide-input"]
figure = Figure(figsize=(7, 3.4), layout="constrained")
axes = figure.subplots()
chosen = np.isin(np.arange(16), indices_TK[0])
for group in range(config.n_group):
    if group in kept_groups[0].numpy():
        axes.axvspan(4 * group - 0.5, 4 * group + 3.5, color=PALETTE["sky"], alpha=0.2, lw=0)
axes.bar(np.arange(16) - 0.2, scores_TE[0], 0.4, color=PALETTE["blue"], label="score")
colours = np.where(chosen, PALETTE["orange"], "0.75")
axes.bar(np.arange(16) + 0.2, choice_TE[0], 0.4, color=colours)
axes.bar(0, 0, color=PALETTE["orange"], label="score + bias, chosen")
axes.bar(0, 0, color="0.75", label="score + bias, not chosen")
axes.set_xticks(range(16))
axes.set_xlabel("expert (shaded: the groups that this token may use)")
axes.set_ylabel("score of token 0")
axes.legend(frameon=False, ncols=3, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
figure

# %% [markdown]
# The five steps as one function, against the package's `Router`. The order of a token's experts
# means nothing, so both are sorted by expert before they are compared.


# %%
def route(x_TD, weight_DE, bias_E, config):
    scores_TE = tf.sigmoid(tf.matmul(x_TD, weight_DE))
    choice_TGM = tf.reshape(scores_TE + bias_E, [-1, config.n_group, config.experts_per_group])
    group_TG = tf.reduce_sum(tf.math.top_k(choice_TGM, 2).values, axis=-1)
    best = tf.math.top_k(group_TG, config.topk_group).indices
    kept_TG = tf.reduce_any(tf.one_hot(best, config.n_group, True, False, dtype=tf.bool), 1)
    limited_TGM = tf.where(kept_TG[..., None], choice_TGM, -np.inf)
    limited_TE = tf.reshape(limited_TGM, tf.shape(scores_TE))
    indices_TK = tf.math.top_k(limited_TE, config.num_experts_per_tok).indices
    gates_TK = tf.gather(scores_TE, indices_TK, batch_dims=1)
    gates_TK /= tf.reduce_sum(gates_TK, axis=-1, keepdims=True)
    return indices_TK, gates_TK * config.routed_scaling_factor


def by_expert(indices_TK, gates_TK):
    order = np.argsort(indices_TK, axis=-1)
    return (np.take_along_axis(np.asarray(each), order, -1) for each in (indices_TK, gates_TK))


indices_TK, gates_TK = route(x_TD, weight_DE, bias_E, config)
routing = router(x_TD)
for ours, theirs in zip(
    by_expert(indices_TK, gates_TK), by_expert(routing.indices, routing.gates), strict=True
):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)

router.e_score_correction_bias.assign(tf.zeros([16]))
unbiased = np.sort(router(x_TD).indices, axis=-1)
router.e_score_correction_bias.assign(bias_E)
changed = (np.sort(routing.indices, axis=-1) != unbiased).any(axis=-1).mean()
assert changed > 0.2
print(f"equal for {len(x_TD)} tokens; the bias changed the choice of {changed:.0%} of them")

# %% [markdown]
# ## 3.3 The layer: token by token, then expert by expert
#
# The output is a shared expert for every token, plus the gated sum of the chosen ones (eq. 12):
#
# $$h'_t = u_t + \mathrm{FFN}^{(s)}(u_t) + \sum_{i \in \text{chosen}} g_{i,t}\,
# \mathrm{FFN}^{(r)}_i(u_t)$$
#
# The residual `u_t` is added by the block around the layer. First the way that one reads the
# equation: a loop over tokens. Nothing is ever dropped: each token reaches each of its experts.


# %%
def token_by_token(x_TD, indices_TK, gates_TK, gate_up, down):
    rows = []
    for x, chosen, gates in zip(x_TD, indices_TK.numpy(), gates_TK, strict=True):
        parts = [
            gate * expert(x[None], gate_up[e], down[e])
            for e, gate in zip(chosen, gates, strict=True)
        ]
        rows.append(tf.add_n(parts))
    return tf.concat(rows, axis=0)


gate_up, down = (tf.convert_to_tensor(weight) for weight in (moe.gate_up_proj, moe.down_proj))
slow = token_by_token(x_TD, indices_TK, gates_TK, gate_up, down)
print("gate and up of all experts", gate_up.shape, " routed output", slow.shape)

# %% [markdown]
# That multiplies a matrix by one row at a time. Fast code turns it round: sort the `T * K`
# assignments by expert, give each expert its rows as one matrix, and put the results back. Expert
# loads differ, so the matrices have different numbers of rows.

# %%
expert_A = tf.reshape(indices_TK, [-1])  # A = T * K assignments
order = tf.argsort(expert_A, stable=True)
load_E = tf.math.bincount(expert_A, minlength=16)
print(
    "first assignments:", expert_A[:8].numpy(), " sorted:", tf.gather(expert_A, order)[:8].numpy()
)
print("rows of each expert:", load_E.numpy(), " in all", int(tf.reduce_sum(load_E)))


# %%
def expert_by_expert(x_TD, indices_TK, gates_TK, gate_up, down):
    experts, per_token = gate_up.shape[0], indices_TK.shape[1]
    expert_A = tf.reshape(indices_TK, [-1])
    order = tf.argsort(expert_A, stable=True)
    load_E = tf.math.bincount(expert_A, minlength=experts)
    rows = tf.split(tf.gather(x_TD, order // per_token), load_E, num=experts)
    sorted_AD = tf.concat([expert(r, gate_up[e], down[e]) for e, r in enumerate(rows)], axis=0)
    y_AD = tf.gather(sorted_AD, tf.math.invert_permutation(order))
    y_TKD = tf.reshape(y_AD, [-1, per_token, x_TD.shape[-1]])
    return tf.einsum("tk,tkd->td", gates_TK, y_TKD)


fast = expert_by_expert(x_TD, indices_TK, gates_TK, gate_up, down)
np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-4)

shared = moe.shared_experts
ours = fast + expert(x_TD, shared.gate_up_proj.kernel, shared.down_proj.kernel)
theirs, routing = moe(x_TD[None])
np.testing.assert_allclose(ours, theirs[0], rtol=1e-4, atol=1e-4)
np.testing.assert_array_equal(load_E, routing.load)
print(f"equal to MixtureOfExperts; largest output {np.abs(theirs).max():.2f}")

# %%
arguments = (x_TD, indices_TK, gates_TK, gate_up, down)
loop_time = benchmark(token_by_token, *arguments, warmup=1, repeats=3)
grouped_time = benchmark(tf.function(expert_by_expert), *arguments, repeats=10)
print("token by token:  ", loop_time)
print("expert by expert:", grouped_time)

# %% [markdown]
# The package has three programs for the same sum (a compiled operation, this one, and one of fixed
# shapes for XLA), and chooses by where it runs; see
# [the compiled products](../../decisions/0004-compiled-products.md).
#
# ## 3.4 What a token pays for
#
# An expert has `3 * D * I` weights. A layer holds `E` of them and the shared one; a token
# multiplies `K` of them and the shared one. The router adds `D * E`.


# %%
def layer_parameters(config):
    one = 3 * config.hidden_size * config.moe_intermediate_size
    router = config.hidden_size * config.n_routed_experts
    held = (config.n_routed_experts + config.n_shared_experts) * one + router
    active = (config.num_experts_per_tok + config.n_shared_experts) * one + router
    return held, active


held, active = layer_parameters(config)
assert held == moe.count_params() - config.n_routed_experts  # the biases are no gradient's business
v3 = ModelConfig.preset("v3-671b")
v3_held, v3_active = layer_parameters(v3.moe)
counts = parameter_counts(v3)
print(f"our layer: {held:,} held, {active:,} used by one token ({active / held:.1%})")
print(f"a layer of V3: {v3_held / 1e9:.2f}e9 held, {v3_active / 1e9:.2f}e9 used")
print(f"V3: {counts.main / 1e9:.1f}e9 held, {counts.active / 1e9:.1f}e9 used by one token")

# %% [markdown]
# Is a layer then as fast as a dense one of the size that a token uses? Three layers, the same
# tokens: the mixture, a dense SwiGLU as wide as the experts that one token uses, and a dense one as
# wide as all experts together.

# %%
wide = MoEConfig(
    hidden_size=128, moe_intermediate_size=128, n_routed_experts=32, num_experts_per_tok=4
)
tokens = tf.random.normal([1, 512, 128])
mixture = MixtureOfExperts(wide)
used, whole = (SwiGLU(128, 128 * (n + 1)) for n in (4, 32))
times = {
    "mixture, 4 of 32 and 1 shared": benchmark(tf.function(mixture), tokens),
    "dense, as wide as 5 experts": benchmark(tf.function(used), tokens),
    "dense, as wide as 33 experts": benchmark(tf.function(whole), tokens),
}
for name, timing in times.items():
    print(f"{name:30} {timing}")

# %% tags=["hide-input"]
figure = Figure(figsize=(7, 2), layout="constrained")
axes = figure.subplots()
middle = np.array([timing.median for timing in times.values()]) * 1e3
spread = np.array([[t.median - t.low, t.high - t.median] for t in times.values()]).T * 1e3
colours = [PALETTE["orange"], PALETTE["blue"], PALETTE["blue"]]
axes.barh(list(times), middle, xerr=spread, color=colours)
axes.invert_yaxis()
axes.set_xlabel("time of 512 tokens, forward [ms] (median, quartiles)")
figure

# %% [markdown]
# The mixture holds as many weights as the third layer and multiplies as many as the second. What it
# may pay beyond the second is choosing, moving rows about, and reading all the experts' weights:
# products of a few rows each reuse a weight less often. How much that is depends on the machine, on
# how its products are compiled, and on the number of tokens; the study
# [of the layer](../studies/component_moe.md) measures it.
#
# ## 3.5 Collapse
#
# A router learns from the experts that it chose, and only chosen experts learn. An expert that is a
# little better early gets more tokens, so it learns more, so it gets more tokens. Left alone, the
# rich get richer until a few experts do everything: **routing collapse**. Two numbers tell it from
# the loads of a step:
#
# - **MaxVio** ([arXiv 2408.15664](https://arxiv.org/abs/2408.15664), eq. 4): the largest load over
#   the mean one, minus 1. 0 is even; with `K` of `E` experts it can reach `E / K - 1`.
# - **Coefficient of variation**: standard deviation of the loads over their mean.
#
# Two cures. The **balance loss** (eq. 17-20) adds to the loss
#
# $$\mathcal{L}_{bal} = \alpha \sum_i f_i P_i$$
#
# with `f_i` the share of tokens that expert `i` got (times `E / K`) and `P_i` its mean share of the
# scores: a differentiable push away from loaded experts, and a gradient that has nothing to do with
# predicting text. The **bias update** (eq. 16 and after) needs no gradient. After each step
#
# $$b_i \leftarrow b_i + \gamma\,\mathrm{sign}(\bar{c} - c_i)$$
#
# with `c_i` the load of expert `i`. V3 uses both, the loss with a very small `alpha` of 0.0001
# (section 4.2).
#
# The model for the experiment is small, and was set up so that collapse is likely, **on purpose**:
# no shared expert, a fast learning rate without warm-up, 256 tokens a step, no groups. It reads
# bytes of the State of the Union addresses.

# %%
text = "\n".join(document.text for document in state_of_the_union()[-40:])
data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
BATCH, LENGTH, STEPS = 4, 64, 120
generator = np.random.default_rng(0)
starts = generator.integers(0, len(data) - LENGTH - 1, [STEPS, BATCH])
batches = data[starts[..., None] + np.arange(LENGTH + 1)]

small = ModelConfig.from_dict(
    ModelConfig.preset("tiny").to_dict()
    | {
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "n_shared_experts": 0,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "routed_scaling_factor": 1.0,
        "initializer_range": 0.05,
    }
)
print(f"{len(data):,} bytes of text; batches {batches.shape}")
print(f"{parameter_counts(small).main:,} parameters, {parameter_counts(small).active:,} active")
print(f"largest possible MaxVio: {16 / 2 - 1:.0f}")


# %%
def train(alpha=0.0, gamma=0.0):
    """Return model, losses [steps] and loads [steps, layers, experts]."""
    keras.utils.set_random_seed(0)  # the same first weights each time
    model = CausalLM(small)
    routers = [layer.gate for layer in model.moe_layers]
    optimizer = AdamW(3e-3, weight_decay=0.0)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(tokens):
        with tf.GradientTape() as tape:
            output = model.forward(tokens[:, :-1])
            cross_entropy = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(tokens[:, 1:], output.logits)
            )
            balance = tf.add_n(
                [sequence_balance_loss(r.scores, r.indices, BATCH) for r in output.routings]
            )
            loss = cross_entropy + alpha * balance
        gradients = tape.gradient(loss, model.trainable_variables)
        gradients, _ = tf.clip_by_global_norm(gradients, 1.0)
        optimizer.apply(gradients)
        loads = [routing.load for routing in output.routings]
        if gamma:
            update_biases(routers, loads, gamma)
        return cross_entropy, tf.stack(loads)

    found = [step(tf.constant(tokens)) for tokens in batches]
    losses, loads = (np.array([each.numpy() for each in part]) for part in zip(*found, strict=True))
    return model, losses, loads


runs = {
    "no balance": train(),
    "balance loss": train(alpha=0.03),
    "bias update": train(gamma=0.02),
}

# %% [markdown]
# The speed of the bias, 0.02, is twenty times V3's 0.001: here it has 120 steps to do its work and
# there many thousands. Each expert's share of the load over the steps, without balance:

# %%
plot_expert_load(runs["no balance"][2])

# %% [markdown]
# With the bias update:

# %%
plot_expert_load(runs["bias update"][2])

# %% [markdown]
# With the balance loss:

# %%
plot_expert_load(runs["balance loss"][2])

# %% tags=["hide-input"]
figure = Figure(figsize=(8, 3.2), layout="constrained")
panels = figure.subplots(1, 3)
for (name, (_, losses, loads)), colour in zip(
    runs.items(), (PALETTE["red"], PALETTE["blue"], PALETTE["green"]), strict=True
):
    variation = (loads.std(axis=-1) / loads.mean(axis=-1)).mean(axis=-1)
    violation = max_violation(loads).numpy().mean(axis=-1)
    smooth = np.convolve(losses, np.ones(10) / 10, "valid")
    panels[0].plot(violation, color=colour, label=name)
    panels[1].plot(variation, color=colour)
    panels[2].plot(np.arange(10, STEPS + 1), smooth, color=colour)
panels[0].axhline(7, color="0.5", linestyle=":", linewidth=1)
panels[0].set_title("MaxVio (dotted: the largest possible)", fontsize="small")
panels[1].set_title("coefficient of variation of loads", fontsize="small")
panels[2].set_title("cross-entropy, mean of 10 steps [nats]", fontsize="small")
for panel in panels:
    panel.set_xlabel("optimizer step")
panels[0].set_ylim(0, 7.5)
panels[1].set_ylim(0)
figure.legend(loc="outside lower center", ncols=3, frameon=False)
figure

# %%
summary = {}
print("last 20 steps     MaxVio by layer   variation by layer   idle experts   cross-entropy")
for name, (_, losses, loads) in runs.items():
    last = loads[-20:].sum(axis=0)
    share = last / last.mean(axis=-1, keepdims=True)
    idle = (share < 0.05).sum(axis=-1)  # less than a twentieth of an even share
    summary[name] = share.max(axis=-1) - 1, share.std(axis=-1), idle, losses[-20:].mean()
    violation, variation, idle, loss = summary[name]
    print(
        f"{name:14} {violation.round(2)!s:>18} {variation.round(2)!s:>18}"
        f" {idle!s:>14} {loss:>15.3f}"
    )

for name, (violation, _, idle, _) in summary.items():
    if name == "no balance":
        assert violation.min() > 3 and idle.min() >= 4
    else:
        assert violation.max() < 1.5 and idle.max() == 0
final = [loss for *_, loss in summary.values()]
assert max(final) - min(final) < 0.1
print(f"between the best and the worst cross-entropy: {max(final) - min(final):.3f} nats")

# %% [markdown]
# What this shows, and what it does not:
#
# - The collapse is **real and strong**. In the figures all three runs begin with it. Without
#   balance it stays: in each layer the busiest expert gets more than half of all tokens (MaxVio
#   above 3), and at least a quarter of the experts idle.
# - Both cures work: no expert idles at the end, and over 20 steps loads are close to even. Single
#   steps still vary: an even share is 32 tokens.
# - The losses differ by less than 0.1 nats. **Nothing here shows that balance predicts better**: it
#   is one seed, so even the order of the three may be chance. Perhaps so small a model on bytes has
#   no use for 16 experts in 120 steps; this experiment can't tell. What imbalance costs for certain
#   is time, where experts live on several machines: all wait for the busiest one.
# - The setting was picked because it collapses; other learning rates and routers that were tried
#   beforehand collapsed to different degrees. `alpha` and `gamma` were not tuned, so the two cures
#   are not ranked either. The paper's own comparison, a better model without the loss, was made
#   with 16B and 229B parameters (table 5).

# %% [markdown]
# ## 3.6 V2's router, for comparison
#
# V2 ([arXiv 2405.04434](https://arxiv.org/abs/2405.04434), section 2.2) scores by a softmax over
# all experts, lets a group count by its **one** best expert, has no bias, and in the released code
# multiplies experts by the plain scores, not normalised.


# %%
def route_v2(x_TD, weight_DE, config):
    scores_TE = tf.nn.softmax(tf.matmul(x_TD, weight_DE))
    scores_TGM = tf.reshape(scores_TE, [-1, config.n_group, config.experts_per_group])
    best = tf.math.top_k(tf.reduce_max(scores_TGM, axis=-1), config.topk_group).indices
    kept_TG = tf.reduce_any(tf.one_hot(best, config.n_group, True, False, dtype=tf.bool), 1)
    limited_TE = tf.reshape(tf.where(kept_TG[..., None], scores_TGM, -np.inf), scores_TE.shape)
    indices_TK = tf.math.top_k(limited_TE, config.num_experts_per_tok).indices
    gates_TK = tf.gather(scores_TE, indices_TK, batch_dims=1)
    return indices_TK, gates_TK * config.routed_scaling_factor


config_v2 = MoEConfig(
    hidden_size=32,
    moe_intermediate_size=48,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    norm_topk_prob=False,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
)
router_v2 = Router(config_v2)
router_v2.build((None, 32))
router_v2.weight.assign(weight_DE)
theirs = router_v2(x_TD)
ours = route_v2(x_TD, weight_DE, config_v2)
for mine, other in zip(by_expert(*ours), by_expert(theirs.indices, theirs.gates), strict=True):
    np.testing.assert_allclose(mine, other, rtol=1e-5)

sums_v2, sums_v3 = (tf.reduce_sum(gates, axis=-1).numpy() for gates in (ours[1], gates_TK))
print(f"sum of a token's gates, V2: {sums_v2.min():.2f} to {sums_v2.max():.2f}")
print(f"                        V3: {sums_v3.min():.2f} to {sums_v3.max():.2f}")

# %% [markdown]
# So in V2 a token's experts together weigh less the less certain the router is; in V3 they always
# weigh `routed_scaling_factor`, and only their proportions vary. And a softmax makes experts
# compete: adding the same number to all logits of a token changes nothing. Sigmoids notice it.

# %%
logits_TE = tf.matmul(x_TD, weight_DE)
softmax_change = np.abs(tf.nn.softmax(logits_TE + 1.0) - tf.nn.softmax(logits_TE)).max()
sigmoid_change = np.abs(tf.sigmoid(logits_TE + 1.0) - tf.sigmoid(logits_TE)).max()
assert softmax_change < 1e-5 < 0.1 < sigmoid_change
print(
    f"all logits up by 1: softmax changes by {softmax_change:.0e}, sigmoid by {sigmoid_change:.2f}"
)

# %% [markdown]
# ## 3.7 Where a text goes
#
# A sentence through the model that was trained with the bias update. Tokens are bytes here, so a
# token is a letter. Colour is the gate: how loudly an expert speaks for that letter.

# %%
model = runs["bias update"][0]
sentence = "The state of the Union is strong, and we thank the Congress."
letters = tf.constant([list(sentence.encode())])
routings = model.forward(letters).routings
plot_routing(routings, list(sentence))

# %% [markdown]
# Which letters does an expert get more often than others do? For each expert of the first layer
# with experts, the bytes whose share among its tokens is the largest multiple of their share in the
# text (of those bytes that are at least 1% of it):

# %%
sample = data[:8192].reshape(-1, 128)
first_layer = model.forward(tf.constant(sample)).routings[0]
went_TE = tf.reduce_max(tf.one_hot(first_layer.indices, 16), axis=1).numpy()
is_TV = np.eye(256)[sample.reshape(-1)]
overall_V = is_TV.mean(axis=0)
share_EV = (went_TE.T @ is_TV) / np.maximum(went_TE.sum(axis=0), 1)[:, None]
lift_EV = np.where(overall_V >= 0.01, share_EV / np.maximum(overall_V, 1e-9), 0)
assert np.median(lift_EV.max(axis=-1)) > 3
for e in range(16):
    best = [v for v in np.argsort(-lift_EV[e])[:5] if lift_EV[e, v] > 1.2]
    shown = "  ".join(f"{chr(v)!r} {lift_EV[e, v]:.1f}x" for v in best)
    print(f"expert {e:2} ({went_TE[:, e].mean():5.1%} of tokens): {shown}")

# %% [markdown]
# In so short a training the experts sort by what a token *is*, a letter, rather than by what a
# passage is about. Between the two layers tokens regroup:

# %%
plot_flow(model.forward(tf.constant(sample[:4])).routings)

# %% [markdown]
# The same for the model without balance: a few wide bands, and idle experts.

# %%
plot_flow(runs["no balance"][0].forward(tf.constant(sample[:4])).routings)

# %% [markdown]
# ## 3.8 Try it: a router on real hidden states
#
# 512 hidden states of the trained model, as its last block's router sees them, and a fresh router
# of your choice. Left: each expert's load, sorted, as it is and after 200 bias updates. Right: what
# the choice means for parameters, with experts as wide as the model's.
#
# - At which number of experts does the untrained router's MaxVio become large? Why is a fresh
#   router uneven at all, when its weights are random?
# - Let one group in two be used, with 8 groups. How many experts can a token still reach? How many
#   combinations of experts are lost?
# - Raise the experts from 16 to 64 at the same `chosen`. Which bar grows, and which does not?

# %%
ids = tf.constant(sample[:4])
h = model.embed_tokens(ids)
for block in model.blocks:  # what `CausalLM` does, step by step
    h += block.self_attn(block.input_layernorm(h))
    normed = block.post_attention_layernorm(h)
    h += block.mlp(normed)[0] if block.moe else block.mlp(normed)
np.testing.assert_allclose(model.head(model.norm(h)), model(ids), rtol=1e-3, atol=1e-3)
hidden_TD = tf.reshape(normed, [-1, small.hidden_size])
print("hidden states", hidden_TD.shape)


# %% tags=["hide-input"]
def simulate(experts, chosen, groups):
    rules = MoEConfig(
        hidden_size=small.hidden_size,
        moe_intermediate_size=small.moe_intermediate_size,
        n_routed_experts=experts,
        num_experts_per_tok=chosen,
        n_shared_experts=0,
        n_group=groups,
        topk_group=max(groups // 2, 1),
        initializer_range=0.05,
    )
    keras.utils.set_random_seed(0)
    fresh = Router(rules)
    before = fresh(hidden_TD).load.numpy()
    for _ in range(200):
        update_biases([fresh], [fresh(hidden_TD).load], 0.005)
    after = fresh(hidden_TD).load.numpy()
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for load, name, colour in (
        (before, "fresh", PALETTE["red"]),
        (after, "after 200 bias updates", PALETTE["blue"]),
    ):
        label = f"{name}: MaxVio {float(max_violation(load)):.2f}"
        left.plot(np.sort(load)[::-1], drawstyle="steps-mid", color=colour, label=label)
    left.axhline(len(hidden_TD) * chosen / experts, color="0.5", linestyle=":", linewidth=1)
    left.set_ylim(0)
    left.set_xlabel("expert, from the busiest (dotted: even)")
    left.set_ylabel(f"load of {len(hidden_TD)} tokens [tokens]")
    left.legend(frameon=False, fontsize="small")
    held, active = layer_parameters(rules)
    right.barh(["held", "used by a token"], [held, active], color=PALETTE["orange"])
    right.invert_yaxis()
    right.set_xlabel("parameters of the layer")
    right.set_title(f"{chosen} of {rules.reachable_experts} reachable of {experts} experts")
    return figure


explore(
    simulate,
    experts=Choice((16, 32, 64), 16),
    chosen=Choice((1, 2, 4, 8), 2),
    groups=Choice((1, 2, 4, 8), 1),
)

# %% [markdown]
# ## Quiz

# %%
quiz = Quiz(
    Question(
        "What does the balancing bias of an expert change?",
        options=(
            "How often the expert is chosen, and how loud it is",
            "How often the expert is chosen, nothing else",
            "The gradient of the router's weight, directly",
        ),
        answer=1,
        why=(
            (
                "It is loud by its unbiased score: gates are gathered from the scores before the "
                "bias is added."
            ),
            "The choice is made by biased scores, the gates by unbiased ones.",
            "No gradient passes through a choice, and the bias takes part in nothing else.",
        ),
    ),
    Question(
        "Why are experts outside the kept groups set to minus infinity and not to zero?",
        options=(
            "Because zero would be chosen when fewer than K biased scores are positive",
            "Because gates of the others would be zero too",
            "Because softmax needs it",
        ),
        answer=0,
        why=(
            "A score lies between 0 and 1; with its bias it can be negative, and then zero wins.",
            "Gates are read from the unbiased scores, which are not touched.",
            "V3's router has no softmax.",
        ),
    ),
    Question(
        "A layer has 256 routed experts and 1 shared; a token uses 8. The experts become 512, all "
        "else stays. What happens to the multiplications of one token in the experts?",
        options=("They double", "They stay the same", "They grow by a factor of 512/9"),
        answer=1,
        why=(
            "What doubles is what the layer holds; a token still uses 8 and the shared one.",
            "8 routed experts and the shared one, as before; only the router's product grows.",
            "No token goes to all experts.",
        ),
    ),
    Question(
        "16 experts, 2 chosen. A run reports MaxVio 7 at every step. What is going on?",
        options=(
            "Every token goes to the same two experts",
            "One expert gets seven tokens too many",
            "The loads are even but for a rounding",
        ),
        answer=0,
        why=(
            (
                "The mean load is T * 2 / 16. An expert that gets all T tokens has 8 times that: "
                "8 - 1 = 7, the largest value there is. The second choice need not be the same."
            ),
            "MaxVio is relative to the mean load, not a number of tokens.",
            "Even loads give 0.",
        ),
    ),
    Question(
        "What is the disadvantage of the balance loss that the bias update does not have?",
        options=(
            "It needs loads from all machines",
            "Its gradient reaches the model, and works against prediction where the two disagree",
            "It can't be used together with groups",
        ),
        answer=1,
        why=(
            (
                "The bias update is what needs loads summed over machines; the loss is local to a "
                "sequence."
            ),
            (
                "With a large alpha the model predicts worse, with a small one balance is weak. "
                "The bias moves choices without a gradient."
            ),
            "It counts the experts that were chosen, with or without groups.",
        ),
    ),
)
quiz

# %% [markdown]
# ## Exercise
#
# The two steps that are most often written wrong.


# %%
def limit_groups_solution(choice_TE, n_group, topk_group):
    choice_TGM = tf.reshape(choice_TE, [len(choice_TE), n_group, -1])
    group_TG = tf.reduce_sum(tf.math.top_k(choice_TGM, 2).values, axis=-1)
    best = tf.math.top_k(group_TG, topk_group).indices
    kept_TG = tf.reduce_any(tf.one_hot(best, n_group, True, False, dtype=tf.bool), axis=1)
    return tf.reshape(tf.where(kept_TG[..., None], choice_TGM, -np.inf), choice_TE.shape)


# %% tags=["hide-input"]
def check_groups(limit_groups):
    # Three groups of four: by their two best 1.0, 1.2, 0.9; by their best one the first wins, by
    # their sum the third.
    row = [0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.0, 0.0, 0.45, 0.45, 0.45, 0.45]
    found = np.asarray(limit_groups(tf.constant([row]), 3, 1))
    assert found.shape == (1, 12), f"the result has shape {found.shape}; it must be that of choice"
    best = int(found.reshape(3, 4).sum(axis=-1).argmax())
    assert best != 0, "the group with the best single expert was kept: that is V2's rule"
    assert best != 2, "the group with the largest sum was kept: only its two best count"
    outside = np.delete(found[0], slice(4, 8))
    assert np.isneginf(outside).all(), (
        f"experts outside the kept group have {outside.max()}; a biased score can be negative, so "
        "what must never be chosen has to be minus infinity"
    )
    random = np.random.default_rng(3).normal(size=(50, 16)).astype(np.float32)
    found = np.asarray(limit_groups(tf.constant(random), 4, 2))
    groups = random.reshape(50, 4, 4)
    worth = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
    kept = worth >= np.sort(worth, axis=-1)[:, -2:-1]
    expected = np.where(kept[..., None], groups, -np.inf).reshape(50, 16)
    np.testing.assert_array_equal(
        found, expected, "two of four groups are to be kept, with their scores unchanged"
    )


def by_best_one(choice_TE, n_group, topk_group):
    choice_TGM = tf.reshape(choice_TE, [len(choice_TE), n_group, -1])
    best = tf.math.top_k(tf.reduce_max(choice_TGM, axis=-1), topk_group).indices
    kept_TG = tf.reduce_any(tf.one_hot(best, n_group, True, False, dtype=tf.bool), axis=1)
    return tf.reshape(tf.where(kept_TG[..., None], choice_TGM, -np.inf), choice_TE.shape)


def by_whole_sum(choice_TE, n_group, topk_group):
    choice_TGM = tf.reshape(choice_TE, [len(choice_TE), n_group, -1])
    best = tf.math.top_k(tf.reduce_sum(choice_TGM, axis=-1), topk_group).indices
    kept_TG = tf.reduce_any(tf.one_hot(best, n_group, True, False, dtype=tf.bool), axis=1)
    return tf.reshape(tf.where(kept_TG[..., None], choice_TGM, -np.inf), choice_TE.shape)


def with_zeros(choice_TE, n_group, topk_group):
    limited = limit_groups_solution(choice_TE, n_group, topk_group)
    return tf.where(tf.math.is_finite(limited), limited, 0.0)


# %%
groups_exercise = Exercise(
    "**1.** Write `limit_groups(choice_TE, n_group, topk_group)`: take biased scores `[T, E]`, "
    "keep for each token the `topk_group` groups whose **two best** experts sum highest, and "
    "return `[T, E]` with minus infinity everywhere else. Experts of a group are neighbours.",
    check=check_groups,
    solution=limit_groups_solution,
    mistakes={
        "a group counts by its best expert": by_best_one,
        "a group counts by all its experts": by_whole_sum,
        "zero instead of minus infinity": with_zeros,
    },
)
groups_exercise


# %%
def limit_groups(choice_TE, n_group, topk_group):
    raise NotImplementedError


# %%
groups_exercise.check(limit_groups)

# %%
groups_exercise.show_solution()


# %%
def new_biases_solution(bias_E, load_E, gamma):
    return bias_E + gamma * tf.sign(tf.reduce_mean(load_E) - load_E)


# %% tags=["hide-input"]
def check_biases(new_biases):
    bias = tf.constant([0.3, -0.1, 0.0, 0.2])
    load = tf.constant([10.0, 2.0, 4.0, 0.0])  # the mean is 4
    step = np.asarray(new_biases(bias, load, 0.01)) - bias.numpy()
    assert step[0] < 0.005, "the busiest expert's bias rose: it would get even more tokens"
    assert abs(step[2]) < 1e-6, "an expert with exactly the mean load has no reason to move"
    np.testing.assert_allclose(
        np.abs(step[[0, 1, 3]]),
        0.01,
        rtol=1e-3,
        err_msg="each step is gamma up or down, however far the load is from the mean",
    )
    random = np.random.default_rng(5)
    judge = Router(MoEConfig(8, 8, n_routed_experts=6, num_experts_per_tok=2))
    judge.build((None, 8))
    bias, load = random.normal(size=6), random.integers(0, 50, 6)
    bias, load = tf.constant(bias, tf.float32), tf.constant(load, tf.float32)
    judge.e_score_correction_bias.assign(bias)
    update_biases([judge], [load], 0.02)
    found = np.asarray(new_biases(bias, load, 0.02))
    np.testing.assert_allclose(found, judge.e_score_correction_bias, rtol=1e-5, atol=1e-6)


# %%
biases_exercise = Exercise(
    "**2.** Write `new_biases(bias_E, load_E, gamma)`: V3's update after a step. Return the new "
    "biases; change nothing in place.",
    check=check_biases,
    solution=new_biases_solution,
    mistakes={
        "the wrong direction": lambda bias, load, gamma: (
            bias + gamma * tf.sign(load - tf.reduce_mean(load))
        ),
        "in proportion to the error": lambda bias, load, gamma: (
            bias + gamma * (tf.reduce_mean(load) / load.shape[0] - load / load.shape[0])
        ),
        "no expert ever stays": lambda bias, load, gamma: (
            bias + tf.where(load > tf.reduce_mean(load), -gamma, gamma)
        ),
    },
)
biases_exercise


# %%
def new_biases(bias_E, load_E, gamma):
    raise NotImplementedError


# %%
biases_exercise.check(new_biases)

# %%
biases_exercise.show_solution()

# %% [markdown]
# ## What goes wrong
#
# | what you see | why | what to do |
# |---|---|---|
# | MaxVio near `E / K - 1` from early on, most experts at zero | collapse: nothing balances | update the biases each step, or add the balance loss |
# | loads are even, the loss is worse than without | `alpha` too large: the gradient of balance drowns that of the text | a smaller `alpha`, and the bias update for the rest |
# | loads swing between too many and too few | `gamma` too large for the differences between scores | lower it; V3 takes 0.001, and 0 at the end of training |
# | balance never comes, biases hardly move | `gamma` too small for so few steps | count: `steps * gamma` must reach the differences between scores |
# | biases run away although loads are even | padding counted as tokens | give `token_mask`; padding is routed but not counted |
# | equal to a reference with biases of zero, not with the released weights | biased scores used as gates, or groups scored without bias | test with random biases |
# | bfloat16 run and float32 run choose other experts | scores in bfloat16 | keep the router in float32, as `Router` does under every policy |
#
# One of them in code: scores that differ by less than bfloat16 can hold.

# %%
close = tf.constant([[0.7005, 0.6998, 0.6990, 0.5]])
rounded = tf.cast(close, tf.bfloat16)
print("float32 chooses", tf.math.top_k(close, 1).indices.numpy()[0])
print("in bfloat16 the first three are", np.unique(tf.cast(rounded[0, :3], tf.float32)))
assert len(np.unique(tf.cast(rounded[0, :3], tf.float32))) == 1

# %% [markdown]
# ## Checkpoint
#
# - An expert is a SwiGLU feed-forward; a token's output is the sum of K gated experts and the
#   shared one, and I can write it both by token and by expert.
# - I can list the five steps of V3's router, and say in which of them the bias takes part.
# - I can compute what a layer holds and what a token uses, and know that the second, not the first,
#   sets the number of multiplications.
# - I have seen a router collapse in a small model that was set up for it, and two cures; I know
#   which of them has a gradient.
# - V2 scores by softmax, groups by the best one, and does not normalise its gates.
#
# Next: [Mixed precision](4_precision.md), where all these products shrink to 8 bits.
