"""Training for the DeepSeek-V3 of `ds-model`: data, optimizer, trainer, evaluation."""

from ds_train.callbacks import Callback, StepMetrics
from ds_train.config import TrainConfig
from ds_train.errors import CheckpointError, DataError, TrainConfigError, TrainError
from ds_train.memory import TrainingMemory, training_memory
from ds_train.optimizer import AdamW
from ds_train.pipeline_part import Holding, PipelinePart
from ds_train.pretrain import RunResult, pretrain
from ds_train.quickstart import quickstart, quickstart_config
from ds_train.schedule import WarmupConstantCosine
from ds_train.stability import OperandStats, StabilityMetrics
from ds_train.tracking import Tracker, TrackerCallback, open_tracker
from ds_train.trainer import Trainer

__all__ = [
    "AdamW",
    "Callback",
    "CheckpointError",
    "DataError",
    "Holding",
    "OperandStats",
    "PipelinePart",
    "RunResult",
    "StabilityMetrics",
    "StepMetrics",
    "Tracker",
    "TrackerCallback",
    "TrainConfig",
    "TrainConfigError",
    "TrainError",
    "Trainer",
    "TrainingMemory",
    "WarmupConstantCosine",
    "open_tracker",
    "pretrain",
    "quickstart",
    "quickstart_config",
    "training_memory",
]
