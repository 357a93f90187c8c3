"""What a document is, and which documents are held out of training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ds_train.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: Where it comes from: a path, or a name within a corpus.
        text: Its characters.
    """

    name: str
    text: str


def hold_out(
    documents: Sequence[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """Splits off the last documents, which nothing is ever trained on, the tokenizer included.

    The fewest last documents that hold at least `fraction` of the characters are held out.
    A lone document is cut at the last line end before its last `fraction`.

    Args:
        documents: In order (the shipped corpus: of time; files: of their paths).
        fraction: Part of the characters to hold out, 0 to below 1.

    Returns:
        Training documents and held-out documents.

    Raises:
        DataError: If nothing would be left to train on.
    """
    if not documents:
        msg = "no text to train on: 0 documents"
        raise DataError(msg)
    if fraction == 0:
        return list(documents), []
    if len(documents) == 1:
        return _cut(documents[0], fraction)
    want = fraction * sum(len(d.text) for d in documents)
    held, size = 0, 0
    while size < want and held < len(documents) - 1:
        held += 1
        size += len(documents[-held].text)
    return list(documents[:-held]), list(documents[-held:])


def _cut(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    at = int(len(text) * (1 - fraction))
    at = text.rfind("\n", 0, at) + 1 or at
    if at == 0:
        msg = f"{document.name}: too short to hold out {fraction:.0%} of it; give more text"
        raise DataError(msg)
    head = Document(document.name, text[:at])
    tail = Document(f"{document.name} (held-out end)", text[at:])
    return [head], [tail]


def count_bytes(documents: Iterable[Document]) -> int:
    """Returns the UTF-8 size of the documents' texts, in bytes."""
    return sum(len(document.text.encode()) for document in documents)
