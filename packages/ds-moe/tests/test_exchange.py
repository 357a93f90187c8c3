"""Experts on several ranks give what one rank gives: outputs, gradients, initial weights.

The ranks are threads here, which hand each other tensors; processes are tested in `ds-train`.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf

from ds_moe import MixtureOfExperts, MoEConfig
from ds_precision import Fp8Policy

CONFIG = MoEConfig(
    hidden_size=16,
    moe_intermediate_size=8,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    initializer_range=0.5,
)


class Table:
    """Where threads lay down what they have, and take what all have."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.given = [None] * size
        self.rows = 0

    def all(self, index, x):
        self.given[index] = x
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class ThreadRanks:
    def __init__(self, table, index):
        self.table, self.size, self.index = table, table.size, index
        self.sent = []

    def all_gather(self, x):
        return tf.concat(self.table.all(self.index, x), axis=0)

    def all_to_all(self, x, power):
        assert x.shape[:2] == [self.size, 1 << int(power)]  # what the shape is told by
        self.sent.append(x)

        @tf.custom_gradient
        def exchange(x):
            return self._exchange(x), self._exchange

        return exchange(x)

    def _exchange(self, x):
        return tf.stack([given[self.index] for given in self.table.all(self.index, x)])


def on_ranks(size, tokens, config=CONFIG, dtype="float32"):
    """Run one layer on so many ranks; return each one's layer, output, gradients and ranks."""
    table = Table(size)
    layers = []
    for index in range(size):
        keras.utils.set_random_seed(7)
        layer = MixtureOfExperts(config, dtype=dtype)
        layer.deal_out(ThreadRanks(table, index))
        layer.build((None, None, config.hidden_size))
        layers.append(layer)

    def rank(index):
        x, layer = tf.constant(tokens[index]), layers[index]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, routing = layer(x)
            loss = tf.reduce_sum(tf.cast(y, tf.float32) ** 2)
        gradients = tape.gradient(loss, [x, *layer.trainable_variables])
        return layer, y, routing, gradients

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def alone(tokens, config=CONFIG, dtype="float32"):
    keras.utils.set_random_seed(7)
    layer = MixtureOfExperts(config, dtype=dtype)
    layer.build((None, None, config.hidden_size))
    found = []
    for x in map(tf.constant, tokens):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, routing = layer(x)
            loss = tf.reduce_sum(tf.cast(y, tf.float32) ** 2)
        found.append((y, routing, tape.gradient(loss, [x, *layer.trainable_variables])))
    return layer, found


def tokens(size, count=9, skew=0.0):
    rng = np.random.default_rng(0)
    lean = skew * rng.normal(size=CONFIG.hidden_size)
    return (rng.normal(size=(size, 1, count, CONFIG.hidden_size)) + lean).astype(np.float32)


# A skew sends nearly all tokens to a few experts, and so nothing at all to some ranks.
@pytest.mark.parametrize(("size", "skew"), [(2, 0.0), (4, 0.0), (4, 30.0), (8, 0.0)])
def test_ranks_together_do_what_one_does(size, skew):
    given = tokens(size, skew=skew)
    whole, want = alone(given)
    found = on_ranks(size, given)
    names = [weight.path.split("/", 1)[-1] for weight in whole.trainable_variables]
    summed = [np.add.reduce([np.asarray(g[2][1 + i]) for g in want]) for i in range(len(names))]
    for index, (layer, y, routing, gradients) in enumerate(found):
        np.testing.assert_allclose(y, want[index][0], rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(routing.load, want[index][1].load)
        np.testing.assert_allclose(gradients[0], want[index][2][0], rtol=1e-4, atol=1e-3)
        share = slice(layer.first_expert, layer.first_expert + layer.experts_here)
        for name, weight, gradient in zip(
            names, layer.trainable_variables, gradients[1:], strict=True
        ):
            at = names.index(name)
            if name in ("gate_up_proj", "down_proj"):
                # Of all ranks' tokens already.
                np.testing.assert_array_equal(weight, whole.trainable_variables[at][share])
                np.testing.assert_allclose(gradient, summed[at][share], rtol=1e-3, atol=1e-2)
            else:
                np.testing.assert_array_equal(weight, whole.trainable_variables[at])
                own = np.asarray(want[index][2][1 + at])
                np.testing.assert_allclose(gradient, own, rtol=1e-3, atol=1e-2)


def test_a_token_goes_to_no_more_ranks_than_groups_allow():
    size, count = 4, 64
    found = on_ranks(size, tokens(size, count))
    for layer, _, routing, _ in found:
        # Four groups on four ranks, of which a token may use two.
        owners = routing.indices.numpy() // layer.experts_here
        ranks_of_token = [len(set(row)) for row in owners]
        assert max(ranks_of_token) == 2
        # Each token was sent once to each of these: rows that carry a choice.
        choices = layer._ranks.sent[1].numpy()
        rows = (choices[..., : CONFIG.num_experts_per_tok] >= 0).any(axis=-1).sum()
        assert rows == sum(ranks_of_token)


def test_bfloat16_travels_as_it_is():
    given = tokens(2)
    _, want = alone(given, dtype="mixed_bfloat16")
    for index, (layer, y, _, _) in enumerate(on_ranks(2, given, dtype="mixed_bfloat16")):
        assert layer._ranks.sent[0].dtype == tf.bfloat16
        np.testing.assert_allclose(
            tf.cast(y, tf.float32), tf.cast(want[index][0], tf.float32), rtol=0.02, atol=0.05
        )


@pytest.mark.parametrize("source", ["float32", "mixed_bfloat16"])
def test_tokens_travel_in_eight_bits_and_nothing_changes(source):
    policy = Fp8Policy(source, {"tile": 8, "gradient_format": "E5M2"})
    given = tokens(2)
    _, want = alone(given, dtype=policy)
    for index, (layer, y, _, gradients) in enumerate(on_ranks(2, given, dtype=policy)):
        first, choice, back = layer._ranks.sent[:3]
        assert first.dtype == tf.int32
        assert first.shape[-1] == 16 // 4 + 16 // 8  # four numbers each, and a scale a tile
        assert choice.dtype == tf.float32
        assert back.dtype == layer.compute_dtype
        close = (
            {"rtol": 1e-6, "atol": 1e-6} if source == "float32" else {"rtol": 0.02, "atol": 0.05}
        )
        np.testing.assert_allclose(
            tf.cast(y, tf.float32), tf.cast(want[index][0], tf.float32), **close
        )
        dx, alone_dx = (
            np.asarray(tf.cast(g, tf.float32)) for g in (gradients[0], want[index][2][0])
        )
        # Sums of an expert's rows are over all ranks' tokens, in other tiles: not compared.
        apart = np.linalg.norm(dx - alone_dx) / np.linalg.norm(alone_dx)
        assert apart < (1e-5 if source == "float32" else 0.02)


def test_experts_are_dealt_out_before_they_are_made():
    layer = MixtureOfExperts(CONFIG)
    layer.build((None, None, 16))
    with pytest.raises(ValueError, match="has its weights already"):
        layer.deal_out(ThreadRanks(Table(2), 0))
    with pytest.raises(ValueError, match="8 experts can't be shared out evenly to 3 ranks"):
        MixtureOfExperts(CONFIG).deal_out(ThreadRanks(Table(3), 0))
