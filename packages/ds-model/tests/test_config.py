import json

import pytest

from ds_attention import YarnConfig
from ds_model import ConfigError, ModelConfig

TINY = ModelConfig.preset("tiny")
# `rope_scaling` of DeepSeek-V3's released config.json.
RELEASED_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}


def test_what_is_written_reads_back_equal():
    for name in ("tiny", "mini", "bench", "v2-lite", "v3-671b"):
        config = ModelConfig.preset(name).replace(eos_token_id=(1, 7))
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_both_ways_of_writing_rope_mean_the_same():
    released = TINY.to_dict() | {"rope_theta": 5e4, "rope_scaling": RELEASED_YARN}
    newer = TINY.to_dict() | {
        "rope_parameters": {**RELEASED_YARN, "rope_type": "yarn", "rope_theta": 5e4}
    }
    del newer["rope_theta"], newer["rope_scaling"]

    expected = YarnConfig(40, 4096, 32, 1, 1.0, 1.0)
    for values in (released, newer):
        config = ModelConfig.from_dict(values)
        assert config.rope_theta == 5e4
        assert config.rope_scaling == expected
        assert config.attention.rope_scaling == expected


def test_plain_rope_written_the_new_way_is_no_scaling():
    values = TINY.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}

    config = ModelConfig.from_dict(values)
    assert config.rope_scaling is None
    assert config.rope_theta == 123.0


def test_a_missing_factor_is_the_ratio_of_the_lengths():
    values = TINY.to_dict() | {
        "max_position_embeddings": 4096,
        "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 512},
    }

    assert ModelConfig.from_dict(values).rope_scaling.factor == 8


def test_v2_gets_its_own_defaults():
    # What transformers' DeepseekV2Config holds where config.json is silent.
    values = TINY.to_dict() | {"model_type": "deepseek_v2"}
    for field in ("scoring_func", "topk_method", "norm_topk_prob", "first_k_dense_replace"):
        del values[field]

    config = ModelConfig.from_dict(values)
    assert (config.scoring_func, config.topk_method) == ("softmax", "greedy")
    assert not config.moe.norm_topk_prob
    assert config.is_moe_layer(0)


def test_v3_without_a_topk_method_is_noaux_tc():
    values = TINY.to_dict() | {"topk_method": None}

    assert ModelConfig.from_dict(values).topk_method == "noaux_tc"


def test_which_blocks_have_experts():
    config = TINY.replace(num_hidden_layers=4, first_k_dense_replace=2)
    assert [config.is_moe_layer(i) for i in range(5)] == [False, False, True, True, True]
    # An MTP module has experts even behind an all-dense model (transformers' get_mtp_config).
    dense = config.replace(first_k_dense_replace=9)
    assert [dense.is_moe_layer(i) for i in range(5)] == [False] * 4 + [True]
    assert not config.replace(n_routed_experts=0).is_moe_layer(4)
    assert config.replace(n_routed_experts=None).moe is None


def test_end_tokens_as_a_tuple():
    assert TINY.replace(eos_token_id=None).eos_token_ids == ()
    assert TINY.replace(eos_token_id=5).eos_token_ids == (5,)
    assert TINY.replace(eos_token_id=[5, 6]).eos_token_ids == (5, 6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": -4}, "hidden_size is -4; it must be a positive integer"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; it must be even"),
        ({"n_group": 3}, r"n_group is 3; it must divide n_routed_experts \(8\)"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "llama"}, "model_type is 'llama'; known"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is 'linear'; known"),
        ({"rope_scaling": {**RELEASED_YARN, "factor": 0.1}}, "factor is 0.1"),
        ({"mlp_bias": True}, "mlp_bias is True; only False"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"kv_lora_rank": None}, "config is missing kv_lora_rank"),
    ],
)
def test_what_is_wrong_is_named(change, named):
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(TINY.to_dict() | change)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ConfigError, match="preset is 'huge'; known: tiny, mini, bench"):
        ModelConfig.preset("huge")


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "cannot be read"), ("{", "not valid JSON"), ("[1]", "holds list")],
)
def test_an_unreadable_file_is_named(tmp_path, content, named):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"config.json.*{named}"):
        ModelConfig.from_pretrained(tmp_path)
