"""From a released directory into a built model."""

import os
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import ml_dtypes
import numpy as np

from ds_model.checkpoint.checking import check_layout
from ds_model.checkpoint.layout import Entry, layout
from ds_model.checkpoint.memory import aligned, as_tensor
from ds_model.checkpoint.reader import TensorFiles
from ds_model.checkpoint.transforms import Array, blocks, places
from ds_model.errors import CheckpointError

if TYPE_CHECKING:
    from ds_model.causal_lm import CausalLM

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


_MOST_THREADS = 8  # more than memory can feed


def load_into(model: "CausalLM", directory: Path | str) -> list[keras.Variable]:
    """Give every variable of `model` its value from the files, each byte read once, file by file.

    Values are rounded to the variable's dtype. All names, shapes and dtypes are checked before
    the first variable changes. Beside the variables this needs the memory of one variable, or,
    for a model built `unwritten`, of one tensor a thread.

    Args:
        model: built as its `config` says, MTP depth included (see `mtp_depth_present`).
        directory: holds `model.safetensors`, or shards and their index.

    Returns:
        The variables that were written.

    Raises:
        CheckpointError: a broken file; a missing, unused or misshapen tensor; a dtype that can't
            be read; an MTP module's copy of embedding or head that differs from the main one.
    """
    written = []
    with (
        TensorFiles(directory) as files,
        ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads,
    ):
        check_layout(files, model.config)
        entries = sorted(layout(model.config), key=lambda entry: files.place(entry.sources[0].name))
        for entry in entries:
            variable = variable_at(model, entry)
            value = _read(files, entry, NUMPY_DTYPES[variable.dtype], threads)
            variable.assign(as_tensor(value))
            written.append(variable)
    return written


def _read(
    files: TensorFiles, entry: Entry, dtype: np.dtype[np.generic], threads: Executor
) -> Array:
    """The variable's value, straight from the mapped files to where it will stay."""
    copies = [copy.name for copy in entry.copies if copy.name in files.file_of]

    def copy(pair: tuple[str, Array]) -> None:
        name, place = pair
        with files.borrow(name) as tensor, ExitStack() as stack:
            twins = [(twin, stack.enter_context(files.borrow(twin))) for twin in copies]
            for rows in blocks(tensor):
                place[rows] = tensor[rows].astype(dtype, copy=False)
                for twin, array in twins:
                    if not np.array_equal(array[rows], tensor[rows]):
                        message = (
                            f"tensor {twin} differs from {name}, which the model shares with it"
                        )
                        raise CheckpointError(message)

    value = aligned(entry.shape, dtype)
    for _ in threads.map(copy, places(entry, value)):
        pass  # an error in a thread is raised here
    return value


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
