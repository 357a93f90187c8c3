"""Models of small weights: made from a model, from floating files, and from small files."""

import json

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import CASES
from reference_weights import write_checkpoint
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from ds_model import CausalLM, CheckpointError, ModelConfig
from ds_model.checkpoint.convert import to_hf
from ds_model.checkpoint.layout import layout
from ds_model.checkpoint.loading import value_at, variable_at
from ds_model.checkpoint.packed import PACKED, PARTS, SCALE, SHAPE
from ds_model.checkpoint.reader import SINGLE, TensorFiles
from ds_model.checkpoint.small import bytes_in_memory, small_form
from ds_model.cli import app
from ds_model.inspection import inspect
from ds_precision import MODES, quantize_weights

RELEASED = next(case for case in CASES if case.name == "released")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32,
    "kv_lora_rank": 32, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "num_hidden_layers": 2,
}  # fmt: skip
IDS = np.arange(24).reshape(2, 12)
PACKED_MODES = ("int8", "int8_channel", "int4")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """With MTP and a dense block; every width a multiple of 32."""
    return ModelConfig.from_dict(RELEASED.config | SIZES)


@pytest.fixture(scope="module")
def source(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    CausalLM(config).save_pretrained(directory)
    return directory


def rounded(model: CausalLM, mode: str) -> None:
    """Put the rounded weights where the floating ones were."""
    for entry in layout(model.config):
        if form := small_form(entry, mode):
            variable = variable_at(model, entry)
            variable.assign(quantize_weights(variable, form).dequantize())


def size(model: CausalLM) -> int:
    return sum(
        tf.size(weight).numpy() * tf.as_dtype(weight.dtype).size
        for weight in model.weights
        if "seed" not in weight.path
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_model_is_the_model_of_its_rounded_weights(config, mode):
    model, other = CausalLM(config), CausalLM(config)
    other.set_weights(model.get_weights())
    rounded(other, mode)
    expected = other(IDS).numpy()
    model.quantize(mode)

    np.testing.assert_allclose(model(IDS), expected, rtol=1e-4, atol=1e-5)
    if mode == "int4":  # also through the cache, and with drafts of the MTP module
        said = {"max_new_tokens": 9, "eos_token_id": [], "draft": True}
        np.testing.assert_array_equal(model.generate(IDS, **said), other.generate(IDS, **said))


@pytest.mark.parametrize("mode", [None, *MODES])
def test_the_bytes_that_are_foretold_are_those_that_are_held(config, mode):
    model = CausalLM(config, dtype="bfloat16")
    if mode:
        model.quantize(mode)
    assert bytes_in_memory(config, mode) == size(model)


def test_a_mode_that_is_not_there_is_named(config, source):
    with pytest.raises(ValueError, match="mode is 'int3'; it must be one of int8, int8_channel"):
        CausalLM(config).quantize("int3")
    with pytest.raises(ValueError, match="mode is 'int3'; it must be one of int8, int8_channel"):
        CausalLM.from_pretrained(source, quantize="int3")


def test_a_quantized_model_is_not_saved(config, tmp_path):
    model = CausalLM(config)
    model.quantize("fp8")
    with pytest.raises(ValueError, match="`ds-model quantize` writes files of small ones"):
        model.save_pretrained(tmp_path)


def same_weights(one: CausalLM, two: CausalLM) -> None:
    def found(model):
        named = {weight.path.partition("/")[2]: weight for weight in model.weights}
        return sorted((path, weight) for path, weight in named.items() if "seed" not in path)

    for (name, first), (other, second) in zip(found(one), found(two), strict=True):
        assert name == other
        assert first.dtype == second.dtype
        as_bytes = [np.asarray(tf.convert_to_tensor(w)) for w in (first, second)]
        np.testing.assert_array_equal(*(array.view(np.uint8) for array in as_bytes), first.path)


@pytest.mark.parametrize("mode", MODES)
def test_loading_into_a_mode_is_loading_and_quantizing(source, mode):
    expected = CausalLM.from_pretrained(source, dtype="float32")
    expected.quantize(mode)
    same_weights(CausalLM.from_pretrained(source, quantize=mode, dtype="float32"), expected)


@pytest.mark.parametrize("mode", PACKED_MODES)
def test_small_files_hold_what_quantizing_gives(source, tmp_path, mode):
    """As floats, as they are, and asked for by name: the same numbers; nothing is rounded twice."""
    to_hf(source, tmp_path / "small", mode)
    expected = CausalLM.from_pretrained(source, dtype="bfloat16")
    rounded(wide := CausalLM.from_pretrained(source, dtype="float32"), mode)
    expected.quantize(mode)

    stored = CausalLM.from_pretrained(tmp_path / "small", quantize="stored", dtype="bfloat16")
    by_name = CausalLM.from_pretrained(tmp_path / "small", quantize=mode, dtype="bfloat16")
    same_weights(stored, by_name)
    assert size(stored) == size(expected)
    floats = CausalLM.from_pretrained(tmp_path / "small", dtype="float32")
    for entry in layout(floats.config):
        if small_form(entry, mode):
            np.testing.assert_array_equal(variable_at(floats, entry), variable_at(wide, entry))
    exact = CausalLM.from_pretrained(tmp_path / "small", quantize="stored", dtype="float32")
    # Embedding, norms and routers are bfloat16 in the files, and so in both.
    np.testing.assert_allclose(exact(IDS), floats(IDS), rtol=1e-4, atol=1e-5)


def test_released_fp8_is_taken_as_it_is(config, tmp_path):
    """Where a block is all of gate's or all of up's: as in V3, whose widths 128 divides."""
    wide = {"intermediate_size": 128, "moe_intermediate_size": 128}
    CausalLM(config.replace(**wide)).save_pretrained(tmp_path / "source")
    to_hf(tmp_path / "source", tmp_path / "fp8", "fp8")
    stored = CausalLM.from_pretrained(tmp_path / "fp8", quantize="stored", dtype="float32")
    floats = CausalLM.from_pretrained(tmp_path / "fp8", dtype="float32")
    for entry in layout(stored.config):
        assert (value_at(stored, entry.path) is None) == bool(small_form(entry, "fp8")), entry.path
    np.testing.assert_allclose(stored(IDS), floats(IDS), rtol=1e-4, atol=1e-5)


def test_fp8_blocks_that_reach_from_gate_into_up_are_made_anew(source, tmp_path):
    """Widths of 96 and 32: a block of the two side by side is none of the files'."""
    to_hf(source, tmp_path / "fp8", "fp8")
    stored = CausalLM.from_pretrained(tmp_path / "fp8", quantize="stored", dtype="float32")
    named = CausalLM.from_pretrained(tmp_path / "fp8", quantize="fp8", dtype="float32")
    assert stored.blocks[0].mlp.gate_up_proj.kernel is not None  # as floats
    assert named.blocks[0].mlp.gate_up_proj.kernel is None
    assert stored.blocks[0].mlp.down_proj.kernel is not None  # with it, for one operation does both
    assert stored.blocks[0].self_attn.o_proj.kernel is None
    floats = CausalLM.from_pretrained(tmp_path / "fp8", dtype="float32")
    np.testing.assert_allclose(stored(IDS), floats(IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", PACKED_MODES)
def test_files_of_files(source, tmp_path, mode):
    """From FP8 to whole numbers, and back to floats: the numbers that the small files mean."""
    to_hf(source, tmp_path / "fp8", "fp8")
    to_hf(tmp_path / "fp8", tmp_path / "small", mode)
    to_hf(tmp_path / "small", tmp_path / "wide", "float32")
    with TensorFiles(tmp_path / "small") as small, TensorFiles(tmp_path / "wide") as wide:
        assert not [name for name in small.names if name.endswith(PARTS)]
        for name in small.names:
            np.testing.assert_array_equal(small.read(name)[:], wide.read(name)[:], name)
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text())
    found = inspect(tmp_path / "small")
    assert found.problem is None
    assert found.dtypes[f"INT{4 if mode == 'int4' else 8}"]


def test_inspection_says_what_serving_takes():
    found = inspect("v3-671b")
    billions = {mode: round(size / 1e9) for mode, size in found.serving.items()}
    # 671 + 11.6 billion parameters with the MTP module; 8 and 4.5 bits for most.
    assert billions == {"bfloat16": 1365, "fp8": 686, "int8": 727, "int4": 388}


class StoppedError(Exception):
    """Stands for a kill: nothing here catches it."""


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_stopped_quantization_goes_on_and_ends_in_the_same_bytes(source, tmp_path, share):
    def stop(done, total):
        if done >= share * total:
            raise StoppedError

    to_hf(source, tmp_path / "whole", "int4", 20_000)
    with pytest.raises(StoppedError):
        to_hf(source, tmp_path / "target", "int4", 20_000, stop)
    to_hf(source, tmp_path / "target", "int4", 20_000)
    whole, again = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "target")
    )
    assert again == whole


def test_the_command_says_what_rounding_changed(source, tmp_path):
    words = ["quantize", str(source), str(tmp_path / "out"), "--mode", "int4", "--json"]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    said = json.loads(run.stdout)
    assert said["bytes"] == (tmp_path / "out" / SINGLE).stat().st_size
    with TensorFiles(source) as exact, TensorFiles(tmp_path / "out") as small:
        for name, error in said["relative_errors"].items():
            wanted = np.asarray(exact.read(name), np.float64)
            apart = np.linalg.norm(small.read(name)[:] - wanted) / np.linalg.norm(wanted)
            assert error == pytest.approx(apart, rel=1e-4)
            assert 0.001 < error < (0.01 if name == "lm_head.weight" else 0.12)
    table = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "b")])
    assert table.exit_code == 0
    assert "down_proj" in table.stdout
    assert "written" in table.stdout


