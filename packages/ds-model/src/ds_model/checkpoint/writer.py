"""Writing a released directory: safetensors in shards, an index, and never half a file."""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from ds_model.checkpoint import atomic
from ds_model.checkpoint.journal import SUMS, Journal, Shard
from ds_model.checkpoint.mapped_file import READABLE
from ds_model.checkpoint.reader import INDEX, SINGLE
from ds_model.checkpoint.transforms import Array, Matrix, blocks
from ds_model.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9
_NAME_OF = {dtype: name for name, dtype in READABLE.items()}


class _Pending(NamedTuple):
    array: Matrix
    dtype: np.dtype[np.generic]  # to be stored, not the array's

    @property
    def nbytes(self) -> int:
        return self.array.size * self.dtype.itemsize


class TensorWriter:
    """Collects tensors into shards; nothing has its final name before `finish`.

    A context manager: leaving it without `finish`, by an error too, removes what was written.
    Copies no tensor whole: numbers are rounded on their way to the file, some rows at a time.

    Args:
        directory: where to write; made if missing.
        max_shard_bytes: a shard closes before it would pass this; one larger tensor is a
            shard of its own.
        progress: called after each tensor with the number of those written.
        journal: what an earlier writer got done in the same directory, and where this one notes
            what it does; a writer that has one leaves finished shards when it is stopped, and
            `finish` writes SHA256SUMS.

    Raises:
        CheckpointError: the directory can't be made.
    """

    def __init__(
        self,
        directory: Path | str,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: Callable[[int], None] = lambda done: None,  # noqa: ARG005 - named for the reader
        journal: Journal | None = None,
    ) -> None:
        self._directory = Path(directory)
        self._journal = journal
        self._limit = max_shard_bytes
        self._progress = progress
        self._pending: dict[str, _Pending] = {}
        done = journal.shards if journal else []
        self._drafts: list[Path] = [self._directory / shard.draft for shard in done]
        self._sums: list[str] = [shard.sha256 for shard in done]
        self._done = {name for shard in done for name in shard.tensors}
        self._shard_of: dict[str, int] = {
            name: number for number, shard in enumerate(done) for name in shard.tensors
        }
        self._held = 0
        self._total = sum(shard.tensor_bytes for shard in done)
        self._written = len(self._done)
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
        """Remove drafts that were not published, but for those that the journal holds."""
        kept = (
            {self._directory / shard.draft for shard in self._journal.shards}
            if self._journal
            else ()
        )
        for draft in self._drafts:
            if draft not in kept:
                draft.unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Say whether an earlier writer has written this tensor: it needs no `add`."""
        return name in self._done

    def add(self, name: str, array: Matrix, dtype: np.dtype[np.generic] | None = None) -> None:
        """Take one tensor; writes a shard when this one does not fit into it any more.

        Args:
            name: of the tensor.
            array: not copied, and read when its shard is written: leave it as it is till then.
            dtype: float32, bfloat16 or float16, to be stored; `None` is the array's own.

        Raises:
            CheckpointError: the disk is full or not writable; a finite value that becomes
                infinite (float16 ends at 65504).
        """
        tensor = _Pending(array, dtype or array.dtype)
        if self._pending and self._held + tensor.nbytes > self._limit:
            self._write_shard()
        self._pending[name] = tensor
        self._held += tensor.nbytes
        self._shard_of[name] = len(self._drafts)
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Write the last shard and the index, then give every file its final name.

        An older checkpoint in the same directory stays readable until the new one is whole,
        unless both have shards of the same names: then there is a moment with no index,
        which readers report as a directory without weights. It never reads as a mixture.

        Raises:
            CheckpointError: as for `add`.
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
            if self._journal:
                lines = [
                    f"{found}  {name}\n" for found, name in zip(self._sums, names, strict=True)
                ]
                atomic.write(self._directory / SUMS, "".join(lines).encode())
                self._journal.close()
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
        if not self._pending and self._done:
            return  # all that was left to do was done before
        digest = hashlib.sha256() if self._journal else None
        draft = atomic.partial(self._directory / f"model-{len(self._drafts) + 1:05d}.safetensors")
        self._drafts.append(draft)
        # As safetensors orders them. Larger numbers first, so that each tensor lies at a multiple
        # of its numbers' size.
        order = sorted(self._pending.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        try:
            with draft.open("wb") as file, ThreadPoolExecutor(1) as hashing:
                header = _header(order)
                file.write(header)
                summing = hashing.submit(digest.update, header) if digest else None
                for name, tensor in order:
                    for rows in blocks(tensor.array):
                        block = _rounded(name, tensor.array[rows], tensor.dtype)
                        block = np.ascontiguousarray(block)
                        block.tofile(file)
                        if digest and summing:
                            summing.result()  # at most one block waits to be summed
                            summing = hashing.submit(
                                digest.update, block.reshape(-1).view(np.uint8).data
                            )
                    self._written += 1
                    self._progress(self._written)
        except OSError as error:
            raise CheckpointError(f"{draft} can't be written: {error}") from error
        if self._journal and digest:
            self._sums.append(digest.hexdigest())
            names = list(self._pending)
            self._journal.add(Shard(draft.name, digest.hexdigest(), names, self._held))
        self._pending, self._held = {}, 0


def _header(tensors: Iterable[tuple[str, _Pending]]) -> bytes:
    """What stands before the data, as the format's description has it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _NAME_OF[tensor.dtype],
            "shape": tensor.array.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _rounded(name: str, block: Array, dtype: np.dtype[np.generic]) -> Array:
    with np.errstate(over="ignore"):
        stored = block.astype(dtype, copy=False)
    if dtype == np.float16 and np.isinf(stored).any() and not np.isinf(block).any():
        raise CheckpointError(f"tensor {name} holds values beyond float16's 65504: use bfloat16")
    return stored
