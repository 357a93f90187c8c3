"""FP8 checkpoints as released: values and block scales in, the same weights out."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import CASES
from reference_weights import weights, write_checkpoint
from typer.testing import CliRunner

from ds_model import CausalLM, CheckpointError, ModelConfig
from ds_model.checkpoint.convert import to_hf
from ds_model.checkpoint.fp8 import SCALES, Fp8Matrix, is_quantized
from ds_model.checkpoint.reader import SINGLE, TensorFiles
from ds_model.cli import app
from ds_model.inspection import inspect

RELEASED = next(case for case in CASES if case.name == "released")
NAMES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}
NAMES |= {
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
}


def safetensors(path, tensors):
    """Write a file by hand, from the format's description: safetensors' numpy knows no E8M0."""
    header, data = {}, b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {
            "dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": [len(data), end]
        }  # fmt: skip
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def weight_dequant(values, scales, block):
    """DeepSeek's `weight_dequant` (inference/kernel.py), block by block, in float32."""
    found = np.zeros(values.shape, np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            found[at] = values[at].astype(np.float32) * np.float32(scales[i, j])
    return found


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    block=st.sampled_from([(128, 128), (1, 128), (64, 32)]),
    first=st.integers(0, 299),
    powers=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows_are_values_times_their_blocks_scales(rows, columns, block, first, powers, seed):
    rng = np.random.default_rng(seed)
    finite = np.array([byte for byte in range(256) if byte & 0x7F != 0x7F], np.uint8)
    values = rng.choice(finite, (rows, columns)).view(ml_dtypes.float8_e4m3fn)
    blocks = (-(-rows // block[0]), -(-columns // block[1]))
    scales = rng.uniform(1e-6, 2, blocks).astype(np.float32)
    if powers:
        scales = np.exp2(rng.integers(-20, 4, blocks)).astype(ml_dtypes.float8_e8m0fnu)
    part = slice(first, first + 70)
    found = Fp8Matrix(values, scales, block)
    np.testing.assert_array_equal(found[part], weight_dequant(values, scales, block)[part])


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(RELEASED, tmp_path / "source")


def test_the_released_layout_and_back(source, tmp_path):
    """There: within E4M3's bound. Back: not a bit is lost."""
    fp8 = tmp_path / "fp8"
    to_hf(source, fp8, "fp8", 60_000)
    said = json.loads((fp8 / "config.json").read_text())
    assert said["quantization_config"]["quant_method"] == "fp8"
    assert said["torch_dtype"] == "bfloat16"
    with TensorFiles(fp8) as files:
        assert files.names == list(dict.fromkeys(files.names))
        for name, array in weights(RELEASED).items():
            number = files.read(name)[:]
            if not is_quantized(name):
                assert files.dtype(name) == ("F32" if "correction_bias" in name else "BF16")
                continue
            assert files.dtype(name) == "F8_E4M3"
            assert files.dtype(name + SCALES) == "F32"
            largest = np.abs(array).max()
            bound = np.maximum(np.abs(array) / 16, largest / 448 * 2.0**-10) * 1.0001
            assert (np.abs(number - array) <= bound).all(), name
    to_hf(fp8, tmp_path / "wide", "float32")
    to_hf(tmp_path / "wide", tmp_path / "again", "fp8")
    with TensorFiles(fp8) as one, TensorFiles(tmp_path / "wide") as wide:
        for name in one.names:
            np.testing.assert_array_equal(one.read(name)[:], wide.read(name)[:], name)
    with TensorFiles(fp8) as one, TensorFiles(tmp_path / "again") as two:
        for name in one.names:
            np.testing.assert_allclose(
                one.read(name)[:], two.read(name)[:], rtol=1e-6, err_msg=name
            )
    assert "quantization_config" not in json.loads((tmp_path / "wide" / "config.json").read_text())


def test_what_is_quantized_is_what_the_release_quantizes():
    yes = ("self_attn.kv_a_proj_with_mqa", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.experts.255.down_proj", "mlp.shared_experts.up_proj")  # fmt: skip
    no = ("mlp.gate", "eh_proj", "input_layernorm", "self_attn.kv_a_layernorm", "shared_head.head")
    assert all(is_quantized(f"model.layers.61.{name}.weight") for name in yes)
    assert not any(is_quantized(f"model.layers.61.{name}.weight") for name in no)
    assert not is_quantized("model.embed_tokens.weight")
    assert not is_quantized("lm_head.weight")


@pytest.mark.parametrize("scales", ["float32", "powers of two as E8M0"])
def test_a_model_loads_them(source, tmp_path, scales):
    """A file written by hand; the model equals the one of the products, MTP module included."""
    rng = np.random.default_rng(0)
    stored, plain = {}, {}
    for name, array in weights(RELEASED).items():
        if not is_quantized(name):
            stored[name] = plain[name] = array
            continue
        blocks = tuple(-(-size // 128) for size in array.shape)
        scale = rng.uniform(1e-4, 1e-3, blocks).astype(np.float32)
        if scales != "float32":
            scale = np.full(blocks, 2.0**-11).astype(ml_dtypes.float8_e8m0fnu)
        stored[name] = rng.normal(0, 100, array.shape).astype(ml_dtypes.float8_e4m3fn)
        stored[name + SCALES] = scale
        plain[name] = weight_dequant(stored[name], scale, (128, 128))
    other = tmp_path / "plain"
    shutil.copytree(source, other)
    safetensors(source / SINGLE, stored)
    safetensors(other / SINGLE, plain)
    found = inspect(source)
    assert found.problem is None
    assert found.dtypes["F8_E4M3"] == sum(v.size for k, v in stored.items() if k + SCALES in stored)
    ours, theirs = (CausalLM.from_pretrained(place) for place in (source, other))
    assert len(ours.mtp) == 1
    for mine, wanted in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), wanted.numpy(), mine.path)
    to_hf(source, tmp_path / "kept")  # nothing is asked for: not a byte changes
    with TensorFiles(source) as one, TensorFiles(tmp_path / "kept") as two:
        assert set(one.stored_names) == set(two.stored_names)
        for name in one.stored_names:
            assert one.stored(name).tobytes() == two.stored(name).tobytes()


def broken(source, **changes):
    tensors = dict(weights(RELEASED))
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    tensors |= {name + SCALES: np.ones((1, 1), np.float32)}
    tensors |= changes.get("tensors", {})
    safetensors(source / SINGLE, {k: v for k, v in tensors.items() if v is not None})
    config = json.loads((source / "config.json").read_text()) | changes.get("config", {})
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        CausalLM.from_pretrained(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_with_scales_is_named(source):
    scales = "model.layers.0.self_attn.o_proj.weight" + SCALES
    assert f"{scales} is missing" in broken(source, tensors={scales: None})
    assert "need [1, 1]" in broken(source, tensors={scales: np.ones((2, 1), np.float32)})
    byte = np.ones((1, 1), ml_dtypes.float8_e4m3fn)
    assert "has dtype F8_E4M3" in broken(source, tensors={scales: byte})
    orphan = {"model.norm.weight" + SCALES: np.ones((1,), np.float32)}
    assert "model.norm.weight" + SCALES in broken(source, tensors=orphan)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is [128]"),
        ("fp8", "quantization_config is 'fp8'"),
    ],
)
def test_another_quantization_is_refused_by_its_field(source, said, named):
    assert named in broken(source, config={"quantization_config": said})


def test_the_command_line(source, tmp_path):
    run = CliRunner().invoke
    result = run(app, ["convert", str(source), str(tmp_path / "fp8"), "--dtype", "fp8"])
    assert result.exit_code == 0, result.output
    assert ModelConfig.from_pretrained(tmp_path / "fp8") == ModelConfig.from_pretrained(source)
    words = ["convert", str(source), str(tmp_path / "x.keras"), "--to", "keras", "--dtype", "fp8"]
    result = run(app, words)
    assert result.exit_code == 2
    assert "--dtype fp8 is the released layout's" in result.output
