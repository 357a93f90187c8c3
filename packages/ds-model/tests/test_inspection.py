"""Figures of released models, and of directories, without reading a weight."""

import json

import ml_dtypes
import pytest
from reference_cases import CASES
from reference_weights import weights, write_checkpoint
from safetensors.numpy import save_file

from ds_model import CheckpointError, ConfigError
from ds_model.checkpoint.reader import SINGLE
from ds_model.inspection import inspect

RELEASED = next(case for case in CASES if case.name == "released")
MTP = f"model.layers.{RELEASED.config['num_hidden_layers']}."


def test_v3_from_its_preset():
    found = inspect("v3-671b")
    assert (found.family, found.layers, found.mtp_depth) == ("deepseek_v3", 61, 1)
    assert found.parameters.main == 671_026_404_352
    # 576 numbers of two bytes a layer, against 32,768 (arXiv 2405.04434, table 1).
    assert found.cache_bytes_per_token == 61 * 576 * 2
    assert found.mha_cache_bytes_per_token == 61 * 32_768 * 2
    assert round(found.cache_saving, 3) == 0.982


def test_a_directory_is_counted_from_its_headers(tmp_path):
    write_checkpoint(RELEASED, tmp_path)
    found = inspect(tmp_path)
    tensors = weights(RELEASED)
    assert found.problem is None
    assert found.dtypes == {"F32": sum(array.size for array in tensors.values())}
    assert found.weight_bytes == (tmp_path / SINGLE).stat().st_size
    assert found.mtp_depth == 1
    copies = 2 * RELEASED.config["vocab_size"] * RELEASED.config["hidden_size"]
    counts = found.parameters
    assert counts.main + counts.router_bias + counts.mtp == found.dtypes["F32"] - copies


def test_an_absent_mtp_module_is_depth_zero(tmp_path):
    write_checkpoint(RELEASED, tmp_path)
    main = {k: v for k, v in weights(RELEASED).items() if not k.startswith(MTP)}
    save_file(main, tmp_path / SINGLE)
    found = inspect(tmp_path)
    assert (found.mtp_depth, found.parameters.mtp, found.problem) == (0, 0, None)


def test_says_what_keeps_a_directory_from_loading(tmp_path):
    write_checkpoint(RELEASED, tmp_path)
    tensors = weights(RELEASED)
    name = "model.layers.0.mlp.up_proj.weight"
    small = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    save_file(tensors | {name: small}, tmp_path / SINGLE)
    found = inspect(tmp_path)
    assert f"{name} is F8_E4M3, and {name}_scale_inv is missing" in found.problem
    assert found.dtypes["F8_E4M3"] == small.size


def test_bad_targets_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no preset.*tiny"):
        inspect("nonsense")
    with pytest.raises(ConfigError, match=r"config\.json"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED.config))
    with pytest.raises(CheckpointError, match=r"holds neither"):
        inspect(tmp_path)
