"""Parts of a model: together they are the whole, in weights, outputs and gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ds_model import CausalLM, ModelConfig, ModelPart

CONFIG = ModelConfig.preset("tiny").replace(num_hidden_layers=4, initializer_range=0.1)
FIRST = ModelPart((0, 1), end=False)
LAST = ModelPart((2, 3))


def made(part=None, config=CONFIG):
    keras.utils.set_random_seed(3)
    return CausalLM(config, part=part)


def by_name(model):
    return {weight.path.split("/", 1)[1]: weight.numpy() for weight in model.weights}


@pytest.mark.parametrize("tied", [False, True])
def test_parts_hold_the_weights_of_the_whole(tied):
    config = CONFIG.replace(tie_word_embeddings=tied)
    whole = by_name(made(config=config))
    seen = set()
    for part in (FIRST, ModelPart((2,), embedding=False, end=False), ModelPart((3,))):
        found = by_name(made(part, config))
        for name, values in found.items():
            np.testing.assert_array_equal(values, whole[name], err_msg=name)
        seen |= found.keys()
    assert seen == whole.keys()
    assert not any(name.startswith("block_3") for name in by_name(made(FIRST)))


def test_parts_one_after_the_other_are_the_whole():
    ids = tf.constant(np.random.default_rng(0).integers(0, 256, (2, 9)))
    whole = made()
    want = whole.forward(ids, mtp=True)
    first, last = made(FIRST), made(LAST)
    h, routings = first.run_blocks(first.embed_tokens(ids), numbers=(0, 1))
    h, more = last.run_blocks(h, numbers=(2, 3))
    found = last.finish(h, ids, mtp=True)
    np.testing.assert_allclose(found.logits, want.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.mtp_logits[0], want.mtp_logits[0], rtol=1e-5, atol=1e-5)
    loads = [routing.load for routing in (*routings, *more, *found.routings)]
    np.testing.assert_array_equal(tf.stack(loads), tf.stack([r.load for r in want.routings]))


def test_blocks_out_of_order():
    with pytest.raises(ValueError, match=r"blocks are \(2, 1\); they must be different"):
        ModelPart((2, 1))
