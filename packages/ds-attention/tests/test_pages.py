"""Attention over blocks of a pool equals attention over whole sequences, however they are cut."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_attention import (
    AttentionConfig,
    MultiHeadLatentAttention,
    Pages,
    YarnConfig,
    latent_pool,
)

BLOCK = 4


def layer(**fields):
    tf.keras.utils.set_random_seed(1)
    config = AttentionConfig(
        **{
            "hidden_size": 32,
            "num_attention_heads": 3,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 12,
            "initializer_range": 0.3,
        }
        | fields
    )
    made = MultiHeadLatentAttention(config)
    made.build((None, None, 32))
    return made


YARN = YarnConfig(factor=4, original_max_position_embeddings=16)
LAYERS = {
    "plain": layer(),
    "with q_lora_rank": layer(q_lora_rank=20),
    "YaRN": layer(rope_scaling=YARN, rope_interleave=False),
}


def run(attention, lengths, cuts, seed, stock=False, copied=False):
    """Read sequences in pieces, in blocks of random places; return what was and what should be."""
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=[n, 32]).astype(np.float32) for n in lengths]
    expected = [attention(one[None]).numpy()[0] for one in x]
    found = [np.zeros_like(one) for one in expected]
    used = [-(-n // BLOCK) for n in lengths]
    places = rng.permutation(sum(used) + 4).tolist()
    spare = places[sum(used) :]
    tables = [[places.pop(0) for _ in range(count)] for count in used]
    pool = latent_pool(attention.config, sum(used) + 4, BLOCK)
    done = [0] * len(lengths)
    for turn in range(1000):
        counts = [
            min(cuts[(turn + i) % len(cuts)], n - d)
            for i, (n, d) in enumerate(zip(lengths, done, strict=True))
        ]
        taking = sorted((i for i, count in enumerate(counts) if count), key=lambda i: counts[i] > 8)
        if not taking:
            break
        copies = np.zeros([0, 2], np.int32)
        if copied and spare and done[taking[0]] % BLOCK:
            at = done[taking[0]] // BLOCK
            copies = np.array([[tables[taking[0]][at], spare[0]]], np.int32)
            tables[taking[0]][at] = spare.pop(0)
        widest = max(len(tables[i]) for i in taking)
        pages = Pages(
            np.concatenate([np.arange(done[i], done[i] + counts[i]) for i in taking]).astype(
                np.int32
            ),
            np.cumsum([0] + [counts[i] for i in taking]).astype(np.int32),
            np.array([tables[i] + [0] * (widest - len(tables[i])) for i in taking], np.int32),
            copies,
        )
        new = np.concatenate([x[i][done[i] : done[i] + counts[i]] for i in taking])
        run_one = attention._paged_stock if stock else attention.paged
        out = run_one(tf.constant(new[None]), pool, Pages(*map(tf.constant, pages)))[0].numpy()
        at = 0
        for i in taking:
            found[i][done[i] : done[i] + counts[i]] = out[at : at + counts[i]]
            done[i] += counts[i]
            at += counts[i]
    return found, expected


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("stock", [False, True], ids=["compiled", "stock"])
@pytest.mark.parametrize("copied", [False, True])
def test_pieces_in_blocks_equal_the_whole(name, stock, copied):
    found, expected = run(LAYERS[name], [3, 30, 17, 1, 12], [1, 9, 2, 20, 5], 0, stock, copied)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=5e-6)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_however_sequences_are_cut(lengths, cuts, seed):
    found, expected = run(LAYERS["plain"], lengths, cuts, seed)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=5e-6)


def test_the_pool_changes_where_it_lies():
    attention = LAYERS["plain"]
    pool = latent_pool(attention.config, 3, BLOCK)
    pages = Pages(*(tf.constant(v, tf.int32) for v in ([0, 1], [0, 2], [[2]], np.zeros([0, 2]))))
    x = np.random.default_rng(0).normal(size=[1, 2, 32]).astype(np.float32)
    tf.function(attention.paged)(tf.constant(x), pool, pages)
    entries = pool.numpy()
    expected = attention._compress(tf.constant(x), tf.constant([[0, 1]])).numpy()[0]
    np.testing.assert_allclose(entries[2, :2], expected, atol=1e-6)
    assert not entries[:2].any()
    assert not entries[2, 2:].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slots": [4, 5]}, "slots hold 4; a table has room for 4"),
        ({"splits": [0, 1]}, "splits must run from 0"),
        ({"tables": [[7]]}, "tables hold block 7; the pool has 3"),
        ({"copies": [[0, 3]]}, "copies hold block 3"),
    ],
    ids=str,
)
def test_places_out_of_range_are_refused(change, words):
    attention = LAYERS["plain"]
    pool = latent_pool(attention.config, 3, BLOCK)
    values = {"slots": [0, 1], "splits": [0, 2], "tables": [[2]], "copies": np.zeros([0, 2])}
    pages = Pages(**{k: tf.constant(v, tf.int32) for k, v in (values | change).items()})
    x = tf.zeros([1, 2, 32])
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        attention.paged(x, pool, pages)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_a_pool_without_room_is_refused(sizes):
    with pytest.raises(ValueError, match="is 0; it must be 1 or more"):
        latent_pool(LAYERS["plain"].config, *sizes)
