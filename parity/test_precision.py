"""Under a bfloat16 policy the router still decides in float32."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import torch
from reference_cases import BY_NAME
from reference_weights import weights

from ds_model import CausalLM
from parity import pairs, peer
from parity.measure import relative, same_experts


@pytest.mark.parametrize("name", ["released", "all-moe-negative-bias", "v2-group-limited"])
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_router_chooses_as_in_float32(name: str, policy: str) -> None:
    """Feed one bfloat16 hidden state to both routers; rounded scores would choose otherwise."""
    case = BY_NAME[name]
    model = CausalLM.from_pretrained(pairs.folder_of(case), dtype=policy)
    layers = case.config["num_hidden_layers"]
    names = [
        f"model.layers.{i}.mlp.gate" for i in range(case.config["first_k_dense_replace"], layers)
    ]
    rng = np.random.default_rng(5)
    hidden = tf.cast(rng.standard_normal((512, case.config["hidden_size"])), tf.bfloat16)
    exact = torch.tensor(hidden.numpy().astype(np.float32))
    tensors = weights(case)
    for layer, their_name in zip(model.moe_layers, names, strict=False):
        theirs = pairs.peer_of(case).get_submodule(their_name)
        np.testing.assert_array_equal(layer.gate.weight.numpy().T, tensors[f"{their_name}.weight"])
        with torch.no_grad():
            _, gates, experts = theirs(exact)
        routing = layer.gate(hidden)
        assert routing.gates.dtype == tf.float32
        assert same_experts(routing.indices.numpy(), experts.numpy())
        mine, order = np.sort(routing.gates.numpy()), np.sort(gates.numpy())
        assert relative(mine, order) < 1e-6


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_rounding_costs_no_more_than_there(policy: str) -> None:
    case = BY_NAME["all-dense"]  # no choice of experts that rounding could turn
    ids, mask = case.batch()
    exact = pairs.peer_forward(case).logits[mask == 1]
    theirs = peer.load(pairs.folder_of(case)).bfloat16()
    with torch.no_grad():
        rounded = theirs(torch.tensor(ids).long(), attention_mask=torch.tensor(mask)).logits
    mine = CausalLM.from_pretrained(pairs.folder_of(case), dtype=policy)(ids, mask)
    assert mine.dtype == tf.float32
    cost = relative(rounded.float().numpy()[mask == 1], exact)
    assert 1e-4 < relative(mine.numpy()[mask == 1], exact) < 2 * cost
