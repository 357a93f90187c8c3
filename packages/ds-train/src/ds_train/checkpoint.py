"""Checkpoints that are whole or not there, and that any number of ranks can read.

A checkpoint is a folder `step-00000120`. Its `model.safetensors` and `optimizer.safetensors` hold
tensors by the names that they have in the whole model; of a run on many ranks each writes a
`model-00001-of-00004.safetensors` of its own, with what it alone has. A tensor that lies in several
files is stored in pieces: `name@start` is a row of its numbers from there on. So a run that was
saved on one mesh goes on on another.

`manifest.json` holds size and SHA-256 of all files, `state.json` among them. All is written under a
temporary name, flushed to disk, and renamed; so whatever kills the run, the folders under a final
name are complete. Old ones go only after a new one stands. Many ranks need one file system.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ds_train.errors import CheckpointError
from ds_train.optimizer import AdamW

_KINDS = ("model", "optimizer")


class Everyone(Protocol):
    """The ranks that write one checkpoint.

    Attributes:
        rank: this one.
        size: how many.
    """

    rank: int
    size: int

    def total(self, number: float) -> float:
        """Return the sum of what every rank gave, once all have."""


class Alone:
    """The only rank."""

    rank = 0
    size = 1

    def total(self, number: float) -> float:
        """Return the number."""
        return number


@dataclass(frozen=True)
class Piece:
    """Numbers of one tensor of the whole model.

    Attributes:
        name: of the tensor.
        variable: where the numbers are.
        start: where in the tensor, counted in numbers, they start.
        cut: which of the variable's numbers they are; all if None.
        whole: the tensor's shape, where it is not the variable's.
    """

    name: str
    variable: keras.Variable
    start: int = 0
    cut: slice | None = None
    whole: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's."""
        return tuple(self.variable.shape) if self.whole is None else self.whole

    @property
    def count(self) -> int:
        """How many numbers are here."""
        size = prod(self.variable.shape)
        return size if self.cut is None else len(range(size)[self.cut])

    def stored(self) -> tuple[str, np.ndarray]:
        """Return the key in a file, and the numbers."""
        values = np.asarray(self.variable.numpy(), order="C")  # scalars stay scalars
        if self.count == prod(self.shape) and self.cut is None:
            return self.name, values
        flat = values.reshape(-1)
        return f"{self.name}@{self.start}", flat if self.cut is None else flat[self.cut]

    def put(self, values: np.ndarray) -> None:
        """Write numbers, `[count]`, into the variable."""
        if self.cut is None:
            self.variable.assign(values.reshape(self.variable.shape))
            return
        found = self.variable.numpy().copy()
        found.reshape(-1)[self.cut] = values
        self.variable.assign(found)


Contents = Mapping[str, Sequence[Piece]]
"""The pieces of the model, and of the optimizer."""


def weight_name(variable: keras.Variable) -> str:
    """Return a variable's path below the model, whose own name counts up within a process."""
    return variable.path.split("/", 1)[1]


