"""A checkpoint is exactly its configuration's model, or the error names the tensor."""

import logging

import numpy as np
import pytest
from reference_cases import CASES
from reference_weights import weights
from safetensors.numpy import save_file

from ds_model.checkpoint.checking import check_layout, mtp_depth_present
from ds_model.checkpoint.reader import SINGLE, TensorFiles
from ds_model.config import ModelConfig
from ds_model.errors import CheckpointError

RELEASED = next(case for case in CASES if case.name == "released")
CONFIG = ModelConfig.from_dict(RELEASED.config)
MTP = f"model.layers.{CONFIG.num_hidden_layers}."


@pytest.fixture(scope="module")
def tensors():
    return weights(RELEASED)


def check(directory, tensors, config=CONFIG):
    save_file(tensors, directory / SINGLE)
    with TensorFiles(directory) as files:
        check_layout(files, config)


def refused(directory, tensors, config=CONFIG):
    with pytest.raises(CheckpointError) as caught:
        check(directory, tensors, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(tensors, *names):
    return {name: array for name, array in tensors.items() if name not in names}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accepts_every_reference_case(tmp_path, case):
    check(tmp_path, weights(case), ModelConfig.from_dict(case.config))


def test_every_missing_tensor_is_named(tmp_path, tensors):
    copies = {f"{MTP}embed_tokens.weight", f"{MTP}shared_head.head.weight"}
    for name in list(tensors)[::7]:
        if name not in copies:
            assert f"missing from the checkpoint: {name}" in refused(
                tmp_path, without(tensors, name)
            )


def test_many_missing_tensors_are_counted(tmp_path, tensors):
    experts = [name for name in tensors if ".experts." in name]
    assert f"and {len(experts) - 3} more" in refused(tmp_path, without(tensors, *experts))


def test_unused_tensor_is_named(tmp_path, tensors):
    stray = {"model.layers.0.mlp.gate.weight": np.ones((2, 2), np.float32)}
    assert "model.layers.0.mlp.gate.weight" in refused(tmp_path, tensors | stray)


def test_misshapen_tensor_is_named_with_both_shapes(tmp_path, tensors):
    name = "model.layers.1.self_attn.o_proj.weight"
    turned = {name: np.ascontiguousarray(tensors[name].T)}
    have, need = list(tensors[name].T.shape), list(tensors[name].shape)
    assert f"{name} is {have} and must be {need}" in refused(tmp_path, tensors | turned)


def test_undecodable_dtype_is_named(tmp_path, tensors):
    name = "model.norm.weight"
    wide = {name: tensors[name].astype(np.float64)}
    assert f"{name} has dtype F64" in refused(tmp_path, tensors | wide)


def test_copies_of_embedding_and_head_may_be_left_out(tmp_path, tensors):
    copies = f"{MTP}embed_tokens.weight", f"{MTP}shared_head.head.weight"
    check(tmp_path, without(tensors, *copies))


def test_inv_freq_of_old_checkpoints_is_passed_over(tmp_path, tensors):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    check(tmp_path, tensors | old)


def test_tensors_of_size_zero_are_passed_over(tmp_path, tensors):
    name = "model.layers.0.mlp.shared_experts.up_proj.weight"
    check(tmp_path, tensors | {name: np.ones((0, CONFIG.hidden_size), np.float32)})


def test_a_tied_head_may_be_stored(tmp_path):
    case = next(case for case in CASES if case.config["tie_word_embeddings"])
    tensors = weights(case)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    check(tmp_path, tensors | head, ModelConfig.from_dict(case.config))


def test_depth_is_what_config_announces_if_its_tensors_are_there(tmp_path, tensors, caplog):
    save_file(tensors, tmp_path / SINGLE)
    assert mtp_depth_present(tmp_path, CONFIG) == 1
    assert not caplog.records


def test_a_module_in_part_is_refused_before_a_model_is_built(tmp_path, tensors):
    names = [name for name in tensors if name.startswith(MTP)]
    save_file(without(tensors, *names[1:]), tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=f"missing.*{MTP}"):
        mtp_depth_present(tmp_path, CONFIG)


def test_an_absurd_config_is_refused_in_bounded_memory(tmp_path, tensors):
    save_file(tensors, tmp_path / SINGLE)
    for absurd in (
        {"num_hidden_layers": 10**9},
        {"n_routed_experts": 10**9, "n_group": 1, "topk_group": 1},
    ):
        with pytest.raises(CheckpointError, match="1,000,000,000"):
            mtp_depth_present(tmp_path, CONFIG.replace(**absurd))


def test_depth_is_zero_with_a_notice_if_no_tensor_is_there(tmp_path, tensors, caplog):
    main = {name: array for name, array in tensors.items() if not name.startswith(MTP)}
    save_file(main, tmp_path / SINGLE)
    with caplog.at_level(logging.WARNING):
        assert mtp_depth_present(tmp_path, CONFIG) == 0
    assert "1 MTP module" in caplog.text
    check(tmp_path, main, CONFIG.replace(num_nextn_predict_layers=0))


def test_no_notice_where_config_announces_none(tmp_path, tensors, caplog):
    main = {name: array for name, array in tensors.items() if not name.startswith(MTP)}
    save_file(main, tmp_path / SINGLE)
    assert mtp_depth_present(tmp_path, CONFIG.replace(num_nextn_predict_layers=0)) == 0
    assert not caplog.records


def test_mtp_tensors_that_config_does_not_announce_are_unused(tmp_path, tensors):
    message = refused(tmp_path, tensors, CONFIG.replace(num_nextn_predict_layers=0))
    assert "no place" in message
    assert MTP in message
