"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00000120` of `model.safetensors`, `optimizer.safetensors`,
`state.json` and `manifest.json`, which holds size and SHA-256 of the others. It is written
under a temporary name, flushed to disk, and renamed; so whatever kills the run, the folders
under a final name are complete. Old ones go only after a new one stands.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ds_train.errors import CheckpointError
from ds_train.optimizer import AdamW

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; made if missing.
        keep: How many of the newest to keep, 1 or more.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, oldest first."""
        found = self.folder.glob("step-*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in found)

    def path(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint, there or not."""
        return self.folder / f"step-{step:08d}"

    def save(
        self, step: int, model: keras.Model, optimizer: AdamW, state: Mapping[str, Any]
    ) -> Path:
        """Writes a checkpoint, then removes those that are too old.

        Tensors are gathered in memory once more while a file is written.

        Args:
            step: Optimizer steps done.
            model: All its variables are saved.
            optimizer: Built; moments and step count are saved.
            state: Anything JSON that a resume must check or know.

        Returns:
            The complete checkpoint.

        Raises:
            CheckpointError: If the disk is full or not writable; older checkpoints stand.
        """
        final = self.path(step)
        part = self.folder / f".writing-{final.name}"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            described = json.dumps({"step": step, **state}, indent=2).encode()
            contents: dict[str, Callable[[], bytes]] = {
                "model.safetensors": lambda: safetensors.numpy.save(_tensors(_model(model))),
                "optimizer.safetensors": lambda: safetensors.numpy.save(
                    _tensors(_moments(model, optimizer))
                ),
                "state.json": lambda: described,
            }
            manifest = {name: _write(part / name, make()) for name, make in contents.items()}
            _write(part / "manifest.json", json.dumps(manifest, indent=2).encode())
            _flush_folder(part)
            if final.exists():
                shutil.rmtree(final)
            part.rename(final)
            _flush_folder(self.folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            kept = f"step {self.steps()[-1]} is intact" if self.steps() else "there is none yet"
            msg = (
                f"{final}: checkpoint not written: {error.strerror or error}; the last complete "
                f"checkpoint ({kept}); make room and run again"
            )
            raise CheckpointError(msg) from error
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return final

    def read_state(self, step: int) -> dict[str, Any]:
        """Checks every file of a checkpoint against its manifest and returns its state.

        Raises:
            CheckpointError: If a file is missing, cut short or altered; says which.
        """
        folder = self.path(step)
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            for name in _FILES:
                want, found = manifest[name], _describe((folder / name).read_bytes())
                if found["bytes"] != want["bytes"]:
                    problem = f"{name} has {found['bytes']} bytes, should be {want['bytes']}"
                    raise self._broken(step, problem)
                if found != want:
                    raise self._broken(step, f"{name} does not have the SHA-256 of its manifest")
            return json.loads((folder / "state.json").read_bytes())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._broken(step, f"{type(error).__name__}: {error}") from error

    def load(self, step: int, model: keras.Model, optimizer: AdamW) -> None:
        """Puts a checkpoint's numbers into model and optimizer; all of them or none.

        Call `read_state` first: it checks the files.

        Raises:
            CheckpointError: If names or shapes are not those of this model.
        """
        folder = self.path(step)
        parts = {
            "model.safetensors": _model(model),
            "optimizer.safetensors": _moments(model, optimizer),
        }
        found = {}
        for name, variables in parts.items():
            try:
                found[name] = safetensors.numpy.load((folder / name).read_bytes())
            except (OSError, SafetensorError) as error:
                raise self._broken(step, f"{name}: {error}") from error
            problem = _misfit(found[name], variables)
            if problem:
                raise self._broken(step, f"{name} is of another model: {problem}")
        for name, variables in parts.items():
            for key, variable in variables.items():
                variable.assign(found[name][key])

    def _broken(self, step: int, problem: str) -> CheckpointError:
        others = [other for other in self.steps() if other < step]
        then = f"go on from step {others[-1]}" if others else "start again"
        msg = f"{self.path(step)}: broken checkpoint: {problem}; remove that folder to {then}"
        return CheckpointError(msg)


def _name(variable: keras.Variable) -> str:
    """The variable's path below the model, whose own name counts up within a process."""
    return variable.path.split("/", 1)[1]


def _model(model: keras.Model) -> dict[str, keras.Variable]:
    return _unique([(_name(v), v) for v in model.variables])


def _moments(model: keras.Model, optimizer: AdamW) -> dict[str, keras.Variable]:
    pairs = [("iterations", optimizer.iterations)]
    moments = zip(model.trainable_variables, optimizer.momentums, optimizer.velocities, strict=True)
    for variable, momentum, velocity in moments:
        pairs.append((f"momentum/{_name(variable)}", momentum))
        pairs.append((f"velocity/{_name(variable)}", velocity))
    return _unique(pairs)


def _unique(pairs: list[tuple[str, keras.Variable]]) -> dict[str, keras.Variable]:
    named = dict(pairs)
    if len(named) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        msg = f"two variables of the model have one path: {', '.join(twice)}"
        raise CheckpointError(msg)
    return named


def _tensors(variables: Mapping[str, keras.Variable]) -> dict[str, np.ndarray]:
    # ascontiguousarray would turn scalars into vectors.
    return {name: np.asarray(variable.numpy(), order="C") for name, variable in variables.items()}


def _misfit(found: Mapping[str, np.ndarray], variables: Mapping[str, keras.Variable]) -> str:
    missing = sorted(variables.keys() - found.keys())
    if missing:
        return f"no tensor {missing[0]}"
    unused = sorted(found.keys() - variables.keys())
    if unused:
        return f"tensor {unused[0]} is not used"
    for name, variable in variables.items():
        if found[name].shape != tuple(variable.shape):
            return f"{name} is {found[name].shape}, should be {tuple(variable.shape)}"
    return ""


def _describe(raw: bytes) -> dict[str, int | str]:
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _write(path: Path, raw: bytes) -> dict[str, int | str]:
    with path.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return _describe(raw)


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
