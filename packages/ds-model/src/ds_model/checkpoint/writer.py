"""Writing a released directory: safetensors in shards, an index, and never half a file."""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ds_model.checkpoint import atomic
from ds_model.checkpoint.reader import INDEX, SINGLE
from ds_model.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9


class TensorWriter:
    """Collects tensors into shards; nothing has its final name before `finish`.

    A context manager: leaving it without `finish`, by an error too, removes what was written.
    Holds one shard in memory.

    Args:
        directory: where to write; made if missing.
        max_shard_bytes: a shard closes before it would pass this; one larger tensor is a
            shard of its own.

    Raises:
        CheckpointError: the directory can't be made.
    """

    def __init__(self, directory: Path | str, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._directory = Path(directory)
        self._limit = max_shard_bytes
        self._pending: dict[str, NDArray[np.generic]] = {}
        self._drafts: list[Path] = []
        self._shard_of: dict[str, int] = {}
        self._held = self._total = 0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{directory} can't be made a directory: {error}") from error

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove drafts that were not published."""
        for draft in self._drafts:
            draft.unlink(missing_ok=True)

    def add(self, name: str, array: NDArray[np.generic]) -> None:
        """Take one contiguous tensor; writes a shard when the next one is full.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        if self._pending and self._held + array.nbytes > self._limit:
            self._write_shard()
        self._pending[name] = array
        self._held += array.nbytes
        self._shard_of[name] = len(self._drafts)
        self._total += array.nbytes

    def finish(self) -> None:
        """Write the last shard and the index, then give every file its final name.

        An older checkpoint in the same directory stays readable until the new one is whole,
        unless both have shards of the same names: then there is a moment with no index,
        which readers report as a directory without weights. It never reads as a mixture.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        self._write_shard()
        count = len(self._drafts)
        names = [SINGLE]
        if count > 1:
            names = [
                f"model-{shard:05d}-of-{count:05d}.safetensors" for shard in range(1, count + 1)
            ]
        stale = {path.name for path in self._directory.glob("model-*-of-*.safetensors")}
        try:
            if stale & set(names):
                (self._directory / INDEX).unlink(missing_ok=True)
            for draft, name in zip(self._drafts, names, strict=True):
                atomic.publish(draft, self._directory / name)
            self._drafts.clear()
            if count > 1:
                weight_map = {name: names[shard] for name, shard in self._shard_of.items()}
                index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
                content = json.dumps(index, indent=2, sort_keys=True) + "\n"
                atomic.write(self._directory / INDEX, content.encode())
            for name in (stale | {SINGLE if count > 1 else INDEX}) - set(names):
                (self._directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self._directory} can't be written: {error}") from error

    def _write_shard(self) -> None:
        draft = atomic.partial(self._directory / f"model-{len(self._drafts) + 1:05d}.safetensors")
        self._drafts.append(draft)
        try:
            draft.touch()
            mode = draft.stat().st_mode
            save_file(self._pending, draft, metadata={"format": "pt"})
            draft.chmod(mode)  # safetensors makes files that only their owner can read
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{draft} can't be written: {error}") from error
        self._pending, self._held = {}, 0
