"""How fast this machine is, from a short measurement: a cluster of one device.

Its numbers take the place of those of arXiv 2412.19437, section 3.1, in a plan.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from ds_model import CausalLM, ModelConfig
from ds_precision import matmul
from ds_train.errors import TrainConfigError
from ds_train.plan.cluster import Cluster, Precision

_SIDE = 2048
_NUMBERS = 2**26
_TOKENS, _SHORT, _LONG = 2048, 128, 2048  # in rows of so many
_TRIES = 5


def measure_cluster(name: str = "this machine", memory: float | None = None) -> Cluster:
    """Measure products, attention's core and passes over memory (a minute at most).

    Links are not measured: one device has none.

    Args:
        name: what to call it.
        memory: of the device [GiB]; a CPU's can be asked for.

    Raises:
        TrainConfigError: a GPU's memory was not given.
    """
    memory = _memory() if memory is None else memory
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    products = {precision: round(_products(precision), 4) for precision in precisions}
    forward, backward = _attention()
    return Cluster(
        name=name,
        memory=round(memory, 2),
        products=products,
        attention=round(forward, 4),
        attention_backward=round(backward, 4),
        bandwidth=round(_bandwidth(), 2),
        devices_per_node=1,
        source="measured by ds-train plan --measure",
    )


def _best(run: Callable[..., Any], *given: tf.Tensor) -> float:
    """Return the shortest of several calls as a graph, seconds; one number of it is looked at."""
    compiled = tf.function(lambda *given: tf.reshape(run(*given), [-1])[0], autograph=False)
    times = []
    for _ in range(_TRIES + 2):
        start = time.perf_counter()
        compiled(*given).numpy()  # a device may answer before it is done
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _products(precision: Precision) -> float:
    a, b = (tf.cast(tf.random.normal([_SIDE, _SIDE]), precision) for _ in range(2))
    return 2 * _SIDE**3 / _best(matmul, a, b) / 1e12


def _bandwidth() -> float:
    numbers = tf.random.normal([_NUMBERS])
    return 2 * 4 * _NUMBERS / _best(lambda x: x * 2.0, numbers) / 1e9


def _attention() -> tuple[float, float]:
    """Return the speed of a causal core, forwards and backwards, TFLOP/s.

    It is what long rows take beyond short ones of as many tokens: all else is equal.
    """
    config = ModelConfig.preset("tiny").replace(
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_nextn_predict_layers=0,
        num_attention_heads=16,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=_LONG,
    )
    model = CausalLM(config)
    forward: list[float] = []
    both: list[float] = []
    for length in (_SHORT, _LONG):
        ids = tf.zeros([_TOKENS // length, length], tf.int32)

        def total(ids: tf.Tensor) -> tf.Tensor:
            return tf.reduce_sum(model.run_blocks(model.embed_tokens(ids))[0])

        def gradients(ids: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                loss = total(ids)
            found = tape.gradient(loss, model.blocks[0].trainable_variables)
            return tf.add_n([tf.reduce_sum(gradient) for gradient in found])

        forward.append(_best(total, ids))
        both.append(_best(gradients, ids))
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    more = (_LONG - _SHORT) / 2 * _TOKENS * config.num_hidden_layers
    work = 2 * config.num_attention_heads * (key + config.v_head_dim) * more / 1e12
    there = forward[1] - forward[0]
    back = both[1] - both[0] - there
    # A core that costs next to nothing beside the clock's spread is as fast as products.
    return work / max(there, 1e-4), 2.5 * work / max(back, 1e-4)


def _memory() -> float:
    if tf.config.list_physical_devices("GPU"):
        raise TrainConfigError("TensorFlow does not say how much memory a GPU has; give --memory")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
