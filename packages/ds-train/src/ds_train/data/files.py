"""Reading anyone's text or code: files, and directories with everything below them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ds_train.data.documents import Document
from ds_train.errors import DataError


@dataclass
class FileReport:
    """What reading a set of paths came to.

    Attributes:
        documents: One for each file read, in order of the arguments and of path below them.
        skipped: Files left out because they are binary or not UTF-8.
        empty: Files left out because nothing but white space is in them.
    """

    documents: list[Document] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)


def read_files(paths: Iterable[str | Path], suffixes: Sequence[str] = ()) -> FileReport:
    """Reads text files; a file is a document.

    A directory is read with all below it, in order of path, without hidden files and
    folders. A file that holds a zero byte or is not UTF-8 is skipped and counted.

    Args:
        paths: Files and directories.
        suffixes: Which files of a directory to take, as in `[".txt", ".py"]`; all if empty.

    Returns:
        The documents and what was left out.

    Raises:
        DataError: If a path does not exist or no document is left.
    """
    places = [Path(path) for path in paths]
    report = FileReport()
    for path in places:
        if not path.exists():
            msg = f"{path}: no such file or directory"
            raise DataError(msg)
        for file in _files_of(path, suffixes):
            _read_one(file, report)
    if not report.documents:
        names = ", ".join(map(str, places)) or "no paths given"
        only = f" with suffix {' or '.join(suffixes)}" if suffixes else ""
        msg = (
            f"no text to train on in {names}{only}: {len(report.skipped)} binary or non-UTF-8 "
            f"files skipped, {len(report.empty)} empty"
        )
        raise DataError(msg)
    return report


def _files_of(path: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        wanted = not suffixes or file.suffix in suffixes
        if wanted and not hidden and file.is_file():
            yield file


def _read_one(file: Path, report: FileReport) -> None:
    try:
        raw = file.read_bytes()
    except OSError as error:
        msg = f"{file}: cannot be read ({error.strerror})"
        raise DataError(msg) from error
    if b"\0" in raw:
        report.skipped.append(file)
        return
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        report.skipped.append(file)
        return
    if text.strip():
        report.documents.append(Document(str(file), text))
    else:
        report.empty.append(file)
