"""What only a GPU can show; skipped where there is none."""

import numpy as np
import pytest
import tensorflow as tf

from ds_model import CausalLM, ModelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="TensorFlow sees no GPU"),
]


def test_logits_and_text_are_the_cpus():
    config = ModelConfig.preset("tiny").replace(initializer_range=0.2, eos_token_id=None)
    ids = np.random.default_rng(0).integers(0, 256, (2, 32))
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with tf.device("/cpu:0"):
        model = CausalLM(config)
        expected, text = model(ids).numpy(), model.generate(ids, max_new_tokens=16).numpy()
    with tf.device("/gpu:0"):
        again = CausalLM(config)
        again.set_weights(model.get_weights())
        ours = again(ids).numpy()
        written = again.generate(ids, max_new_tokens=16, draft=True).numpy()

    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(written, text)
