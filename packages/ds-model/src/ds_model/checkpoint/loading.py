"""From a released directory into a built model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import ml_dtypes
import numpy as np

from ds_model.checkpoint.checking import check_layout
from ds_model.checkpoint.layout import Entry, layout
from ds_model.checkpoint.reader import TensorFiles
from ds_model.checkpoint.transforms import Array, join
from ds_model.errors import CheckpointError

if TYPE_CHECKING:
    from ds_model.causal_lm import CausalLM

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def load_into(model: "CausalLM", directory: Path | str) -> None:
    """Give every variable of `model` its value from the files, each read once, file by file.

    Values are rounded to the variable's dtype. All names, shapes and dtypes are checked before
    the first variable changes.

    Args:
        model: built as its `config` says, MTP depth included (see `mtp_depth_present`).
        directory: holds `model.safetensors`, or shards and their index.

    Raises:
        CheckpointError: a broken file; a missing, unused or misshapen tensor; a dtype that can't
            be read; an MTP module's copy of embedding or head that differs from the main one.
    """
    with TensorFiles(directory) as files:
        check_layout(files, model.config)
        order = {file: place for place, file in enumerate(dict.fromkeys(files.file_of.values()))}
        entries = list(layout(model.config))
        entries.sort(key=lambda entry: order[files.file_of[entry.sources[0].name]])
        for entry in entries:
            value = join(entry, files.read)
            _check_copies(files, entry, value)
            variable = variable_at(model, entry)
            variable.assign(value.astype(NUMPY_DTYPES[variable.dtype], copy=False))


def variable_at(model: "CausalLM", entry: Entry) -> keras.Variable:
    """The variable that `entry.path` leads to.

    Raises:
        CheckpointError: the model was not built as its config says.
    """
    place: Any = model
    for step in entry.path.split("."):
        if step.isdigit():
            place = place[int(step)] if int(step) < len(place) else None
        else:
            place = getattr(place, step, None)
    if place is None or tuple(place.shape) != entry.shape:
        shape = "missing" if place is None else list(place.shape)
        message = f"variable {entry.path} is {shape}, and the layout has {list(entry.shape)}"
        raise CheckpointError(message)
    return place


def _check_copies(files: TensorFiles, entry: Entry, value: Array) -> None:
    original = value if value.shape == entry.sources[0].shape else value.T
    for copy in entry.copies:
        if copy.name in files.file_of and not np.array_equal(files.read(copy.name), original):
            message = (
                f"tensor {copy.name} differs from {entry.sources[0].name}, "
                "which the model shares with it"
            )
            raise CheckpointError(message)
