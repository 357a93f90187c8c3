"""Every tensor arrives in its variable, whatever its dtype and shard."""

import json
import tracemalloc
from collections import Counter

import keras
import ml_dtypes
import numpy as np
import pytest
from reference_cases import CASES
from reference_weights import weights, write_checkpoint
from safetensors.numpy import save_file

from ds_model import CausalLM, CheckpointError
from ds_model.checkpoint.layout import layout
from ds_model.checkpoint.loading import load_into, variable_at
from ds_model.checkpoint.mapped_file import MappedFile
from ds_model.checkpoint.reader import INDEX, SINGLE
from ds_model.config import ModelConfig

RELEASED = next(case for case in CASES if case.name == "released")
TIED = next(case for case in CASES if case.config["tie_word_embeddings"])
MTP = f"model.layers.{RELEASED.config['num_hidden_layers']}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(RELEASED, tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def model(directory):
    return CausalLM.from_pretrained(directory)


def change(directory, **arrays):
    """The released case with some tensors replaced; `None` leaves one out."""
    tensors = weights(RELEASED) | arrays
    kept = {name: array for name, array in tensors.items() if array is not None}
    (directory / "config.json").write_text(json.dumps(RELEASED.config))
    save_file(kept, directory / SINGLE)
    return directory


def test_the_layout_names_every_variable_once(model):
    found = [variable_at(model, entry) for entry in layout(model.config)]
    assert {id(variable) for variable in found} == {id(variable) for variable in model.variables}
    assert len(found) == len(model.variables)


def test_kernels_compute_the_released_products(model):
    tensors = weights(RELEASED)
    x = np.linspace(-1, 1, model.config.hidden_size, dtype=np.float32)
    attention = "model.layers.1.self_attn.q_a_proj.weight"
    np.testing.assert_allclose(
        x @ model.blocks[1].self_attn.q_a_proj.kernel.numpy(), tensors[attention] @ x, rtol=1e-4
    )
    both = np.concatenate(
        [tensors[f"{MTP}.mlp.experts.5.{name}_proj.weight"] @ x for name in ("gate", "up")]
    )
    expert = model.mtp[0].block.mlp.gate_up_proj.numpy()[5]
    np.testing.assert_allclose(x @ expert, both, rtol=1e-3, atol=1e-5)
    router = model.blocks[2].mlp.gate
    np.testing.assert_array_equal(
        router.weight.numpy().T, tensors["model.layers.2.mlp.gate.weight"]
    )
    np.testing.assert_array_equal(
        router.e_score_correction_bias.numpy(),
        tensors["model.layers.2.mlp.gate.e_score_correction_bias"],
    )
    np.testing.assert_array_equal(
        model.mtp[0].norm.weight.numpy(), tensors[f"{MTP}.shared_head.norm.weight"]
    )


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_small_dtypes_load_as_their_float32_values(tmp_path, model, dtype):
    small = {name: array.astype(dtype) for name, array in weights(RELEASED).items()}
    loaded = CausalLM.from_pretrained(change(tmp_path, **small))
    for entry in layout(model.config):
        expected = variable_at(model, entry).numpy().astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(variable_at(loaded, entry).numpy(), expected, entry.path)


def test_a_bfloat16_model_rounds_float32_files(directory, model):
    loaded = CausalLM.from_pretrained(directory, dtype="bfloat16")
    kernel = loaded.blocks[0].self_attn.o_proj.kernel
    assert kernel.dtype == "bfloat16"
    expected = model.blocks[0].self_attn.o_proj.kernel.numpy().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(kernel.value), expected)


def test_shards_that_cut_experts_apart_load_the_same(tmp_path, model):
    tensors = weights(RELEASED)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED.config))
    weight_map = {}
    for shard in range(3):
        part = {name: tensors[name] for name in list(tensors)[shard::3]}
        save_file(part, tmp_path / f"part{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"part{shard}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    loaded = CausalLM.from_pretrained(tmp_path)
    for ours, theirs in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize("name", [f"{MTP}.embed_tokens.weight", f"{MTP}.shared_head.head.weight"])
def test_a_copy_that_differs_is_named(tmp_path, name):
    other = weights(RELEASED)[name] + np.float32(1e-3)
    with pytest.raises(CheckpointError, match=f"tensor {name} differs from"):
        CausalLM.from_pretrained(change(tmp_path, **{name: other}))


def test_a_partial_mtp_module_is_an_error(tmp_path):
    name = f"{MTP}.eh_proj.weight"
    with pytest.raises(CheckpointError, match=f"missing.*{name}"):
        CausalLM.from_pretrained(change(tmp_path, **{name: None}))


def test_an_absent_mtp_module_loads_without_it(tmp_path, model):
    gone = {name: None for name in weights(RELEASED) if name.startswith(f"{MTP}.")}
    loaded = CausalLM.from_pretrained(change(tmp_path, **gone))
    assert loaded.config.num_nextn_predict_layers == 0
    assert loaded.mtp == []
    np.testing.assert_array_equal(loaded.lm_head.kernel.numpy(), model.lm_head.kernel.numpy())


def test_a_tied_head_must_equal_the_embedding(tmp_path):
    write_checkpoint(TIED, tmp_path)
    tensors = weights(TIED)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / SINGLE)
    assert CausalLM.from_pretrained(tmp_path).lm_head is None
    head[3, 2] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs"):
        CausalLM.from_pretrained(tmp_path)