def test_a_width_that_does_not_fit_is_one_line(tmp_path):
    write_checkpoint(RELEASED, tmp_path / "source")
    words = ["quantize", str(tmp_path / "source"), str(tmp_path / "out")]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 2
    said = "0.mlp.down_proj.weight: weights have 48 rows; mode 'int8' needs a multiple of 32"
    assert said in run.stderr
    assert not (tmp_path / "out").exists()


NAME = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def small(source, tmp_path):
    to_hf(source, tmp_path / "small", "int4")
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("part", "array", "said"),
    [
        (SHAPE, None, "_shape is missing"),
        (SCALE, np.ones((64, 3), ml_dtypes.bfloat16), "fits neither 4 nor 8 bits"),
        (SCALE, np.ones((64, 2), np.int32), "_scale is I32 [64, 2]; it must be BF16"),
        (SHAPE, np.array([64, 2**40]), "says [64, 1099511627776]"),
        (SHAPE, np.array([64, -64]), "says [64, -64]"),
        (SHAPE, np.array([64, 64, 1]), "_shape is [3]; it must be [2]"),
        (PACKED, np.ones((64, 7), np.int32), "fits neither 4 nor 8 bits"),
    ],
)
def test_parts_that_lie_are_refused(small, part, array, said):
    tensors = load_file(small / SINGLE)
    if array is None:
        del tensors[NAME + part]
    else:
        tensors[NAME + part] = array
    save_file(tensors, small / SINGLE)
    with pytest.raises(CheckpointError) as caught:
        CausalLM.from_pretrained(small)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "marlin-24"}, "format is 'marlin-24'; 'pack-quantized' is what can be read"),
        ({"config_groups": {}}, "config_groups is {}; it must be an object"),
        ({"config_groups": {"g": {}}}, "config_groups.g describes no weights"),
        (
            {"config_groups": {"g": {"weights": {"num_bits": 3}}}},
            "config_groups.g.weights.num_bits is 3; 4 or 8 can be read",
        ),
        (
            {"config_groups": {"g": {"weights": {"num_bits": 4, "symmetric": False}}}},
            "weights.symmetric is False; True can be read",
        ),
    ],
)
def test_other_ways_of_packing_are_refused(small, change, said):
    path = small / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        CausalLM.from_pretrained(small)
    assert said in str(caught.value)


