"""Tokenizer and token file of a run: made once, from training text alone."""

import pytest

from ds_train import DataError
from ds_train.data import Document
from ds_train.prepare import pack, train_tokenizer

DOCUMENTS = [
    Document("a", "the people of the union " * 20),
    Document("b", "<｜end▁of▁sentence｜> in a text is text"),
]


def test_packing_loses_nothing_and_separates_documents(tmp_path):
    tokenizer = train_tokenizer(DOCUMENTS, tmp_path, 300)
    seen = []
    file = pack(DOCUMENTS, tokenizer, tmp_path, lambda done, total: seen.append((done, total)))
    ids = file.open().tolist()
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    assert len(ends) == 2  # the name of the end token in the text did not end a document
    first, second = ids[: ends[0]], ids[ends[0] + 1 : ends[1]]
    assert first[0] == second[0] == tokenizer.bos_token_id
    assert tokenizer.decode(first[1:]) == DOCUMENTS[0].text
    assert tokenizer.decode(second[1:]) == DOCUMENTS[1].text
    total = sum(len(d.text) for d in DOCUMENTS)
    assert seen == [(total, total)]


def test_what_is_there_is_used_and_other_text_refused(tmp_path):
    tokenizer = train_tokenizer(DOCUMENTS, tmp_path, 300)
    written = (tmp_path / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    again = train_tokenizer(DOCUMENTS, tmp_path, 300)
    assert again.encode("the union") == tokenizer.encode("the union")
    assert (tmp_path / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == written
    for documents, size in ((DOCUMENTS[:1], 300), (DOCUMENTS, 301)):
        with pytest.raises(DataError, match="made from other text or of another vocab_size"):
            train_tokenizer(documents, tmp_path, size)


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(DataError, match="vocab_size is 200; it must be at least 264"):
        train_tokenizer(DOCUMENTS, tmp_path, 200)
