"""Copies of busy experts change no output, and share out their tokens."""

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_exchange import CONFIG, Table, ThreadRanks, alone, tokens

from ds_moe import MixtureOfExperts, rebalance_experts
from ds_moe.copies import Copies

EXPERTS = CONFIG.n_routed_experts


def placed(loads, size, copies):
    """Return who holds what by DeepSeek's policy, groups kept on a rank where they can be."""
    return rebalance_experts([loads], copies, CONFIG.n_group, 1, size).physical_to_logical[0]


@pytest.mark.parametrize(("size", "copies"), [(2, 10), (4, 8), (4, 12), (4, 16)])
def test_copies_change_no_output_and_even_out_the_load(size, copies):
    given = tokens(size, count=64, skew=0.7)
    _, want = alone(given)
    loads = np.add.reduce([np.asarray(routing.load) for _, routing, _ in want])
    table = Table(size)
    # First evenly, so that weights move from where copies are to where others are.
    rows = placed(np.ones(EXPERTS), size, copies), placed(loads, size, copies)

    layers = []
    for index in range(size):
        keras.utils.set_random_seed(7)
        layer = MixtureOfExperts(CONFIG)
        layer.deal_out(ThreadRanks(table, index))
        layer.build((None, None, CONFIG.hidden_size))
        layers.append(layer)

    def rank(index):
        layer, found = layers[index], []
        for row in rows:
            layer.place(row)
            found.append(layer(tf.constant(given[index])))
        return layer, found

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank, range(size)))
    taken = np.zeros(size)
    for index, (layer, found) in enumerate(results):
        assert layer.experts_here == copies // size
        trained = {weight.name for weight in layer.trainable_variables}
        assert not trained & {"gate_up_proj", "down_proj"}
        for y, routing in found:
            np.testing.assert_allclose(y, want[index][0], rtol=2e-5, atol=2e-5)
            np.testing.assert_array_equal(routing.load, want[index][1].load)
        chosen = Copies.of(rows[1], EXPERTS).chosen(found[1][1].indices, index)
        taken += np.bincount(np.ravel(chosen) // layer.experts_here, minlength=size)
    foretold = rebalance_experts([loads], copies, CONFIG.n_group, 1, size).gpu_loads([loads], size)
    np.testing.assert_allclose(taken, foretold[0], atol=4 * size)  # a share is of whole tokens
    plain = loads.reshape(size, -1).sum(axis=-1).max()
    if copies > EXPERTS:
        assert taken.max() < plain


def test_tokens_go_to_copies_in_turn():
    copies = Copies.of([0, 1, 0, 2, 0, 1], 3)
    np.testing.assert_array_equal(copies.counts, [3, 2, 1])
    chosen = copies.chosen(tf.constant([[0, 1]] * 6), turn=1)
    np.testing.assert_array_equal(chosen[:, 0], [2, 4, 0, 2, 4, 0])
    np.testing.assert_array_equal(chosen[:, 1], [5, 1, 5, 1, 5, 1])


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([0, 1, 1, 3], "expert 2 has no copy; each needs one"),
        ([0, 1, 2, 3, 9], "a copy is of expert 9; there are 4"),
    ],
)
def test_every_expert_needs_a_copy(held, said):
    with pytest.raises(ValueError, match=said):
        Copies.of(held, 4)


def test_what_can_not_be_placed_is_refused():
    layer = MixtureOfExperts(CONFIG)
    layer.build((None, None, CONFIG.hidden_size))
    with pytest.raises(ValueError, match="copies need experts that are dealt out"):
        layer.place(np.arange(EXPERTS))
    layer = MixtureOfExperts(CONFIG)
    layer.deal_out(ThreadRanks(Table(2), 0))
    layer.build((None, None, CONFIG.hidden_size))
    with pytest.raises(ValueError, match="9 copies can't lie evenly on 2 ranks"):
        layer.place([*range(EXPERTS), 0])
