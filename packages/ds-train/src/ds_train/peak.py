"""How much memory a training step takes in fact, to hold `training_memory` against."""

import ctypes
import gc
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from ds_model import CausalLM
from ds_train.config import TrainConfig
from ds_train.errors import TrainError
from ds_train.optimizer import AdamW
from ds_train.step import TrainStep

STEPS = 2  # the second finds the buffers of the first, and gaps between them
PROCESS = Path("/proc/self")


def measure_step(config: TrainConfig) -> int:
    """Do steps on random tokens and say by how much they raise what this process holds.

    Model, moments and graph are there before, and not in the result. Call it in a process
    that has done little else.

    Returns:
        Bytes of resident memory: the highest within the steps, less that before them.

    Raises:
        TrainError: this is not Linux, whose `/proc` is read.
    """
    if sys.platform != "linux":
        raise TrainError(f"memory is measured on Linux only; this is {sys.platform}")
    table, length = config.train, config.data.sequence_length + 1
    model = CausalLM(config.model.build(), dtype=config.policy())
    compiled = TrainStep(model, AdamW(config.learning_rate()), config).compiled
    # One graph for few tokens and for many: the first call optimises it and makes its plan,
    # which takes tens of megabytes.
    step = compiled.get_concrete_function(tf.TensorSpec([table.accumulation, None, None], tf.int32))
    shape = (table.accumulation, table.batch_size // table.accumulation, length)
    ids = np.random.default_rng(table.seed).integers(0, model.config.vocab_size, shape)
    tokens = tf.constant(ids.astype(np.int32))
    short = min(length, 2 + model.config.num_nextn_predict_layers)
    step(tokens[:, :1, :short])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free now would hide what the steps need
    (PROCESS / "clear_refs").write_text("5")  # starts the highest mark again
    before = _status("VmRSS")
    for _ in range(STEPS):
        float(step(tokens).scalars["loss"])
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise TrainError(f"{PROCESS / 'status'} does not say {name}")
