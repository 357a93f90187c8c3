"""The closed form, against tensors that a real step keeps and sums that must hold."""

import pytest
import tensorflow as tf

from ds_model import CausalLM, ModelConfig, parameter_counts
from ds_precision import WeightGradients, defer_weight_gradients
from ds_precision.kernels import kernels
from ds_train import Holding, PipelinePart, training_memory
from ds_train.losses import pretraining_loss
from ds_train.parallel import Layout, Mesh, make_schedule

TINY = ModelConfig.preset("tiny")
BATCH, SEQUENCE = 2, 24


def test_weights_and_moments_are_those_of_the_model():
    found = training_memory(TINY, BATCH, SEQUENCE)
    counts = parameter_counts(TINY)
    assert found.parameters == 4 * (counts.main + counts.router_bias + counts.mtp)
    assert found.moments == 2 * found.parameters
    assert found.peak >= found.parameters + found.moments + found.gradients


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "parts", "block"])
def test_every_token_holds_the_same(policy, recompute):
    config = TINY.replace(num_nextn_predict_layers=0)
    one, two, four = (
        training_memory(config, batch, SEQUENCE, policy, recompute) for batch in (1, 2, 4)
    )
    assert 2 * sum(one.activations.values()) == sum(two.activations.values())
    assert 4 * one.logits == 2 * two.logits == four.logits
    for moment, held in two.moments_in_time.items():
        assert four.moments_in_time[moment] - held == 2 * (held - one.moments_in_time[moment])


def test_a_block_more_costs_its_input_alone_when_it_is_recomputed():
    config = TINY.replace(n_routed_experts=None, num_nextn_predict_layers=0)
    states = BATCH * SEQUENCE * config.hidden_size * 4
    held = [
        training_memory(config.replace(num_hidden_layers=n), BATCH, SEQUENCE, recompute="block")
        for n in (2, 3)
    ]
    more = sum(held[1].activations.values()) - sum(held[0].activations.values())
    assert more == states


ALIASES = {"Reshape", "Identity", "IdentityN", "ExpandDims", "StopGradient", "PreventGradient"}
SHAPES = {"Shape", "ShapeN", "Size", "Rank"}
WEIGHTS = {"ReadVariableOp", "Const", "Placeholder"}


def bytes_kept(config, policy, recompute):
    """Return what a traced step's backward operations read of what its forward ones made."""
    model = CausalLM(config, dtype=policy)

    @tf.function(autograph=False)
    def step(tokens):
        with tf.GradientTape() as tape:
            output = model.forward(tokens[:, :-1], mtp=bool(model.mtp), recompute=recompute)
            loss, _ = pretraining_loss(output, tokens, 0.3, 1e-4)
        forward = operations()
        gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        return sizes(read_of(forward, gradients))

    return sum(int(size) for size in step(tokens_for(config)))


def bytes_waiting(config, policy):
    """Return what weights' gradients read that come later than their inputs'."""
    model = CausalLM(config, dtype=policy)

    @tf.function(autograph=False)
    def step(tokens):
        later = WeightGradients()
        with tf.GradientTape() as tape, defer_weight_gradients(later):
            output = model.forward(tokens[:, :-1], mtp=bool(model.mtp))
            loss, _ = pretraining_loss(output, tokens, 0.3, 1e-4)
        tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        before = operations()
        return sizes(read_of(before, [gradient for _, gradient in later.compute()]))

    return sum(int(size) for size in step(tokens_for(config)))


def tokens_for(config):
    return tf.reshape(tf.range(BATCH * (SEQUENCE + 1)) % config.vocab_size, [BATCH, -1])


def operations():
    return {op.name for op in tf.compat.v1.get_default_graph().get_operations()}


def read_of(before, ends):
    """Return those results of the operations `before` that the way to `ends` reads."""
    kept, seen = {}, set()
    todo = [part.op for part in tf.nest.flatten(ends, expand_composites=True)]
    while todo:
        op = todo.pop()
        if op.name in seen:
            continue
        seen.add(op.name)
        if op.type in SHAPES:  # run at once: nothing waits for them
            continue
        for tensor in op.inputs:
            if tensor.op.name not in before:
                todo.append(tensor.op)
            elif tensor.dtype != tf.resource:
                source = origin(tensor)
                kept[source.name] = source
    return [tensor for tensor in kept.values() if tensor.op.type not in WEIGHTS]


def sizes(tensors):
    return [tf.size(tensor) * tensor.dtype.size for tensor in tensors]


def origin(tensor):
    """Follow a tensor back through operations that share their input's memory."""
    while True:
        op = tensor.op
        whole = op.type == "StridedSlice" and (
            tensor.shape.num_elements() == op.inputs[0].shape.num_elements()
        )
        if op.type not in ALIASES and not whole:
            return tensor
        tensor = op.inputs[tensor.value_index if op.type == "IdentityN" else 0]


@pytest.mark.skipif(kernels() is None, reason="the closed form is of the compiled operations")
@pytest.mark.parametrize(
    ("policy", "recompute", "queries"),
    [
        ("float32", "none", None),
        ("float32", "none", 48),
        ("mixed_bfloat16", "none", 48),
        ("float32", "block", 48),
        ("float32", "parts", 48),
        ("float32", "parts", None),
        ("mixed_bfloat16", "parts", 48),
    ],
)
def test_the_graph_keeps_what_the_form_says(policy, recompute, queries):
    config = TINY.replace(q_lora_rank=queries, num_hidden_layers=3, num_nextn_predict_layers=1)
    found = training_memory(config, BATCH, SEQUENCE, policy, recompute)
    said = sum(found.activations.values()) + found.logits // 2  # their gradient is not kept
    assert bytes_kept(config, policy, recompute) == pytest.approx(said, rel=0.02)


@pytest.mark.skipif(kernels() is None, reason="the closed form is of the compiled operations")
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("queries", [None, 48])
def test_what_waits_for_weights_gradients_is_what_the_form_says(policy, queries):
    config = TINY.replace(q_lora_rank=queries, num_hidden_layers=3, num_nextn_predict_layers=1)
    whole = (tuple(range(config.num_hidden_layers)),)
    waiting = PipelinePart(whole, holdings=(Holding("W", 0, (0,), (1,)),))
    found = training_memory(config, BATCH, SEQUENCE, policy, part=waiting)
    said = found.activations["what weights' gradients wait for"]
    assert bytes_waiting(config, policy) == pytest.approx(said, rel=0.02)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_a_pipeline_rank_holds_its_micro_batches(name):
    """Of blocks alone: so many times one micro-batch's as the schedule says, at most."""
    config = TINY.replace(num_hidden_layers=8, num_nextn_predict_layers=0)
    schedule = make_schedule(name, 4, 8)
    layout = Layout(config, Mesh(pp=4), schedule)
    blocks = layout.blocks[1]
    one = training_memory(config, 2, 24, part=PipelinePart((blocks,), False, False))
    found = training_memory(config, 2, 24, part=layout.memory_part(1))
    held = sum(found.activations.values()) / sum(one.activations.values())
    if name == "1f1b":
        assert held == schedule.peak_activations(1) == 3
    else:  # what waits for weights' gradients is about as much
        assert held == pytest.approx(schedule.peak_activations(1), rel=0.25)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"sequence": 1}, "sequence 1"),
        ({"dtype_policy": "int3"}, "dtype_policy is 'int3'; it must be one of float32"),
        ({"recompute": "all"}, "recompute is 'all'"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        training_memory(TINY, **{"batch": 1, "sequence": 8} | wrong)
