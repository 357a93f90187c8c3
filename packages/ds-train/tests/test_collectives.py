"""The order of collectives: one on each rank, that no rank waits for another for ever."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from conftest import CUT, tables
from ds_train import AdamW, TrainConfig, TrainConfigError
from ds_train.parallel import Engine, Mesh, Ranks, World
from ds_train.parallel.share import RankShare
from ds_train.parallel.world import lost

COLLECTIVES = ("CollectiveReduceV2", "CollectiveGatherV2", "CollectiveAllToAllV2")


def config_of(**changes):
    parallel = {"pp": 2, "ep": 2, "zero": 1, "schedule": "zb1p"}
    train = {"batch_size": 4, "accumulation": 2}
    found = {"model": CUT, "parallel": parallel, "train": train}
    for table, values in changes.items():
        found[table] = found[table] | values
    return TrainConfig.from_dict(tables(**found))


def traced(config, rank):
    """Trace one rank's step in this process; nothing is exchanged."""
    table = config.parallel
    world = World(Mesh(table.pp, table.ep, table.dp), rank)
    keras.utils.set_random_seed(0)
    share = RankShare(config, config.model.build(), AdamW(config.learning_rate()), world)
    spec = tf.TensorSpec([config.train.accumulation, 1, 17], tf.int32)
    graph = share._step.compiled.get_concrete_function(spec).graph
    return world, graph


@pytest.fixture(scope="module")
def ranks():
    return [traced(config_of(), rank) for rank in range(4)]


def test_members_of_a_group_mean_the_same_by_each_key(ranks):
    orders = {}
    for rank, (world, _) in enumerate(ranks):
        for entry in world.engine.record:
            orders.setdefault(entry.group, {}).setdefault(rank, []).append(entry)
    for group, order in orders.items():
        first, *others = order.values()
        assert all(other == first for other in others), group
        assert len({entry.instance for entry in first}) == len(first)


def test_ranks_that_run_them_one_by_one_come_to_the_end(ranks):
    waiting = [list(world.engine.record) for world, _ in ranks]
    members = {world.mesh.world.name: world.mesh.world.ranks for world, _ in ranks}
    for world, _ in ranks:
        members |= {each.group.name: each.group.ranks for each in world._known.values()}
    while any(waiting):
        heads = {rank: order[0] for rank, order in enumerate(waiting) if order}
        ready = [
            entry
            for entry in heads.values()
            if all(heads.get(rank) == entry for rank in members[entry.group])
        ]
        assert ready, heads
        for rank in members[ready[0].group]:
            waiting[rank].pop(0)


def test_the_graph_runs_them_in_the_order_in_which_they_were_traced(ranks):
    for world, graph in ranks:
        found = [op for op in graph.get_operations() if op.type in COLLECTIVES]
        assert [op.type for op in found] == [entry.operation for entry in world.engine.record]
        for before, after in itertools.pairwise(found):
            assert before in after.control_inputs


def test_alone_nothing_is_exchanged():
    engine = Engine()
    alone = Ranks(Mesh().world, 0, engine)
    x = tf.constant(np.arange(6.0).reshape(1, 6), tf.float32)
    for found in (alone.all_reduce(x), alone.all_gather(x), alone.all_to_all(x)):
        np.testing.assert_array_equal(found, x)
    np.testing.assert_array_equal(alone.reduce_scatter(x[0]), x[0])
    assert engine.record == []


def test_only_two_can_swap():
    three = Ranks(Mesh(dp=3).world, 0, Engine())
    with pytest.raises(ValueError, match="has 3 members; only two can swap"):
        three.swap(tf.zeros([2]))


def test_a_lost_rank_is_named():
    error = tf.errors.UnavailableError(None, None, "from /job:worker/replica:0/task:2: gone\nx")
    assert str(lost(error, "within a step")) == (
        "lost rank 2 (UnavailableError, within a step): from /job:worker/replica:0/task:2: gone x"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"nonfinite": "skip"}}, r"\[train\] nonfinite = 'skip' works in one process"),
        ({"train": {"watch_every": 3}}, r"\[train\] watch_every = 3 works in one process"),
        ({"parallel": {"schedule": "dualpipe"}}, r"dualpipe with 2 micro-batches; 2 ranks need 4"),
        ({"model": {"num_hidden_layers": 1}}, r"2 pipeline stages and num_hidden_layers = 1"),
    ],
)
def test_what_does_not_fit_a_mesh(changes, said):
    with pytest.raises(TrainConfigError, match=said):
        traced(config_of(**changes), 0)


def test_a_batch_that_ranks_do_not_divide():
    with pytest.raises(TrainConfigError, match=r"batch_size = 6 .* accumulation x ep x dp = 2 x 2"):
        config_of(train={"batch_size": 6})
