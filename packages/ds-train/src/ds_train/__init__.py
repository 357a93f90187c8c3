"""Training for the DeepSeek-V3 of `ds-model`."""

from ds_train.errors import CheckpointError, DataError, TrainConfigError, TrainError
from ds_train.optimizer import AdamW
from ds_train.schedule import WarmupConstantCosine

__all__ = [
    "AdamW",
    "CheckpointError",
    "DataError",
    "TrainConfigError",
    "TrainError",
    "WarmupConstantCosine",
]
