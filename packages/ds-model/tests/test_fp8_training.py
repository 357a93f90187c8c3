"""A model under an FP8 policy: what is rounded, what is not, and that it is still the model."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ds_model import CausalLM, ModelConfig
from ds_precision import Fp8Policy, watch_fp8


@pytest.fixture(scope="module")
def pair():
    """Return a model in float32 and one of the same weights in FP8."""
    keras.utils.set_random_seed(2)  # a fixture of the module comes before each test's own seed
    config = ModelConfig.preset("tiny").replace(num_nextn_predict_layers=1)
    exact = CausalLM(config, dtype="float32")
    rounded = CausalLM(config, dtype=Fp8Policy("float32", {"tile": 32}))
    for one, other in zip(rounded.weights, exact.weights, strict=True):
        one.assign(other)
    return exact, rounded


def gradients(model, ids):
    with tf.GradientTape() as tape:
        output = model.forward(ids[:, :-1], training=True, mtp=True)
        loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(ids[:, 1:], output.logits)
        )
        loss += tf.reduce_mean(tf.square(output.mtp_logits[0]))
    found = tape.gradient(loss, model.trainable_variables)
    return loss, [tf.convert_to_tensor(g).numpy() for g in found]


def test_gradients_point_where_float32s_do(pair):
    ids = tf.constant(np.random.default_rng(0).integers(0, 256, (2, 33)), tf.int32)
    (exact_loss, exact), (loss, rounded) = (gradients(model, ids) for model in pair)
    assert float(loss) == pytest.approx(float(exact_loss), rel=2e-3)
    for variable, one, other in zip(pair[0].trainable_variables, rounded, exact, strict=True):
        cosine = (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum())
        # Where a route flips, experts, routers and the norm before them learn of other tokens.
        routed = "mlp" in variable.path or "post_attention" in variable.path
        assert cosine > (0.9 if routed else 0.97), variable.path


def test_head_embedding_router_and_norms_stay_as_they_are(pair):
    seen = set()
    with watch_fp8(lambda name, *_: seen.add(name)):
        pair[1].forward(tf.zeros([1, 8], tf.int32), mtp=True)
    layers = {name.split("/", 1)[1].rsplit("/", 1)[0] for name in seen}
    expected = {"block_0/mlp/gate_up_proj", "block_0/mlp/down_proj"}
    for block in ("block_0", "block_1", "mtp_0/block"):
        projections = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        expected |= {f"{block}/self_attn/{name}" for name in projections}
    for mlp in ("block_1/mlp", "mtp_0/block/mlp"):
        shared = ("shared_experts/gate_up_proj", "shared_experts/down_proj")
        expected |= {f"{mlp}/{name}" for name in ("up", "down", *shared)}
    assert layers == expected


def test_it_writes_and_is_saved_and_comes_back(pair, tmp_path):
    model, ids = pair[1], np.arange(12)[None]
    text = model.generate(ids, max_new_tokens=5, eos_token_id=[]).numpy()
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.dtype_policy == model.dtype_policy
    assert again.blocks[1].mlp.shared_experts.down_proj.dtype_policy == model.dtype_policy
    np.testing.assert_array_equal(again(ids), model(ids))
    np.testing.assert_array_equal(again.generate(ids, max_new_tokens=5, eos_token_id=[]), text)
    model.save_pretrained(tmp_path / "hf")
    read = CausalLM.from_pretrained(tmp_path / "hf", dtype=model.dtype_policy)
    np.testing.assert_array_equal(read(ids), model(ids))


def test_blocks_that_run_again_give_the_same_gradients(pair):
    model = pair[1]
    ids = tf.constant(np.random.default_rng(1).integers(0, 256, (2, 17)), tf.int32)

    def found(recompute):
        with tf.GradientTape() as tape:
            output = model.forward(ids, training=True, mtp=True, recompute=recompute)
            loss = tf.reduce_sum(output.logits**2) + tf.reduce_sum(output.mtp_logits[0] ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        return [tf.convert_to_tensor(g) for g in gradients]

    for one, other in zip(found("block"), found("none"), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max() + 1e-9)
