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
from ds_model.checkpoint.small import STORED, read_small, small_form, stored_small
from ds_model.checkpoint.transforms import Array, blocks, places
from ds_model.errors import CheckpointError
from ds_precision import QuantizedWeights, quantize_weights

if TYPE_CHECKING:
    from ds_model.causal_lm import CausalLM

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


_MOST_THREADS = 8  # more than memory can feed


def load_into(
    model: "CausalLM", directory: Path | str, quantize: str | None = None
) -> list[keras.Variable]:
    """Give every variable of `model` its value from the files, each byte read once, file by file.

    Values are rounded to the variable's dtype. All names, shapes and dtypes are checked before
    the first variable changes. Beside the variables this needs the memory of one variable, or,
    for a model built `unwritten`, of one tensor a thread.

    Args:
        model: built as its `config` says, MTP depth included (see `mtp_depth_present`).
        directory: holds `model.safetensors`, or shards and their index.
        quantize: a mode of `quantize_weights`: weights are made small as they are read, or taken as
            they are where the files hold that mode; "stored" is whatever the files hold.

    Returns:
        The variables that were written, or that small ones replace.

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
        taken = stored_small(files, entries, quantize) if quantize else set()
        for entry in entries:
            variable = variable_at(model, entry)
            written.append(variable)
            form = small_form(entry, quantize) if quantize not in (None, STORED) else None
            if entry.path in taken:
                put_small(model, entry, read_small(files, entry))
            elif form:
                value = _read(files, entry, NUMPY_DTYPES["float32"], threads)
                put_small(model, entry, quantize_weights(as_tensor(value), form))
            else:
                value = _read(files, entry, NUMPY_DTYPES[variable.dtype], threads)
                variable.assign(as_tensor(value))
    return written


def put_small(model: "CausalLM", entry: Entry, weights: QuantizedWeights) -> None:
    """Put small weights in a variable's place."""
    above, _, name = entry.path.rpartition(".")
    value_at(model, above).put_quantized(name, weights)


def _read(
    files: TensorFiles, entry: Entry, dtype: np.dtype[np.generic], threads: Executor
) -> Array:
    """The variable's value, straight from the mapped files to where it will stay."""
    copies = [copy.name for copy in entry.copies if copy.name in files]

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
    place = value_at(model, entry.path)
    if place is None or tuple(place.shape) != entry.shape:
        shape = "missing" if place is None else list(place.shape)
        message = f"variable {entry.path} is {shape}, and the layout has {list(entry.shape)}"
        raise CheckpointError(message)
    return place


def value_at(model: "CausalLM", path: str) -> Any:
    """What a path of attributes and places in lists leads to; `None` if nowhere."""
    place: Any = model
    for step in path.split("."):
        if step.isdigit():
            place = place[int(step)] if int(step) < len(place) else None
        else:
            place = getattr(place, step, None)
    return place
