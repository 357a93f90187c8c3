"""Copies of experts and their places, against the example that DeepSeek publishes with EPLB."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moe import rebalance_experts

# The example of EPLB's README: two layers of 12 experts, 16 copies, 4 groups, 2 nodes, 8 GPUs.
WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example():
    found = rebalance_experts(WEIGHT, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    np.testing.assert_array_equal(found.physical_to_logical, PUBLISHED)


def test_groups_that_nodes_do_not_divide_are_ignored():
    found = rebalance_experts(WEIGHT, num_replicas=16, num_groups=3, num_nodes=2, num_gpus=8)
    alone = rebalance_experts(WEIGHT, num_replicas=16, num_groups=1, num_nodes=1, num_gpus=8)
    for ours, theirs in zip(found, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@st.composite
def cases(draw):
    nodes = draw(st.sampled_from([1, 2, 4]))
    gpus = nodes * draw(st.integers(1, 3))
    groups = nodes * draw(st.integers(1, 2))
    experts = groups * draw(st.integers(1, 4))
    replicas = gpus * (-(-experts // gpus) + draw(st.integers(0, 2)))
    load = draw(st.lists(st.integers(1, 1000), min_size=2 * experts, max_size=2 * experts))
    return np.reshape(load, (2, experts)), replicas, groups, nodes, gpus


@given(cases())
def test_every_copy_has_one_place_and_every_expert_a_copy(case):
    load, replicas, groups, nodes, gpus = case
    found = rebalance_experts(*case)
    assert (found.replica_counts >= 1).all()
    assert (found.replica_counts.sum(axis=1) == replicas).all()
    for layer, owner in enumerate(found.physical_to_logical):
        for expert, copies in enumerate(found.logical_to_physical[layer]):
            assert sorted(copies[copies >= 0]) == np.flatnonzero(owner == expert).tolist()
        # A group's experts stay on one node.
        node_of = np.repeat(np.arange(nodes), replicas // nodes)
        group_of = owner // (load.shape[1] // groups)
        for group in range(groups):
            assert len(set(node_of[group_of == group])) == 1
    np.testing.assert_allclose(found.gpu_loads(load, gpus).sum(axis=1), load.sum(axis=1))


def test_copies_of_the_busiest_even_out_the_load():
    rng = np.random.default_rng(0)
    load = rng.pareto(1.5, (4, 64)) + 0.1
    plain = load.reshape(4, 8, 8).sum(axis=-1)
    found = rebalance_experts(load, num_replicas=80, num_groups=1, num_nodes=1, num_gpus=8)
    loads = found.gpu_loads(load, 8)
    assert (loads.max(axis=1) < plain.max(axis=1)).all()
    assert (loads.max(axis=1) / loads.mean(axis=1) < 1.2).all()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((10, 1, 1, 4), r"num_gpus is 4; it must divide num_replicas \(10\)"),
        ((8, 1, 1, 8), "num_replicas is 8; each of 12 experts needs one"),
        ((16, 8, 2, 8), r"num_groups is 8; it must divide the experts \(12\)"),
        ((16, 4, 2, 7), r"num_nodes is 2; it must divide num_gpus \(7\)"),
    ],
)
def test_numbers_that_do_not_fit(numbers, said):
    with pytest.raises(ValueError, match=said):
        rebalance_experts(WEIGHT, *numbers)


def test_a_load_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"weight has shape \[3\]; it must be \[layers, experts\]"):
        rebalance_experts([1, 2, 3], 3, 1, 1, 1)
