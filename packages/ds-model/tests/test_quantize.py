import numpy as np
import pytest
import tensorflow as tf

from ds_model import CausalLM, ModelConfig
from ds_moe import MixtureOfExperts
from ds_precision import Linear, quantize_int8

SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.preset("tiny").replace(**SIZES, kv_lora_rank=32, q_lora_rank=32)


def rounded(model: CausalLM) -> None:
    """Put the rounded weights where the floating ones were."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, Linear) and layer.name != "kv_b_proj":
            layer.kernel.assign(quantize_int8(layer.kernel).dequantize())
        if isinstance(layer, MixtureOfExperts):
            for weight in (layer.gate_up_proj, layer.down_proj):
                weight.assign(quantize_int8(weight).dequantize())


def test_a_quantized_model_is_the_model_of_its_rounded_weights(config):
    model, ids = CausalLM(config), np.arange(24).reshape(2, 12)
    rounded(model)
    expected = model(ids).numpy()
    text = model.generate(ids, max_new_tokens=9, eos_token_id=[], draft=bool(model.mtp)).numpy()
    bytes_before = sum(tf.size(w).numpy() * tf.as_dtype(w.dtype).size for w in model.weights)
    model.quantize("int8")

    np.testing.assert_allclose(model(ids), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        model.generate(ids, max_new_tokens=9, eos_token_id=[], draft=bool(model.mtp)), text
    )
    bytes_after = sum(tf.size(w).numpy() * tf.as_dtype(w.dtype).size for w in model.weights)
    assert bytes_after < 0.5 * bytes_before


def test_a_mode_that_is_not_there_is_named(config):
    with pytest.raises(ValueError, match="mode is 'int4'; it must be 'int8'"):
        CausalLM(config).quantize("int4")


def test_a_quantized_model_is_not_saved(config, tmp_path):
    model = CausalLM(config)
    model.quantize("int8")
    with pytest.raises(ValueError, match="8-bit"):
        model.save_pretrained(tmp_path)