def whole_contents(
    model: keras.Model, optimizer: AdamW, average: Sequence[keras.Variable] = ()
) -> Contents:
    """Return everything of a model that lies in one process.

    Args:
        model: its weights.
        optimizer: its moments.
        average: of each trainable weight; none if there is none.
    """
    pieces = [Piece("iterations", optimizer.iterations)]
    moments = zip(model.trainable_variables, optimizer.momentums, optimizer.velocities, strict=True)
    for variable, momentum, velocity in moments:
        pieces.append(Piece(f"momentum/{weight_name(variable)}", momentum))
        pieces.append(Piece(f"velocity/{weight_name(variable)}", velocity))
    for variable, mean in zip(model.trainable_variables, average, strict=False):
        pieces.append(Piece(f"average/{weight_name(variable)}", mean))
    weights = [Piece(weight_name(variable), variable) for variable in model.variables]
    return {"model": weights, "optimizer": pieces}


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; made if missing.
        keep: How many of the newest to keep, 1 or more.
        everyone: Who writes them; each rank calls all methods.
    """

    def __init__(self, folder: Path, keep: int, everyone: Everyone | None = None) -> None:
        self.folder = folder
        self._keep = keep
        self._everyone = everyone or Alone()

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, oldest first."""
        found = self.folder.glob("step-*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in found)

    def refuse_any(self) -> None:
        """See that there is no checkpoint, for a run that is to start at step 0.

        Raises:
            CheckpointError: there is one; nothing is lost.
        """
        if steps := self.steps():
            msg = (
                f"{self.folder}: has checkpoints up to step {steps[-1]}; choose "
                "another --out, remove that folder, or resume"
            )
            raise CheckpointError(msg)

    def path(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint, there or not."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, contents: Contents, state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint, then removes those that are too old.

        Tensors are gathered in memory once more while a file is written.

        Args:
            step: Optimizer steps done.
            contents: What this rank is to write; no two ranks the same numbers.
            state: Anything JSON that a resume must check or know; of rank 0.

        Returns:
            The complete checkpoint.

        Raises:
            CheckpointError: If the disk is full or not writable; older checkpoints stand.
        """
        final = self.path(step)
        part = self.folder / f".writing-{final.name}"
        first = self._everyone.rank == 0
        self._together(final, part, lambda: _make_empty(part) if first else None)
        self._together(final, part, lambda: self._write_mine(part, contents))
        described = json.dumps({"step": step, **state}, indent=2).encode()
        self._together(final, part, lambda: self._complete(part, final, described, first))
        if first:
            for old in self.steps()[: -self._keep]:
                shutil.rmtree(self.path(old), ignore_errors=True)
        return final

    def read_state(self, step: int) -> dict[str, Any]:
        """Checks every file of a checkpoint against its manifest and returns its state.

        Raises:
            CheckpointError: If a file is missing, cut short or altered; says which.
        """
        who, problem = self._everyone, ""
        state: dict[str, Any] = {}
        try:
            manifest = self._manifest(step)
            # Each rank checks some of the files.
            for name in sorted(manifest)[who.rank :: who.size]:
                problem = problem or _damage(self.path(step) / name, manifest[name])
            state = json.loads((self.path(step) / "state.json").read_bytes())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = problem or f"{type(error).__name__}: {error}"
        if who.total(bool(problem)):
            raise self._broken(step, problem or "another rank found damage")
        return state

    def load(self, step: int, contents: Contents) -> None:
        """Puts a checkpoint's numbers into variables; all of them or none.

        Call `read_state` first: it checks the files.

        Args:
            step: Which checkpoint.
            contents: What this rank needs of it.

        Raises:
            CheckpointError: If names or shapes are not those of this model.
        """
        problem, found = "", []
        try:
            files = sorted(self._manifest(step))
            for kind in _KINDS:
                paths = [self.path(step) / name for name in files if name.startswith(kind)]
                stored = _Stored(paths)
                problem = problem or stored.misfit(contents[kind], alone=self._everyone.size == 1)
                if not problem:
                    found += [(piece, stored.read(piece)) for piece in contents[kind]]
        except (OSError, SafetensorError) as error:
            problem = str(error)
        if self._everyone.total(bool(problem)):
            said = problem or "what another rank needs is not there"
            raise self._broken(step, f"of another model: {said}")
        for piece, values in found:
            piece.put(values)

    def _manifest(self, step: int) -> dict[str, dict[str, Any]]:
        manifest = json.loads((self.path(step) / "manifest.json").read_bytes())
        for kind in (*_KINDS, "state.json"):
            if not any(name.startswith(kind) for name in manifest):
                raise KeyError(f"no {kind} in manifest.json")
        return manifest

    def _together(self, final: Path, part: Path, do: Any) -> None:
        """Does what this rank has to do; if any rank can't, all of them raise."""
        failed: OSError | None = None
        try:
            do()
        except OSError as error:
            failed = error
        if not self._everyone.total(failed is not None):
            return
        if self._everyone.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        why = "another rank could not write" if failed is None else failed.strerror or failed
        kept = f"step {self.steps()[-1]} is intact" if self.steps() else "there is none yet"
        msg = (
            f"{final}: checkpoint not written: {why}; the last complete "
            f"checkpoint ({kept}); make room and run again"
        )
        raise CheckpointError(msg) from failed

    def _write_mine(self, part: Path, contents: Contents) -> None:
        who = self._everyone
        rank = f"-{who.rank:05d}-of-{who.size:05d}" if who.size > 1 else ""
        described = {}
        for kind in _KINDS:
            name = f"{kind}{rank}.safetensors"
            pieces = contents[kind]
            described[name] = _write(part / name, safetensors.numpy.save(_tensors(pieces)))
        (part / f".described-{who.rank}").write_text(json.dumps(described), encoding="utf-8")

    def _complete(self, part: Path, final: Path, described: bytes, first: bool) -> None:
        if not first:
            return
        manifest: dict[str, Any] = {}
        for rank in range(self._everyone.size):
            place = part / f".described-{rank}"
            manifest |= json.loads(place.read_text(encoding="utf-8"))
            place.unlink()
        manifest["state.json"] = _write(part / "state.json", described)
        _write(part / "manifest.json", json.dumps(manifest, indent=2).encode())
        _flush_folder(part)
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        _flush_folder(self.folder)

    def _broken(self, step: int, problem: str) -> CheckpointError:
        others = [other for other in self.steps() if other < step]
        then = f"go on from step {others[-1]}" if others else "start again"
        msg = f"{self.path(step)}: broken checkpoint: {problem}; remove that folder to {then}"
        return CheckpointError(msg)


class _Stored:
    """What lies in the files of one kind, by name."""

    def __init__(self, paths: Iterable[Path]) -> None:
        # Of each tensor: start, count, its file and the key there.
        self._places: dict[str, list[tuple[int, int, Path, str]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    shape = tuple(file.get_slice(key).get_shape())
                    name, _, start = key.partition("@")
                    if not start:
                        self._shapes[name] = shape
                    place = (int(start or 0), prod(shape), path, key)
                    self._places.setdefault(name, []).append(place)

    def misfit(self, pieces: Sequence[Piece], alone: bool) -> str:
        """Says what of the pieces is not here, or has another shape; nothing if all fits.

        Args:
            pieces: What is wanted.
            alone: Whether that is all there should be.
        """
        wanted = {piece.name: piece.shape for piece in pieces}
        missing = sorted(wanted.keys() - self._places.keys())
        if missing:
            return f"no tensor {missing[0]}"
        unused = sorted(self._places.keys() - wanted.keys()) if alone else []
        if unused:
            return f"tensor {unused[0]} is not used"
        for name, shape in wanted.items():
            found = self._shapes.get(name, shape)
            count = sum(count for _, count, _, _ in self._places[name])
            if found != shape:
                return f"{name} is {found}, should be {shape}"
            if count != prod(shape):
                return f"{name} has {count} numbers, should have {prod(shape)}"
        return ""

    def read(self, piece: Piece) -> np.ndarray:
        """Returns a piece's numbers, `[count]`, from wherever they lie."""
        found = None
        for start, count, path, key in self._places[piece.name]:
            low, high = max(start, piece.start), min(start + count, piece.start + piece.count)
            if low >= high:
                continue
            with safe_open(path, framework="numpy") as file:
                values = file.get_tensor(key).reshape(-1)
            if found is None:
                found = np.empty(piece.count, values.dtype)
            found[low - piece.start : high - piece.start] = values[low - start : high - start]
        return np.zeros(0) if found is None else found


def _make_empty(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _tensors(pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
    pairs = [piece.stored() for piece in pieces]
    named = dict(pairs)
    if len(named) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        msg = f"two variables of the model have one path: {', '.join(twice)}"
        raise CheckpointError(msg)
    return named


def _damage(path: Path, want: Mapping[str, Any]) -> str:
    found = _describe(path.read_bytes())
    if found["bytes"] != want["bytes"]:
        return f"{path.name} has {found['bytes']} bytes, should be {want['bytes']}"
    if found != want:
        return f"{path.name} does not have the SHA-256 of its manifest"
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
