"""What a conversion has got done, so that it goes on after a kill; and checksums of files."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_model.checkpoint import atomic
from ds_model.errors import CheckpointError

SUMS = "SHA256SUMS"
"""A line for each file, as `sha256sum` writes and checks them."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@dataclass(frozen=True)
class Shard:
    """A shard that is written.

    Attributes:
        draft: name of its file in the directory.
        sha256: of the file.
        tensors: names of what it holds.
        tensor_bytes: of its tensors, header not counted.
    """

    draft: str
    sha256: str
    tensors: list[str]
    tensor_bytes: int


class Journal:
    """The shards that are done, in a file of the directory that is being written.

    Args:
        directory: of the conversion, not yet under its final name.
        origin: what decides the conversion's result; shards of another one are removed, and so
            are those that are not as they were written.

    Attributes:
        shards: those on disk, whole: each was checked against its SHA-256.
    """

    NAME = ".journal.json"

    def __init__(self, directory: Path, origin: dict[str, Any]) -> None:
        self._directory = directory
        self._path = directory / self.NAME
        self._origin = json.loads(json.dumps(origin))
        self.shards = self._read()
        whole = {shard.draft for shard in self.shards}
        for draft in directory.glob(atomic.partial(directory / "*").name):
            if draft.name not in whole:
                draft.unlink()

    def add(self, shard: Shard) -> None:
        """Note a shard that is written, and bring both to disk.

        Raises:
            OSError: the disk is full, or not writable.
        """
        atomic.sync(self._directory / shard.draft)
        self.shards.append(shard)
        content = {"origin": self._origin, "shards": [asdict(done) for done in self.shards]}
        atomic.write(self._path, json.dumps(content).encode())

    def close(self) -> None:
        """Forget: the conversion is done."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> list[Shard]:
        """The shards in order, up to the first that is not as it was written."""
        try:
            content = json.loads(self._path.read_bytes())
            if content["origin"] != self._origin:
                return []
            found = [Shard(**shard) for shard in content["shards"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        whole = []
        for shard in found:
            path = self._directory / shard.draft
            if not path.is_file() or sha256(path) != shard.sha256:
                break
            whole.append(shard)
        return whole


def sha256(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(directory: Path, progress: Progress) -> int:
    """Hold a directory's files to its SHA256SUMS.

    Args:
        directory: of a checkpoint.
        progress: told how many files are done, and how many there are.

    Returns:
        How many were checked; 0 if there is no such list.

    Raises:
        CheckpointError: a file is missing or differs; the list can't be read.
    """
    listed = directory / SUMS
    if not listed.is_file():
        return 0
    try:
        lines = listed.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{listed} can't be read: {error}") from error
    for done, line in enumerate(lines):
        progress(done, len(lines))
        wanted, _, name = line.partition("  ")
        if len(wanted) != 64 or not name or Path(name).name != name:
            raise CheckpointError(f"{listed} has a line that is no checksum: {line[:80]!r}")
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{SUMS} lists {name}, which is not in {directory}")
        found = sha256(path)
        if found != wanted.lower():
            message = (
                f"{path} has SHA-256 {found[:12]}..., {SUMS} says {wanted[:12]}...: get it again"
            )
            raise CheckpointError(message)
    return len(lines)