def test_each_tensor_is_read_once(directory, monkeypatch):
    reads = Counter()
    read = MappedFile.read

    def counted(file, name):
        reads[name] += 1
        return read(file, name)

    monkeypatch.setattr(MappedFile, "read", counted)
    CausalLM.from_pretrained(directory)
    assert reads == dict.fromkeys(weights(RELEASED), 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_and_saving_hold_no_second_model(tmp_path, dtype):
    config = ModelConfig.preset("tiny").replace(vocab_size=40_000)
    CausalLM(config).save_pretrained(tmp_path / "one")
    tracemalloc.start()
    model = CausalLM.from_pretrained(tmp_path / "one", dtype=dtype)
    _, peak = tracemalloc.get_traced_memory()
    nbytes = sum(np.asarray(variable.value).nbytes for variable in model.variables)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    model.save_pretrained(tmp_path / "two")
    _, after = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert nbytes > 10_000_000
    assert nbytes < peak < 1.2 * nbytes + 4_000_000  # numpy's arrays, and Keras' objects
    assert after - before < 2_000_000


class Adapted(CausalLM):
    """A model with a weight that no released file has."""

    def build(self, input_shape):
        super().build(input_shape)
        self.adapter = self.add_weight(
            name="adapter", shape=(3,), initializer=keras.initializers.Constant(5)
        )


def test_a_weight_that_no_file_has_is_drawn_as_always(directory, model):
    adapted = Adapted.from_pretrained(directory)
    np.testing.assert_array_equal(adapted.adapter.numpy(), [5, 5, 5])
    for entry in layout(model.config):
        expected = variable_at(model, entry).numpy()
        np.testing.assert_array_equal(variable_at(adapted, entry).numpy(), expected)


def test_a_loaded_model_trains_as_one_whose_variables_were_assigned(directory, model):
    """The variables lie in memory that numpy allocated; updates must not mind."""
    loaded = CausalLM.from_pretrained(directory)
    assigned = CausalLM(model.config)
    for ours, theirs in zip(assigned.variables, model.variables, strict=True):
        ours.assign(theirs.numpy())
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 9))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for trained in (loaded, assigned):
        trained.compile(keras.optimizers.SGD(0.1), loss)
        trained.fit(ids[:, :-1], ids[:, 1:], epochs=2, batch_size=2, verbose=0)
    for ours, theirs in zip(loaded.variables, assigned.variables, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-7)
    kernel = loaded.lm_head.kernel.numpy()
    assert np.abs(kernel - model.lm_head.kernel.numpy()).max() > 1e-4  # and it did train


def test_a_load_that_fails_leaves_no_trace(tmp_path, model):
    """The next model is drawn as always."""
    name = f"{MTP}.embed_tokens.weight"
    change(tmp_path, **{name: weights(RELEASED)[name] + np.float32(1e-3)})
    with pytest.raises(CheckpointError, match="differs"):
        CausalLM.from_pretrained(tmp_path)
    drawn = CausalLM(model.config)
    np.testing.assert_array_equal(drawn.norm.weight.numpy(), np.ones(model.config.hidden_size))
    spread = drawn.lm_head.kernel.numpy().std() / model.config.initializer_range
    np.testing.assert_allclose(spread, 1, atol=0.1)


def test_a_refused_checkpoint_changes_no_variable(tmp_path):
    fresh = CausalLM(ModelConfig.from_dict(RELEASED.config))
    before = [variable.numpy() for variable in fresh.variables]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_into(fresh, change(tmp_path, **{"model.norm.weight": None}))
    for variable, value in zip(fresh.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_a_model_that_is_not_as_its_config_says_is_named(directory, model):
    deeper = CausalLM(model.config.replace(num_nextn_predict_layers=0))
    deeper.config = model.config
    with pytest.raises(CheckpointError, match=r"variable mtp\.0\..* is missing"):
        load_into(deeper, directory)
