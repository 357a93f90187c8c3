"""From documents to a tokenizer and a token file, once for each output folder."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ds_model import Tokenizer
from ds_train.data import Document, TokenFile, open_token_file, write_token_file
from ds_train.errors import DataError

Progress = Callable[[int, int], None]
_CHARACTERS_AT_ONCE = 1 << 21


def train_tokenizer(documents: Sequence[Document], out: Path, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE under `out/tokenizer`, or read the one that is there.

    Args:
        documents: Training documents; never the held-out ones.
        out: Folder of the run.
        vocab_size: Of the tokenizer, special tokens and bytes included.

    Raises:
        DataError: If the folder holds a tokenizer of other text or another size, or if
            `vocab_size` is too small for the bytes.
    """
    folder, made_from = out / "tokenizer", out / "tokenizer" / "made_from.json"
    origin = {"text_sha256": _digest(documents), "vocab_size": vocab_size}
    if made_from.exists():
        if json.loads(made_from.read_text(encoding="utf-8")) != origin:
            msg = f"{folder}: made from other text or of another vocab_size; choose another --out"
            raise DataError(msg)
        return Tokenizer.from_pretrained(folder)
    try:
        # No chat template: what pre-training makes continues text and has learnt no conversation.
        texts = (d.text for d in documents)
        tokenizer = Tokenizer.train(texts, vocab_size, chat_template=None)
    except ValueError as error:
        raise DataError(str(error)) from error
    tokenizer.save_pretrained(folder)
    part = made_from.with_suffix(".part")
    part.write_text(json.dumps(origin) + "\n", encoding="utf-8")
    part.replace(made_from)
    return tokenizer


def pack(
    documents: Sequence[Document], tokenizer: Tokenizer, out: Path, progress: Progress
) -> TokenFile:
    """Write the token file under `out/tokens`, or open the one that is there.

    Args:
        documents: As `train_tokenizer` got them.
        tokenizer: What it returned.
        out: Folder of the run.
        progress: Called with characters done and in all.
    """
    folder = out / "tokens"
    if (folder / "tokens.json").exists():
        return open_token_file(folder)
    return write_token_file(
        folder,
        _encoded(documents, tokenizer, progress),
        tokenizer.vocab_size,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


def _encoded(
    documents: Sequence[Document], tokenizer: Tokenizer, progress: Progress
) -> Iterator[list[int]]:
    total, done = sum(len(d.text) for d in documents), 0
    group: list[str] = []
    for index, document in enumerate(documents):
        group.append(document.text)
        if sum(map(len, group)) >= _CHARACTERS_AT_ONCE or index == len(documents) - 1:
            # A special token's name in someone's text is text, not the end of a document.
            yield from tokenizer.encode_batch(group, split_special_tokens=True)
            done += sum(map(len, group))
            progress(done, total)
            group = []


def _digest(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        raw = document.text.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()
