"""From a model to a released directory that `transformers` opens."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tensorflow as tf

from ds_model.checkpoint import atomic
from ds_model.checkpoint.layout import empty_tensors, layout
from ds_model.checkpoint.loading import NUMPY_DTYPES, variable_at
from ds_model.checkpoint.transforms import places
from ds_model.checkpoint.writer import MAX_SHARD_BYTES, TensorWriter
from ds_model.config import ModelConfig
from ds_model.errors import CheckpointError

if TYPE_CHECKING:
    from ds_model.causal_lm import CausalLM

DTypeName = Literal["float32", "bfloat16", "float16"]

KEPT_FLOAT32 = "e_score_correction_bias"
"""Stays float32 whatever the other tensors are, as released: steps of 0.001 vanish in BF16."""


def save(
    model: "CausalLM",
    directory: Path | str,
    dtype: DTypeName | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `config.json` and safetensors in the released layout; other files stay as they are.

    Args:
        model: whose variables are written, MTP modules with their copies of embedding and head.
        directory: made if missing; an older checkpoint in it is replaced once this one is whole.
        dtype: of the tensors; `None` keeps each variable's own.
        max_shard_bytes: above it, shards with an index.

    Raises:
        CheckpointError: the disk is full or not writable; a value does not fit float16.
    """
    directory = Path(directory)
    with TensorWriter(directory, max_shard_bytes) as writer:
        for entry in layout(model.config):
            value = np.asarray(tf.convert_to_tensor(variable_at(model, entry)))  # no copy
            for name, place in places(entry, value):
                writer.add(name, place, stored_dtype(name, dtype))
            for copy in entry.copies:
                if copy.name != "lm_head.weight":
                    writer.add(copy.name, place, stored_dtype(copy.name, dtype))
        stored = NUMPY_DTYPES[dtype or model.embed_tokens.embeddings.dtype]
        for tensor in empty_tensors(model.config):
            writer.add(tensor.name, np.empty(tensor.shape, stored))
        writer.finish()
    write_config(model.config, directory, stored.name)


def stored_dtype(name: str, dtype: DTypeName | None) -> np.dtype[np.generic] | None:
    """The dtype that a tensor is to be stored in; `None`, and the router's bias, keep theirs."""
    return None if dtype is None or name.endswith(KEPT_FLOAT32) else NUMPY_DTYPES[dtype]


def write_config(config: ModelConfig, directory: Path, dtype: str) -> None:
    """Write `config.json`, with the stored dtype beside the model's fields.

    Raises:
        CheckpointError: not writable.
    """
    content = json.dumps(config.to_dict() | {"torch_dtype": dtype}, indent=2, sort_keys=True)
    try:
        atomic.write(directory / "config.json", (content + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{directory}/config.json can't be written: {error}") from error
