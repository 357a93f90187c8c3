"""What Keras' `fit` does in one step of this model.

Keras' own step would train the model too, but nobody would move the routers' biases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from ds_moe import Router, update_biases

if TYPE_CHECKING:
    from ds_model.causal_lm import CausalLM


def training_step(model: CausalLM, data: Any) -> dict[str, Any]:
    """Do one forward and backward pass, apply the optimizer, then balance the experts.

    Under the optimizer's gradient accumulation the loads are summed too, and the biases move
    once for each real optimizer step.

    Args:
        model: compiled with a loss and an optimizer.
        data: `(x, y)` or `(x, y, sample_weight)` as `fit` hands it over; `x` is `input_ids`,
            or a mapping with `input_ids` and `attention_mask`.

    Returns:
        The compiled metrics by name.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    inputs = dict(x) if isinstance(x, dict) else {"input_ids": x}
    with tf.GradientTape() as tape:
        output = model.forward(**inputs, training=True)
        loss = model.compute_loss(
            x=x, y=y, y_pred=output.logits, sample_weight=sample_weight, training=True
        )
        scaled = model.optimizer.scale_loss(loss)
    # The loss does not reach the MTP modules: with a gradient of zero they would only decay.
    apart = {id(weight) for module in model.mtp for weight in module.trainable_weights}
    variables = [weight for weight in model.trainable_weights if id(weight) not in apart]
    # Every weight gets its slots, so that a saved optimizer fits a freshly built one.
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    # Keras' optimizers mishandle IndexedSlices with repeated rows, which embeddings give.
    gradients = [tf.convert_to_tensor(g) for g in tape.gradient(scaled, variables)]
    model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    _balance(model, [routing.load for routing in output.routings])
    model._loss_tracker.update_state(loss)  # noqa: SLF001 - what Keras' own train_step does
    return model.compute_metrics(x, y, output.logits, sample_weight=sample_weight)


def _balance(model: CausalLM, loads: list[tf.Tensor]) -> None:
    routers = [layer.gate for layer in model.moe_layers][: len(loads)]
    if not model.bias_update_speed or not routers:
        return
    steps = model.optimizer.gradient_accumulation_steps
    if not steps:
        update_biases(routers, loads, model.bias_update_speed)
        return
    summed = _load_sums(model, routers)
    for total, load in zip(summed, loads, strict=True):
        total.assign_add(load)

    def move() -> tf.Tensor:
        update_biases(
            routers, [tf.convert_to_tensor(total) for total in summed], model.bias_update_speed
        )
        for total in summed:
            total.assign(tf.zeros_like(total))
        return tf.constant(0)

    done = tf.equal(tf.cast(model.optimizer._iterations, tf.int32) % steps, 0)  # noqa: SLF001
    tf.cond(done, move, lambda: tf.constant(0))


def _load_sums(model: CausalLM, routers: list[Router]) -> tuple[tf.Variable, ...]:
    """Return the variables that sum loads between two optimizer steps, made once."""
    found = model.__dict__.get("_load_sums")
    if found is None:
        with tf.init_scope():
            found = tuple(
                tf.Variable(tf.zeros([router.config.n_routed_experts]), trainable=False)
                for router in routers
            )
        # Past Keras' attribute tracking: they are no weights and belong in no saved file.
        model.__dict__["_load_sums"] = found
    return found
