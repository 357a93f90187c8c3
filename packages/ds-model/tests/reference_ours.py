"""What this project says about a checkpoint, in the reference's terms.

Only public names are used: what is compared is what a user gets.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from safetensors.numpy import load_file

from ds_model import CausalLM


def experts(model: CausalLM, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return, for each MoE layer, the chosen experts `[tokens, k]`."""
    return tuple(r.indices.numpy() for r in model.forward(ids, mask).routings)


def loss(model: CausalLM, ids: np.ndarray, mask: np.ndarray) -> tf.Tensor:
    """Return the mean cross-entropy of each real token after a real token."""
    logits = model(ids, mask)[:, :-1]
    counted = tf.constant(mask[:, 1:] * mask[:, :-1], tf.float32)
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=ids[:, 1:], logits=logits)
    return tf.reduce_sum(each * counted) / tf.reduce_sum(counted)


def gradients(model: CausalLM, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Return the loss's gradient of every variable under its released name.

    The gradients are put in the place of the weights and saved: whatever the checkpoint map
    does to turn variables into released tensors, it does to the gradients. The weights are
    put back afterwards.
    """
    variables = model.trainable_variables
    with tf.GradientTape() as tape:
        value = loss(model, ids, mask)
    slopes = tape.gradient(value, [v.value for v in variables])
    weights = [v.numpy() for v in variables]
    try:
        for variable, slope in zip(variables, slopes, strict=True):
            # An embedding's gradient comes as slices: add up those of one row.
            dense = tf.zeros(variable.shape) if slope is None else tf.convert_to_tensor(slope)
            variable.assign(dense)
        return released(model)
    finally:
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)


def released(model: CausalLM) -> dict[str, np.ndarray]:
    """Return the model's tensors as `save_pretrained` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors: dict[str, np.ndarray] = {}
        for shard in sorted(Path(folder).glob("*.safetensors")):
            tensors |= load_file(shard)
        return tensors
