import keras
import numpy as np
import pytest
import tensorflow as tf

from ds_model import CausalLM, ModelConfig, parameter_counts

TINY = ModelConfig.preset("tiny").replace(num_nextn_predict_layers=2, initializer_range=0.1)


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length))


def within(ours, reference) -> float:
    ours, reference = np.asarray(ours), np.asarray(reference)
    return np.abs(ours - reference).max() / np.abs(reference).max()


@pytest.fixture(scope="module")
def model() -> CausalLM:
    keras.utils.set_random_seed(0)
    return CausalLM(TINY)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(model, side):
    ids = tokens(2, 8)
    padded = np.full((2, 12), 9)
    mask = np.zeros((2, 12), int)
    place = slice(4, 12) if side == "left" else slice(0, 8)
    padded[:, place], mask[:, place] = ids, 1

    assert within(model(padded, mask)[:, place], model(ids)) < 1e-5
    counted, plain = model.forward(padded, mask), model.forward(ids)
    for a, b in zip(counted.routings, plain.routings, strict=True):
        np.testing.assert_array_equal(a.load, b.load)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_mtp(model, side):
    ids = tokens(2, 8)
    padded = np.full((2, 12), 9)
    mask = np.zeros((2, 12), int)
    place = slice(4, 12) if side == "left" else slice(0, 8)
    padded[:, place], mask[:, place] = ids, 1

    for k, (ours, plain) in enumerate(
        zip(model.mtp_logits(padded, mask), model.mtp_logits(ids), strict=True), start=1
    ):
        start = 4 if side == "left" else 0
        assert within(ours[:, start : start + 8 - k], plain) < 1e-5


def test_depth_k_sees_k_tokens_further_and_no_more(model):
    ids = tokens(1, 10)
    for k, logits in enumerate(model.mtp_logits(ids), start=1):
        assert logits.shape == (1, 10 - k, 256)
        other = ids.copy()
        other[0, 7] = (other[0, 7] + 1) % 256
        moved = np.abs(model.mtp_logits(other)[k - 1] - logits).max((0, 2)) > 1e-6
        # Position i rests on tokens up to i + k: the first to notice token 7 is 7 - k.
        np.testing.assert_array_equal(moved, np.arange(10 - k) >= 7 - k)


def test_routings_come_in_the_order_of_the_layers(model):
    ids = tokens(2, 6)
    found = model.forward(ids, mtp=True).routings

    assert [r.indices.shape[0] for r in found] == [12, 10, 8]
    assert len(found) == len(model.moe_layers) == 3
    assert model.moe_layers[0] is model.blocks[1].mlp
    assert model.moe_layers[1] is model.mtp[0].block.mlp
    assert len(model.forward(ids).routings) == 1


def test_the_tied_head_is_the_embedding():
    model = CausalLM(TINY.replace(tie_word_embeddings=True))
    assert model.lm_head is None
    h = tf.random.stateless_normal([1, 2, 64], seed=[1, 2])

    expected = np.asarray(h) @ model.embed_tokens.embeddings.numpy().T
    np.testing.assert_allclose(model.head(h), expected, rtol=1e-4, atol=1e-6)


def test_xla_computes_the_same_logits(model):
    ids = tf.constant(tokens(2, 7))

    assert within(tf.function(model, jit_compile=True)(ids), model(ids)) < 1e-5


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_low_precision_stays_near_and_gives_float32_logits(model, policy):
    low = CausalLM(TINY, dtype=policy)
    low.set_weights(model.get_weights())
    ids = tokens(2, 9)
    logits = low(ids)

    assert logits.dtype == tf.float32
    assert {w.dtype for w in low.trainable_weights} == {"float32"}
    # A near-tie may route a token elsewhere, so most, not all, logits are near.
    error = np.abs(logits - model(ids)).max(-1) / np.abs(model(ids)).max()
    assert np.median(error) < 0.03


def test_keras_file_holds_all(model, tmp_path):
    model.moe_layers[0].gate.e_score_correction_bias.assign(np.linspace(-1, 1, 8))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")

    ids = tokens(1, 5)
    np.testing.assert_array_equal(again(ids), model(ids))
    assert again.config == model.config


@pytest.mark.parametrize(
    ("preset", "main", "router_bias"),
    [
        # The paper says 671B; the exact number is transformers' on torch's meta device.
        ("v3-671b", 671_026_404_352, 14_848),
        # The model card says 15.7B; again transformers' exact number.
        ("v2-lite", 15_706_484_224, 0),
        # Again transformers' number.
        ("bench", 107_473_920, 224),
    ],
)
def test_abstract_build_counts_the_released_parameters(preset, main, router_bias):
    config = ModelConfig.preset(preset)
    with tf.Graph().as_default():  # variables get shapes and no memory
        model = CausalLM(config)

    def count(weights) -> int:
        return sum(int(np.prod(w.shape)) for w in weights)

    mtp = sum(count(module.trainable_weights) for module in model.mtp)
    assert count(model.trainable_weights) - mtp == main
    main_bias = [w for w in model.non_trainable_weights if "mtp" not in w.path]
    assert count(main_bias) == router_bias
    counts = parameter_counts(config)
    assert (counts.main, counts.router_bias) == (main, router_bias)


def test_a_summary_names_the_parts(model):
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line))

    text = "\n".join(lines)
    for part in ("embed_tokens", "block_0", "block_1", "lm_head", "mtp_1"):
        assert part in text


@pytest.mark.parametrize("kept", [1, 3, 20])
def test_the_head_may_see_the_last_positions_alone(model, kept):
    ids = tokens(2, 10)
    mask = np.ones((2, 10), int)
    mask[0, :4] = 0
    whole, short = (model.forward(ids, mask, mtp=True, logits_to_keep=count) for count in (0, kept))
    assert within(short.logits, whole.logits[:, -kept:]) < 1e-6
    assert within(model(ids, mask, logits_to_keep=kept), short.logits) < 1e-6
    for ours, all_of_them in zip(short.mtp_logits, whole.mtp_logits, strict=True):
        assert within(ours, all_of_them[:, -kept:]) < 1e-6


def test_fewer_logits_than_none_are_refused(model):
    with pytest.raises(ValueError, match="logits_to_keep is -1; it must be 0"):
        model(tokens(1, 4), logits_to_keep=-1)
