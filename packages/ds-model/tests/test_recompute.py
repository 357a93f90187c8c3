"""Recomputing changes what is held, not what comes out."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ds_model import CausalLM, ModelConfig

TINY = ModelConfig.preset("tiny").replace(num_nextn_predict_layers=1, initializer_range=0.1)
IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 12))
MASK = np.ones((2, 12), int)
MASK[0, :3] = MASK[1, 10:] = 0  # padding left and right


def loss_and_gradients(model, recompute):
    """Return a loss that every output takes part in, gradients, and all outputs."""
    with tf.GradientTape() as tape:
        output = model.forward(IDS, MASK, mtp=True, recompute=recompute)
        losses = [tf.reduce_mean(tf.square(output.logits))]
        losses += [tf.reduce_mean(tf.square(logits)) for logits in output.mtp_logits]
        losses += [tf.reduce_mean(r.scores) + tf.reduce_mean(r.gates) for r in output.routings]
        loss = tf.add_n(losses)
    variables = [variable.value for variable in model.trainable_variables]
    return loss, [tf.convert_to_tensor(g) for g in tape.gradient(loss, variables)], output


@pytest.fixture(scope="module", params=["float32", "mixed_bfloat16"])
def model(request):
    keras.utils.set_random_seed(0)
    found = CausalLM(TINY, dtype=request.param)
    for layer in found.moe_layers:  # a bias of zero would not be missed
        bias = layer.gate.e_score_correction_bias
        bias.assign(np.linspace(-0.1, 0.1, bias.shape[0]))
    return found


@pytest.mark.parametrize("policy", ["parts", "block"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_nothing_changes_but_what_is_held(model, graph, policy):
    def run(recompute):
        return loss_and_gradients(model, recompute)

    run = tf.function(run, autograph=False) if graph else run
    ours, plain = run(policy), run("none")
    for a, b in zip(tf.nest.flatten(ours), tf.nest.flatten(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    gradients = plain[1]
    assert all(np.abs(g).max() > 0 for g in gradients)


def test_a_loop_in_the_graph_may_recompute(model):
    @tf.function(autograph=False)
    def looped():
        def body(index, _):
            return index + 1, loss_and_gradients(model, "block")[1]

        start = [tf.zeros(variable.shape) for variable in model.trainable_variables]
        return tf.while_loop(lambda index, _: index < 1, body, (tf.constant(0), start))[1]

    for a, b in zip(looped(), loss_and_gradients(model, "none")[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


def test_blocks_run_again_only_when_their_gradient_is_asked_for(model, monkeypatch):
    runs = []
    for block in model.blocks:
        called = type(block).call

        def counted(*arguments, called=called):
            runs.append(1)
            return called(*arguments)

        monkeypatch.setattr(block, "call", counted.__get__(block))
    model.forward(IDS, MASK, recompute="block")
    assert len(runs) == len(model.blocks)
    loss_and_gradients(model, "block")
    assert len(runs) == 3 * len(model.blocks)


def test_an_unknown_policy_is_refused(model):
    with pytest.raises(
        ValueError, match="recompute is 'all'; it must be one of none, parts, block"
    ):
        model.forward(IDS, recompute="all")
