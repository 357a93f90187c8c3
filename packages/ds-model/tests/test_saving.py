"""What is saved is the released layout, bit for bit where the dtype is kept."""

import json

import ml_dtypes
import numpy as np
import pytest
from reference_cases import CASES
from reference_weights import released_shapes, weights, write_checkpoint

from ds_model import CausalLM, CheckpointError
from ds_model.checkpoint.reader import TensorFiles
from ds_model.checkpoint.saving import save

CHOSEN = [case for case in CASES if case.committed or case.config["tie_word_embeddings"]]
RELEASED = next(case for case in CASES if case.name == "released")
NONE_SHARED = next(case for case in CASES if case.config["n_shared_experts"] == 0)
BIAS = "e_score_correction_bias"


def stored(directory):
    with TensorFiles(directory) as files:
        return {name: np.array(files.read(name)) for name in files.names}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return CausalLM.from_pretrained(write_checkpoint(RELEASED, tmp_path_factory.mktemp("in")))


@pytest.mark.parametrize("case", [*CHOSEN, NONE_SHARED], ids=lambda case: case.name)
def test_load_and_save_gives_the_same_tensors(tmp_path, case):
    model = CausalLM.from_pretrained(write_checkpoint(case, tmp_path / "in"))
    save(model, tmp_path / "out", max_shard_bytes=40_000)
    expected, found = weights(case), stored(tmp_path / "out")
    assert {name: array.shape for name, array in found.items()} == dict(
        released_shapes(case.config)
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
        assert found[name].dtype == array.dtype


def test_config_reads_back_equal_and_names_the_dtype(tmp_path, model):
    save(model, tmp_path, "bfloat16")
    assert type(model.config).from_pretrained(tmp_path) == model.config
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_values_are_rounded_and_the_router_bias_stays_float32(tmp_path, model, dtype):
    save(model, tmp_path, np.dtype(dtype).name)
    found = stored(tmp_path)
    for name, array in weights(RELEASED).items():
        expected = array if name.endswith(BIAS) else array.astype(dtype)
        assert found[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(found[name], expected, name)


def test_a_value_that_float16_cannot_hold_is_named(tmp_path, model):
    kernel = model.blocks[0].mlp.down_proj.kernel
    before = kernel.numpy()
    kernel.assign(before * 1e6)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj\.weight.*65504"):
        save(model, tmp_path, "float16")
    kernel.assign(before)
    assert list(tmp_path.iterdir()) == []


def test_other_files_stay(tmp_path, model):
    (tmp_path / "tokenizer.json").write_text("{}")
    save(model, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_a_bfloat16_model_is_stored_as_bfloat16(tmp_path, model):
    small = CausalLM(model.config, dtype="bfloat16")
    save(small, tmp_path)
    found = stored(tmp_path)
    assert found["lm_head.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["lm_head.weight"], np.asarray(small.lm_head.kernel.value).T)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
