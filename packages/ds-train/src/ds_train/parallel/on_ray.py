"""Ranks on a Ray cluster: Ray Train places and starts them, and starts all anew when one is lost.

Needs the extra `ray`. Ray says in `TF_CONFIG` who is who, and from there on everything is as under
any other scheduler; a run that is started anew goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_train.checkpoint import CheckpointStore
from ds_train.config import TrainConfig
from ds_train.data import read_files
from ds_train.errors import TrainError


def train_on_ray(
    config: TrainConfig, data: Sequence[Path], out: Path, resume: bool, restarts: int
) -> None:
    """Train on the cluster that `RAY_ADDRESS` names, or on one of this machine's own.

    Args:
        config: everything that decides the run; its mesh is the number of workers.
        data: files or folders of text, on a file system that all workers share.
        out: folder of the run, on it too.
        resume: as for `pretrain`.
        restarts: how often all ranks are started anew after one was lost.

    Raises:
        CheckpointError: `resume` is false and there are checkpoints.
        TrainError: the extra is missing; or the run failed for good, and why.
    """
    if not resume:  # asked once, here: a run that Ray starts anew has checkpoints of its own
        CheckpointStore(out / "checkpoints", keep=1).refuse_any()
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415 - an extra
        from ray.train.tensorflow import TensorflowTrainer  # noqa: PLC0415
    except ImportError as error:
        raise TrainError(f"{error}: pip install 'ds-train[ray]'") from error
    told = {
        "config": config.model_dump(mode="json"),
        "data": [str(path.resolve()) for path in data],
        "out": str(out.resolve()),
    }
    trainer = TensorflowTrainer(
        _rank,
        train_loop_config=told,
        scaling_config=ScalingConfig(num_workers=config.parallel.ranks),
        run_config=RunConfig(
            name="ranks",
            storage_path=str((out / "ray").resolve()),
            failure_config=FailureConfig(max_failures=restarts),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray's own kinds differ from release to release
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise TrainError(f"Ray gave up: {last[:300]}") from error


def _rank(told: dict[str, Any]) -> None:
    """Be one rank; in a process of Ray's."""
    from ds_train.pretrain import run_here  # noqa: PLC0415 - TensorFlow starts after Ray's TF_CONFIG

    config = TrainConfig.from_dict(told["config"])
    found = read_files([Path(path) for path in told["data"]], config.data.suffixes)
    code = run_here(config, found.documents, told["out"])
    if code:
        raise TrainError(f"a rank ended with code {code}; the worker's log says why")
