import numpy as np
import pytest
import tensorflow as tf

from ds_attention import AttentionConfig, LatentCache, causal_mask, memory_report

V3 = AttentionConfig(
    hidden_size=7168,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)


def test_v3_caches_576_numbers_where_standard_attention_caches_32768():
    # arXiv 2405.04434, table 1: 4.5 d_h a token against 2 n_h d_h, d_h = 128, n_h = 128.
    report = memory_report(V3, batch=2, length=8, dtype="bfloat16")

    assert report.mla_bytes == 2 * 8 * 576 * 2
    assert report.mha_bytes == 2 * 8 * 32768 * 2
    assert round(100 * report.saving, 1) == 98.2


def test_report_weighs_the_tensors_of_the_asked_type():
    assert memory_report(V3, dtype="float32").mla_bytes == 2 * memory_report(V3).mla_bytes


def test_write_touches_only_its_slots():
    config = AttentionConfig(8, 1, 2, 2, 2, 2)
    cache = LatentCache.allocate(config, 2, 5)
    new = tf.reshape(tf.range(1.0, 17.0), [2, 2, 4])

    written = cache.write(new, tf.constant([[0, 3], [4, 1]])).entries.numpy()
    np.testing.assert_array_equal(written[0, [0, 3]], new[0])
    np.testing.assert_array_equal(written[1, [4, 1]], new[1])
    assert np.count_nonzero(written) == 16
    shared = cache.write(new, tf.constant([[2, 3]])).entries.numpy()
    np.testing.assert_array_equal(shared[:, 2:4], new)


def test_causal_mask_sees_valid_slots_up_to_its_own():
    mask = causal_mask(tf.constant([[2, 3]]), 4, tf.constant([[0, 1, 1, 1], [1, 1, 1, 0]]))

    np.testing.assert_array_equal(
        mask,
        [
            [[False, True, True, False], [False, True, True, True]],
            [[True, True, True, False], [True, True, True, False]],
        ],
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"v_head_dim": 1.5}, "v_head_dim is 1.5"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim is 3; it must be even"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0"),
    ],
)
def test_bad_sizes_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        AttentionConfig(**(V3.to_dict() | change))
