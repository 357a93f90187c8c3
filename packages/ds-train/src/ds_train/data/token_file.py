"""Tokens on disk: one flat array of token ids, memory-mapped, with its description beside it.

`tokens.bin` holds the documents one after another, each as `[BOS] tokens [EOS]`, in
little-endian uint16 (vocabularies up to 65,536) or uint32. `tokens.json` says what it is.
Both are written under a temporary name and renamed; the description comes last, so a token
file with a description is complete.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ds_train.errors import DataError


@dataclass(frozen=True)
class TokenFile:
    """A finished token file.

    Attributes:
        path: Its folder.
        dtype: `uint16` or `uint32`.
        tokens: Number of ids, separators included.
        documents: Number of documents.
        sha256: Checksum of the ids; with it a run knows that it resumes on the same data.
    """

    path: Path
    dtype: str
    tokens: int
    documents: int
    sha256: str

    def open(self) -> np.ndarray:
        """Returns the ids `[tokens]`, memory-mapped, read-only."""
        return np.memmap(self.path / "tokens.bin", dtype=self.dtype, mode="r")


def write_token_file(
    path: Path,
    documents: Iterable[list[int]],
    vocab_size: int,
    bos_token_id: int | None,
    eos_token_id: int | None,
) -> TokenFile:
    """Writes token ids with document separators.

    Args:
        path: Folder to write to; made if missing.
        documents: Token ids of each document, without separators.
        vocab_size: Size of the vocabulary, which chooses the dtype.
        bos_token_id: Put before each document unless None.
        eos_token_id: Put after each document unless None.

    Returns:
        The finished file.

    Raises:
        DataError: If an id is outside the vocabulary.
        OSError: If the disk is full or the folder cannot be written.
    """
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    path.mkdir(parents=True, exist_ok=True)
    before = [] if bos_token_id is None else [bos_token_id]
    after = [] if eos_token_id is None else [eos_token_id]
    digest, tokens, count = hashlib.sha256(), 0, 0
    part = path / "tokens.bin.part"
    with part.open("wb") as file:
        for ids in documents:
            row = np.asarray([*before, *ids, *after], dtype=np.int64)
            if row.size and not 0 <= row.min() <= row.max() < vocab_size:
                msg = f"document {count}: token id {row.max()} outside 0 to {vocab_size - 1}"
                raise DataError(msg)
            raw = row.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            digest.update(raw)
            file.write(raw)
            tokens, count = tokens + row.size, count + 1
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / "tokens.bin")
    done = TokenFile(path, dtype, tokens, count, digest.hexdigest())
    described = {key: value for key, value in asdict(done).items() if key != "path"}
    part = path / "tokens.json.part"
    part.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    part.replace(path / "tokens.json")
    return done


def open_token_file(path: Path) -> TokenFile:
    """Opens what `write_token_file` wrote, checking that the array has the promised size.

    Raises:
        DataError: If it is missing, not finished, or of another size than described.
    """
    try:
        described = json.loads((path / "tokens.json").read_text(encoding="utf-8"))
        found = TokenFile(path=path, **described)
        size = (path / "tokens.bin").stat().st_size
    except (OSError, ValueError, TypeError) as error:
        msg = f"{path}: not a token file ({error}); remove it to have it written again"
        raise DataError(msg) from error
    want = found.tokens * np.dtype(found.dtype).itemsize
    if size != want:
        msg = f"{path}/tokens.bin: {size} bytes, should be {want}; remove {path} to write it again"
        raise DataError(msg)
    return found
