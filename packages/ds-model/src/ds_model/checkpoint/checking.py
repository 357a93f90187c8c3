"""Whether a directory holds exactly the tensors that its configuration describes."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ds_model.checkpoint.layout import Tensor, empty_tensors, layout
from ds_model.checkpoint.reader import TensorFiles
from ds_model.config import ModelConfig
from ds_model.errors import CheckpointError

logger = logging.getLogger(__name__)

_RECOMPUTED = "rotary_emb.inv_freq"  # in old checkpoints; follows from the configuration
_NAMED = 3


def check_layout(files: TensorFiles, config: ModelConfig) -> None:
    """Refuse a checkpoint that is not exactly the model that `config` describes.

    Legal beside the model's tensors: the copies of embedding and head that MTP modules and tied
    heads repeat, tensors of size zero, and the `rotary_emb.inv_freq` of old checkpoints.

    Raises:
        CheckpointError: a tensor is missing, unused, of another shape, or of a dtype that can't
            be read; names the first few and says how many.
    """
    needed = {tensor.name: tensor for entry in layout(config) for tensor in entry.sources}
    legal = {tensor.name: tensor for entry in layout(config) for tensor in entry.copies}
    legal |= {tensor.name: tensor for tensor in empty_tensors(config)}
    for name in files.names:
        files.check_dtype(name)
    known = needed | legal
    misshapen = [
        f"{name} is {list(files.shape(name))} and must be {list(known[name].shape)}"
        for name in files.names
        if name in known and files.shape(name) != known[name].shape
    ]
    if misshapen:
        raise CheckpointError(f"tensor of the wrong shape: {_few(misshapen)}")
    if missing := [name for name in needed if name not in files]:
        raise CheckpointError(f"tensor missing from the checkpoint: {_few(missing)}")
    if unused := [name for name in files.names if not _expected(name, known, files)]:
        raise CheckpointError(f"tensor that config.json gives no place to: {_few(unused)}")


def mtp_depth_present(directory: Path | str, config: ModelConfig) -> int:
    """How many MTP modules to build: what config.json announces, or 0 if the files have none.

    `transformers` writes `num_nextn_predict_layers: 1` and no such tensors, so wholly absent
    modules are legal, and said in the log. The whole layout is checked too, so that a checkpoint
    that can't be loaded is refused before memory is spent on a model.

    Raises:
        CheckpointError: the directory can't be read, or is not the model of `config`.
    """
    with TensorFiles(directory) as files:
        depth = present_depth(files, config)
        check_layout(files, config.replace(num_nextn_predict_layers=depth))
    if depth < config.num_nextn_predict_layers:
        logger.warning(
            "%s announces %d MTP module(s) and holds no tensor of them: loaded without MTP",
            directory,
            config.num_nextn_predict_layers,
        )
    return depth


def present_depth(files: TensorFiles, config: ModelConfig) -> int:
    """The depth that `config` announces if any tensor of its MTP modules is there, else 0."""
    announced, first = config.num_nextn_predict_layers, config.num_hidden_layers
    stems = tuple(f"model.layers.{first + depth}." for depth in range(announced))
    return announced if any(name.startswith(stems) for name in files.names) else 0


def _expected(name: str, known: dict[str, Tensor], files: TensorFiles) -> bool:
    return name in known or name.endswith(_RECOMPUTED) or 0 in files.shape(name)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown}, and {len(names) - _NAMED} more"
