"""Small weights beside those who made the forms: compressed-tensors, GGUF, transformers' FP8."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import compressed_tensors
import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from reference_cases import BY_NAME
from safetensors.torch import load_file

from ds_model import CausalLM, ModelConfig
from ds_model.checkpoint.convert import to_hf
from ds_model.checkpoint.fp8 import is_quantized
from ds_model.checkpoint.packed import PACKED, PARTS
from ds_model.checkpoint.reader import SINGLE, TensorFiles
from ds_precision import quantize_weights

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32,
    "kv_lora_rank": 32, "v_head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("source")
    CausalLM(ModelConfig.from_dict(BY_NAME["plain"].config | SIZES)).save_pretrained(folder)
    return folder


def scheme_of(said: dict[str, object], name: str) -> QuantizationScheme:
    """The scheme of a matrix, as the library reads `config.json`."""
    config = compressed_tensors.QuantizationConfig.model_validate(said)
    group = "group_1" if "lm_head" in name and "group_1" in config.config_groups else "group_0"
    scheme = config.config_groups[group]
    assert isinstance(scheme, QuantizationScheme)
    return scheme


@pytest.mark.parametrize("mode", ["int8", "int8_channel", "int4"])
def test_compressed_tensors_unpacks_the_same_numbers(
    mode: str, source: Path, tmp_path: Path
) -> None:
    """Its products are bfloat16, as its scales are: ours, rounded once."""
    to_hf(source, tmp_path / "small", mode)  # type: ignore[arg-type]
    said = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    packer = BaseCompressor.get_value_from_registry(said["format"])
    tensors = load_file(tmp_path / "small" / SINGLE)
    with TensorFiles(tmp_path / "small") as files:
        names = [name for name in files.names if name + PACKED in tensors]
        assert len(names) > 20
        for name in names:
            state = {f"weight{part}": tensors[name + part] for part in PARTS}
            theirs = packer.decompress(state, scheme_of(said, name))["weight"]
            mine = files.read(name)[:].astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(mine, theirs.float().numpy(), name)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_compressed_tensors_packs_the_same_bytes(mode: str, source: Path, tmp_path: Path) -> None:
    """Given our scales it rounds to the same numbers and lays them out the same way."""
    to_hf(source, tmp_path / "small", mode)  # type: ignore[arg-type]
    said = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    packer = BaseCompressor.get_value_from_registry(said["format"])
    tensors, exact = load_file(tmp_path / "small" / SINGLE), load_file(source / SINGLE)
    for name in [name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)]:
        scale = tensors[name + "_scale"].float()
        state = {"weight": exact[name].float(), "weight_scale": scale}
        theirs = packer.compress(state, scheme_of(said, name))["weight_packed"]
        mine = tensors[name + PACKED]
        # It multiplies by the scale's inverse where we divide: a tie may go the other way.
        assert (theirs != mine).float().mean() < 1e-3, name


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("int8", gguf.GGMLQuantizationType.Q8_0), ("int4", gguf.GGMLQuantizationType.Q4_0)],
)
def test_errors_are_at_most_those_of_ggufs_types(
    mode: str, kind: gguf.GGMLQuantizationType
) -> None:
    """Bell-shaped weights and long-tailed ones; its scales are float16, ours bfloat16."""
    rng = np.random.default_rng(0)
    for w in (rng.normal(size=(64, 512)), rng.standard_t(3, size=(64, 512))):
        rows = w.astype(np.float32)
        theirs = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
        mine = quantize_weights(rows.T, mode).dequantize().numpy().T
        ratio = np.linalg.norm(mine - rows) / np.linalg.norm(theirs - rows)
        # The largest of 32 falls on a step of Q8_0, whose scale is finer, and beside one of ours.
        assert ratio < (1.02 if mode == "int8" else 0.98)


def test_transformers_opens_the_fp8_we_write(tmp_path: Path) -> None:
    """Its own FP8 layers, dequantized on loading: the logits of the same numbers in bfloat16."""
    config = BY_NAME["plain"].config | SIZES | {"hidden_size": 128, "intermediate_size": 128}
    CausalLM(ModelConfig.from_dict(config)).save_pretrained(tmp_path / "source")
    to_hf(tmp_path / "source", tmp_path / "fp8", "fp8")
    kind = transformers.DeepseekV3ForCausalLM
    said = transformers.FineGrainedFP8Config(dequantize=True)
    theirs, loading = kind.from_pretrained(
        tmp_path / "fp8", quantization_config=said, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with TensorFiles(tmp_path / "fp8") as files:
        state = dict(theirs.named_parameters())
        for name in files.names:
            if is_quantized(name) and name in state:
                mine = np.asarray(files.read(name)[:])
                np.testing.assert_allclose(
                    state[name].detach().float().numpy(), mine, rtol=2**-8, err_msg=name
                )
    ids = np.arange(24).reshape(2, 12) % config["vocab_size"]
    model = CausalLM.from_pretrained(tmp_path / "fp8", dtype="float32")
    with torch.no_grad():
        logits = theirs.float().eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model(ids), logits, atol=2e-2 * np.abs(logits).max())