@pytest.mark.parametrize("mode", ["fp8", "int4"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_small_file_is_refused_or_read_within_its_bounds(
    mode, data, source, tmp_path_factory
):
    """Truncation anywhere, and any overwritten byte of the header."""
    made = tmp_path_factory.getbasetemp() / f"whole-{mode}"
    if not made.exists():
        to_hf(source, made, mode)
    whole = (made / SINGLE).read_bytes()
    content = damaged(data, whole)
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "config.json").write_bytes((made / "config.json").read_bytes())
    (directory / SINGLE).write_bytes(content)
    try:
        with TensorFiles(directory) as files:
            for name in files.names:
                files.check_dtype(name)
                assert files.read(name)[:].shape == files.shape(name)
    except CheckpointError as error:
        said = str(error)
        assert SINGLE in said or "tensor " in said
    else:
        assert len(content) == len(whole)


def test_another_groups_size_is_taken_as_it_is(source, tmp_path):
    """128 neighbours under a scale are not what we write, but what others do."""
    to_hf(source, tmp_path / "small", "int8")
    name = "model.layers.0.mlp.down_proj.weight"  # 96 columns
    tensors = load_file(tmp_path / "small" / SINGLE)
    tensors[name + SCALE] = tensors[name + SCALE][:, :1].copy()
    save_file(tensors, tmp_path / "small" / SINGLE)
    stored = CausalLM.from_pretrained(tmp_path / "small", quantize="stored")
    floats = CausalLM.from_pretrained(tmp_path / "small")
    assert tuple(stored.blocks[0].mlp.down_proj.kernel_scales.shape) == (1, 64)
    np.testing.assert_allclose(stored(IDS), floats(IDS), rtol=1e-4, atol=1e-5)
