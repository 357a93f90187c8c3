"""What the tests share: a model small enough to trace in seconds, and one finished run of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from ds_train import TrainConfig, Trainer
from ds_train.data import write_token_file
from ds_train.metrics_log import read_metrics
from ds_train.parallel.launch import launch
from ds_train.parallel.worker import RankRun

# Two devices on one machine, for the test of replicas; must come before TensorFlow starts.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

# Two blocks, the second with experts, and one MTP module.
MODEL = {
    "preset": "tiny",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
}


# What of it else is set so that it can be cut apart: stages for four ranks, experts for four.
CUT = {"num_hidden_layers": 4, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}


def tables(**changes):
    """Return a configuration's tables for a run of six steps."""
    found = {
        "model": dict(MODEL),
        "data": {"sequence_length": 16},
        "schedule": {"peak": 1e-2, "floor": 1e-3, "final": 1e-4, "warmup_steps": 2},
        "train": {"steps": 6, "batch_size": 4, "log_every": 2},
        "checkpoint": {"every": 2, "keep": 2},
    }
    for table, values in changes.items():
        found[table] = found.get(table, {}) | values
    return found


def tokens(count=600):
    """Return ids with a pattern to learn: a counting loop with some noise."""
    rng = np.random.default_rng(0)
    ids = np.arange(count) % 50 + 20
    return np.where(rng.random(count) < 0.1, rng.integers(0, 300, count), ids).astype(np.uint16)


@dataclass
class Run:
    """A finished run."""

    trainer: Trainer
    out: Path


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return a run of six steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished")
    trainer = Trainer(TrainConfig.from_dict(tables()), tokens(), out)
    trainer.train()
    return Run(trainer, out)


@pytest.fixture(scope="session")
def token_file(tmp_path_factory):
    """Return a token file of 3,000 ids, for runs of several processes."""
    folder = tmp_path_factory.mktemp("tokens")
    return write_token_file(folder, [tokens(3000).tolist()], 300, None, None)


def start(config, token_file, out, report=lambda *_: None, say=lambda _: None):
    """Train on as many processes as the configuration has ranks."""
    launch(RankRun(config, config.model.build(), token_file.path, out, True), report, say)


def losses(out):
    """Return the loss of each step."""
    return np.array([row["loss"] for row in read_metrics(out / "metrics.jsonl")])


def weights(trainer):
    """Return a whole model's weights by name, and their averages if there are any."""
    found = {weight.path.split("/", 1)[1]: weight.numpy() for weight in trainer.model.weights}
    if trainer.average is not None:
        pairs = zip(trainer.average.weights, trainer.average.values, strict=True)
        found |= {f"average/{w.path.split('/', 1)[1]}": value.numpy() for w, value in pairs}
    return found
