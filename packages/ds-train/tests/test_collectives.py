"""The order of collectives: one on each rank, that no rank waits for another for ever."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from conftest import CUT, losses, tables, tokens
from ds_model import CausalLM
from ds_train import AdamW, TrainConfig, TrainConfigError, Trainer, TrainError
from ds_train.checkpoint import weight_name
from ds_train.parallel import Engine, LostRankError, Mesh, Ranks, World
from ds_train.parallel.share import RankShare, micro_batches
from ds_train.parallel.worker import guarded
from ds_train.parallel.world import lost
from ds_train.trainer import Stopped

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
    sizes = (1,) * config.train.accumulation
    spec = tf.TensorSpec([len(sizes), 17], tf.int32)
    graph = share._step.compiled.get_concrete_function(spec, sizes).graph
    return world, graph, share


@pytest.fixture(scope="module")
def made():
    return [traced(config_of(), rank) for rank in range(4)]


@pytest.fixture(scope="module")
def ranks(made):
    return [(world, graph) for world, graph, _ in made]


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


def test_what_ranks_save_is_every_number_once(made):
    config = config_of()
    keras.utils.set_random_seed(0)
    whole = CausalLM(config.model.build())
    shapes = {weight_name(variable): tuple(variable.shape) for variable in whole.variables}
    trained = {weight_name(variable) for variable in whole.trainable_variables}
    saved, needed = {}, {}
    for _, _, share in made:
        for found, to_save in ((saved, True), (needed, False)):
            for pieces in share.contents(to_save).values():
                for piece in pieces:
                    found.setdefault(piece.name, []).append(piece)
    kinds = {f"{kind}/{name}" for kind in ("momentum", "velocity") for name in trained}
    assert saved.keys() == needed.keys() == {"iterations"} | shapes.keys() | kinds
    assert len(saved.pop("iterations")) == 1
    assert len(needed["iterations"]) == 4
    for name, pieces in saved.items():
        shape = shapes[name.removeprefix("momentum/").removeprefix("velocity/")]
        count = np.zeros(int(np.prod(shape)), int)
        for piece in pieces:
            assert piece.shape == shape
            count[piece.start : piece.start + piece.count] += 1
        assert (count == 1).all(), name
    # And a rank's weights are those of the whole model, drawn alike.
    for _, _, share in made:
        for piece in share.contents(to_save=False)["model"]:
            values = next(v for v in whole.variables if weight_name(v) == piece.name).numpy()
            mine = piece.variable.numpy().reshape(-1)
            here = values.reshape(-1)[piece.start : piece.start + piece.count]
            np.testing.assert_array_equal(mine, here, err_msg=piece.name)


def test_ranks_say_what_they_hold(made):
    said = [share.describe() for _, _, share in made]
    assert "pipeline 0 of 2, experts 1 of 2" in said[1]
    assert "stage 1 (blocks 3)" in said[2]


@pytest.mark.parametrize("zero", [0, 1])
def test_one_rank_is_one_process(zero, tmp_path):
    """Without peers: the step, the update, what is saved and read again."""
    config = TrainConfig.from_dict(tables(parallel={"zero": zero}, train={"accumulation": 2}))
    alone = Trainer(config, tokens(), tmp_path / "alone")
    alone.train()
    for _ in range(2):  # the second time it reads what the first saved
        rank = Trainer(config, tokens(), tmp_path / "rank", world=World(Mesh(), 0))
        rank.train()
        for ours, theirs in zip(rank.model.variables, alone.model.variables, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses(tmp_path / "rank"), losses(tmp_path / "alone"), rtol=1e-5)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (None, 0, ""),
        (TrainError("no\n text"), 2, "rank 3: no text"),
        (LostRankError("lost rank 2"), 3, "rank 3: lost rank 2"),
        (Stopped("told to stop; step 5 is saved"), 4, "rank 3: told to stop; step 5 is saved"),
    ],
)
def test_a_rank_ends_with_a_line_and_a_code(raised, code, said, capsys):
    def work():
        if raised is not None:
            raise raised

    assert guarded(lambda: "rank 3", work) == code
    assert capsys.readouterr().out.strip() == said


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
        ({"train": {"watch_every": 3}}, r"\[train\] watch_every = 3 looks at a whole model, which"),
        ({"parallel": {"schedule": "dualpipe"}}, r"dualpipe with 2 micro-batches; 2 ranks need 4"),
        ({"model": {"num_hidden_layers": 1}}, r"2 pipeline stages and num_hidden_layers = 1"),
    ],
)
def test_what_does_not_fit_a_mesh(changes, said):
    with pytest.raises(TrainConfigError, match=said):
        traced(config_of(**changes), 0)


def test_a_batch_that_leaves_a_rank_without_a_sequence():
    with pytest.raises(
        TrainConfigError, match=r"batch_size = 3 .* at least .* ep x dp = 2 x 2 x 1"
    ):
        config_of(train={"batch_size": 3})


def test_micro_batches_differ_by_a_sequence_at_most():
    assert micro_batches(7, 2, 3) == [(2, 1, 1), (1, 1, 1)]
    assert micro_batches(8, 2, 2) == [(2, 2), (2, 2)]


def test_who_is_gone_when_all_is_done_is_no_loss(monkeypatch):
    world = World(Mesh(dp=2), rank=1)

    def gone(_):
        raise LostRankError("rank 0 has ended")

    monkeypatch.setattr(world, "total", gone)
    world.leave_together()
    with pytest.raises(LostRankError):
        world.wait_for_all()
