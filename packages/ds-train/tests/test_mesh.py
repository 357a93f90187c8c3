"""Ranks as places, the groups that they form, and which of a model's layers lie where."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_model import ModelConfig
from ds_train import TrainConfigError
from ds_train.parallel import Layout, Mesh, make_schedule
from ds_train.parallel.layout import blocks_of_stages, work_of_blocks

meshes = st.builds(Mesh, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


@given(meshes)
def test_every_rank_has_one_place(mesh):
    places = [mesh.place(rank) for rank in range(mesh.size)]
    assert len(set(places)) == mesh.size
    assert [mesh.rank(place) for place in places] == list(range(mesh.size))


@given(meshes)
def test_groups_agree_and_differ_in_their_keys(mesh):
    ranks = range(mesh.size)
    groups = [mesh.world, *(mesh.experts(rank) for rank in ranks)]
    groups += [mesh.pair(a, b) for a, b in itertools.combinations(ranks, 2)]
    groups += [
        mesh.replicas(stages, rank, experts)
        for rank in ranks
        for stages in {(mesh.place(rank).pp,), tuple(sorted({0, mesh.pp - 1}))}
        if mesh.place(rank).pp in stages
        for experts in (False, True)
    ]
    by_key = {}
    for group in groups:
        assert by_key.setdefault(group.key, group) == group
        assert 0 < group.key < 2**31
    for rank in ranks:
        assert rank in mesh.experts(rank).ranks
        assert len(mesh.replicas((mesh.place(rank).pp,), rank, True).ranks) == mesh.dp


@given(st.integers(1, 61), st.integers(0, 2), st.integers(1, 16), st.booleans())
def test_every_block_has_one_stage_and_ranks_even_work(layers, depth, stages, paired):
    config = ModelConfig.preset("tiny").replace(
        num_hidden_layers=layers, num_nextn_predict_layers=depth, first_k_dense_replace=0
    )
    if stages > layers:
        with pytest.raises(TrainConfigError, match=f"{stages} pipeline stages"):
            blocks_of_stages(config, stages)
        return
    ranks = [{stage, stages - 1 - stage} for stage in range((stages + 1) // 2)]
    if not paired:
        ranks = [{stage} for stage in range(stages)]
    found = blocks_of_stages(config, stages, [sorted(rank) for rank in ranks])
    assert [block for blocks in found for block in blocks] == list(range(layers))
    assert min(len(blocks) for blocks in found) >= 1
    (block, *_), end = work_of_blocks(config)
    works = [
        sum(len(found[stage]) * block + end * (stage == stages - 1) for stage in rank)
        for rank in ranks
    ]
    fewest = max(len(rank) for rank in ranks) * block + end  # where each stage has one block
    assert max(works) <= max(sum(works) / len(works) + block, fewest)


def test_the_first_stage_makes_up_for_the_last():
    config = ModelConfig.preset("v3-671b")
    layout = Layout(config, Mesh(pp=16, ep=64), make_schedule("dualpipe", 16, 32))
    sizes = [len(blocks) for blocks in layout.blocks]
    assert sum(sizes) == 61
    works, end = work_of_blocks(config)
    loads = [sum(works[i] for i in blocks) for blocks in layout.blocks]
    loads[-1] += end
    pairs = [loads[i] + loads[15 - i] for i in range(8)]
    assert max(pairs) < 1.11 * sum(pairs) / 8


def test_dualpipe_holds_each_stage_at_two_ranks():
    config = ModelConfig.preset("tiny").replace(num_hidden_layers=4)
    layout = Layout(config, Mesh(pp=4), make_schedule("dualpipe", 4, 8))
    assert layout.holders("block_0/mlp/gate_up_proj/kernel") == (0, 3)
    assert layout.holders("block_2/mlp/gate/weight") == (1, 2)
    assert layout.holders("lm_head/kernel") == (0, 3)
    assert layout.holders("embed_tokens/embeddings") == (0, 3)
    assert layout.part(1).blocks == (1, 2)
    assert not layout.part(1).embedding
    assert layout.part(3).end


def test_the_embedding_lies_at_both_ends_where_both_need_it():
    config = ModelConfig.preset("tiny").replace(num_hidden_layers=4)
    schedule = make_schedule("1f1b", 2, 2)
    assert Layout(config, Mesh(pp=2), schedule).part(1).embedding  # for the MTP module
    plain = config.replace(num_nextn_predict_layers=0)
    assert not Layout(plain, Mesh(pp=2), schedule).part(1).embedding
    tied = plain.replace(tie_word_embeddings=True)
    assert Layout(tied, Mesh(pp=2), schedule).holders("embed_tokens/embeddings") == (0, 1)


def test_experts_that_ranks_do_not_divide():
    config = ModelConfig.preset("tiny")
    with pytest.raises(TrainConfigError, match=r"ep = 3 and n_routed_experts = 8"):
        Layout(config, Mesh(ep=3), make_schedule("1f1b", 1, 1))


def test_a_mesh_of_nothing():
    with pytest.raises(ValueError, match="ep is 0; it must be a positive integer"):
        Mesh(ep=0)
