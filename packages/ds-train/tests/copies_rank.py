"""One of several ranks that give busy experts copies; `test_copies.py` starts it."""

import json

import keras
import numpy as np
import tensorflow as tf

from ds_model import CausalLM, ModelConfig, ModelPart
from ds_moe import rebalance_experts
from ds_train.parallel import Mesh, World
from ds_train.parallel.worker import leave

RANKS, COPIES = 2, 12


def main():
    world = World.join(Mesh(ep=RANKS))
    ranks = world.ranks(world.mesh.experts(world.rank))
    config = ModelConfig.preset("tiny")
    blocks = tuple(range(config.num_hidden_layers))
    given = np.random.default_rng(0).integers(0, 8, (RANKS, 1, 24))  # few words: some experts idle
    ids = tf.constant(given[world.rank], tf.int32)

    keras.utils.set_random_seed(3)
    whole = CausalLM(config)
    keras.utils.set_random_seed(3)
    model = CausalLM(config, part=ModelPart(blocks, expert_ranks=ranks))

    def read():
        output = tf.function(lambda ids: model.forward(ids, mtp=True), autograph=False)(ids)
        loads = tf.stack([routing.load for routing in output.routings])
        return output, tf.function(world.all.all_reduce, autograph=False)(loads).numpy()

    first, loads = read()
    placement = rebalance_experts(loads, COPIES, config.n_group, 1, RANKS)
    model.place_experts(placement)
    again, _ = read()
    want = whole.forward(ids, mtp=True)
    even = loads.reshape(len(loads), RANKS, -1).sum(axis=-1)
    said = {
        "dealt out": float(tf.reduce_max(tf.abs(first.logits - want.logits))),
        "copied": float(tf.reduce_max(tf.abs(again.logits - want.logits))),
        "drafts": float(tf.reduce_max(tf.abs(again.mtp_logits[0] - want.mtp_logits[0]))),
        "held": [layer.experts_here for layer in model.moe_layers],
        "busiest": float((even.max(axis=-1) / even.mean(axis=-1)).max()),
        "after": float((placement.gpu_loads(loads, RANKS).max(axis=-1) / even.mean(axis=-1)).max()),
    }
    print("found " + json.dumps(said), flush=True)  # noqa: T201 - the test reads it
    world.leave_together()
    leave(0)


if __name__ == "__main__":
    main()
