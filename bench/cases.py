"""What `bench.case` can measure of this library; each function is one kind of point."""

from __future__ import annotations

import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import tensorflow as tf

from bench import kernels
from bench.case import LONG, REPEATS, median_seconds, peak_bytes, seconds
from bench.shares import shares as watched_shares
from bench.tasks import PRESET, Precision, Task, stream
from bench.workers.ours import Ours, Stepping
from ds_model import CausalLM, ModelConfig, parameter_counts
from ds_precision import BlockScaled, watch_fp8
from ds_train import AdamW, TrainConfig
from ds_train.peak import measure_step
from ds_train.quickstart import quickstart_config


def decode(
    batch: int, context: int, new: int, precision: Precision = "float32", **changes: Any
) -> dict[str, Any]:
    """Read prompts, then write: seconds of each, and memory after each."""
    threads()
    model = made(precision, changes)
    ids = stream(model.config.vocab_size, batch, context)
    model.generate(ids[:, :1], max_new_tokens=2, eos_token_id=[])  # compiles
    prefill = median_seconds(lambda: model.generate(ids, max_new_tokens=1, eos_token_id=[]))
    prefill_peak = peak_bytes()

    def write() -> float:
        chunks = model.stream(ids, max_new_tokens=new + 1, eos_token_id=[])
        next(chunks)
        return seconds(lambda: list(chunks)) / new

    if prefill < LONG:
        write()
    times = [write() for _ in range(REPEATS if prefill < LONG / REPEATS else 1)]
    return sizes(model.config) | {
        "prefill_seconds": prefill,
        "prefill_peak": prefill_peak,
        "step_seconds": statistics.median(times),
        "peak": peak_bytes(),
    }


def step(batch: int, length: int, **changes: Any) -> dict[str, Any]:
    """Do training steps in two parts: forward and backward, then the optimizer."""
    threads()
    model = made("float32", changes)
    optimizer = AdamW(1e-5)
    variables = model.trainable_variables
    optimizer.build(variables)
    tokens = tf.constant(stream(model.config.vocab_size, batch, length + 1))

    @tf.function(autograph=False)
    def gradients(tokens: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            logits = model(tokens[:, :-1], training=True)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(tokens[:, 1:], logits)
            )
        found = tape.gradient(loss, variables, unconnected_gradients="zero")
        return [tf.convert_to_tensor(gradient) for gradient in found]

    @tf.function(autograph=False)
    def update(gradients: list[tf.Tensor]) -> None:
        optimizer.apply(gradients, variables)

    def optimizer_seconds() -> float:
        found = gradients(tokens)
        return median_seconds(lambda: update(found))

    return sizes(model.config) | {
        "tokens": batch * length,
        "optimizer_seconds": optimizer_seconds(),
        "gradient_seconds": median_seconds(lambda: gradients(tokens)),
        "peak": peak_bytes(),
    }


def train(model: str, batch: int, length: int, **train_table: Any) -> dict[str, Any]:
    """Do whole steps with the trainer: seconds of the first, of later ones, and memory."""
    threads()
    task = Task("train", batch, length, "float32")
    config = ModelConfig.from_pretrained(model)
    stepping = Stepping(Path(model), task, config.vocab_size, **train_table)
    found = sizes(config) | {
        "tokens": task.tokens,
        "first_seconds": seconds(stepping.step),
        "seconds": median_seconds(stepping.step),
        "peak": peak_bytes(),
    }
    stepping.stop()
    return found


def operations() -> dict[str, Any]:
    """Time the compiled operations alone."""
    threads()
    return {"rows": kernels.measure()}


def shares(model: str, key: str) -> dict[str, float]:
    """Say where the time of a task goes."""
    return watched_shares(model, key)


def held(policy: str) -> dict[str, Any]:
    """Say what training `mini` in a precision holds, in bytes, and what a step adds to that."""
    threads()
    tables = quickstart_config().model_dump()
    tables["train"].update(dtype_policy=policy, batch_size=16)
    tables["optimizer"]["moments"] = "float32" if policy == "float32" else "bfloat16"
    config = TrainConfig.from_dict(tables, source=policy)
    model = CausalLM(config.model.build(), dtype=config.policy())
    optimizer = AdamW(1e-3, moments=config.optimizer.moments)
    optimizer.build(model.trainable_variables)
    moments = [*optimizer.momentums, *optimizer.velocities]
    seen: dict[str, int] = {}

    def note(name: str, _: tf.Tensor, small: BlockScaled, __: Any) -> None:
        if name.endswith("/weight"):
            seen[name] = small.values.shape.num_elements() + 4 * small.scales.shape.num_elements()

    with watch_fp8(note):
        model.forward(tf.zeros([1, 8], tf.int32), mtp=True)
    weights, kept = sizes_of(model.trainable_variables), sizes_of(moments)
    del model, optimizer, moments
    return {
        "weights": weights,
        "small_weights": sum(seen.values()),
        "moments": kept,
        "step": measure_step(config),
    }


def sizes_of(variables: list[Any]) -> int:
    """Return the bytes of variables."""
    return sum(tf.as_dtype(v.dtype).size * math.prod(v.shape) for v in variables)


def first_token(model: str, precision: Precision, context: int) -> dict[str, Any]:
    """Read the weights, then write the first token that is decoded, from a process just begun."""
    threads()
    read_before = bytes_read()
    start = time.perf_counter()
    worker = Ours(Path(model), precision, os.cpu_count() or 1, thorough=False)
    loaded = time.perf_counter()
    read = bytes_read() - read_before
    peak = peak_bytes()
    task = Task("decode", 1, context, precision, new=1)
    worker.modes(task)["tf.function"]()()
    return {
        "load_seconds": loaded - start,
        "load_peak": peak,
        "load_read": read,
        "file_bytes": sum(file.stat().st_size for file in Path(model).glob("*.safetensors")),
        "first_token_seconds": time.perf_counter() - loaded,
    }


def made(precision: Precision, changes: dict[str, Any]) -> CausalLM:
    """Return preset `bench` with some fields changed, random weights."""
    return CausalLM(ModelConfig.preset(PRESET).replace(**changes), dtype=precision)


def sizes(config: ModelConfig) -> dict[str, Any]:
    """Return the parameters, all and active."""
    counts = parameter_counts(config)
    return {"parameters": counts.main, "active": counts.active}


def threads() -> None:
    """Use all processors for one operation, and one operation at a time."""
    tf.config.threading.set_intra_op_parallelism_threads(os.cpu_count() or 1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def bytes_read() -> int:
    """Return what this process has asked to read; what is mapped does not count."""
    first = Path("/proc/self/io").read_text(encoding="ascii").split()
    return int(first[first.index("rchar:") + 1])
