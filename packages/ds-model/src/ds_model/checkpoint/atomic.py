"""Files that appear under their final name only once they are whole and on disk."""

import os
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of what is being written; safe to delete when no writer runs."""


def partial(path: Path) -> Path:
    """The name under which `path` is written first: hidden, in the same directory."""
    return path.with_name(f".{path.name}{PARTIAL}")


def write(path: Path, content: bytes) -> None:
    """Write `content` to `path`, replacing it in one step; on an error `path` is as before.

    Raises:
        OSError: the disk is full, or the place is not writable.
    """
    draft = partial(path)
    try:
        draft.write_bytes(content)
        publish(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def publish(draft: Path, path: Path) -> None:
    """Bring a finished `draft` (a file) to disk and give it its final name.

    Raises:
        OSError: it can't be written or renamed.
    """
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file or directory to disk.

    Raises:
        OSError: it can't be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
