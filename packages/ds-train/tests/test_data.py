"""Documents, files, the token file and the order of packed sequences."""

import json
import lzma
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_train import DataError
from ds_train.data import (
    Document,
    PackedSequences,
    count_bytes,
    hold_out,
    open_token_file,
    read_files,
    state_of_the_union,
    write_token_file,
)


def test_the_corpus_is_whole_and_in_order_of_time():
    documents = state_of_the_union()
    years = [int(d.name[:4]) for d in documents]
    assert len(documents) == 233
    assert (years[0], years[-1]) == (1790, 2021)
    assert years == sorted(years)
    packed = resources.files("ds_train.data") / "sotu" / "sotu.txt.xz"
    raw = lzma.decompress(packed.read_bytes()).decode()
    # Nothing but the white space between addresses is lost.
    squeezed = "".join("".join(d.text for d in documents).split())
    assert squeezed == "".join(raw.split())
    # Lincoln, December 1862.
    (address,) = [d.text for d in documents if d.name == "1862_abraham_lincoln_r"]
    assert "we can not escape history" in address


@given(st.lists(st.text(min_size=1), min_size=2, max_size=9), st.floats(0, 0.95))
def test_held_out_documents_are_the_last(texts, fraction):
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    training, held = hold_out(documents, fraction)
    assert training + held == documents
    assert training
    if len(training) > 1:  # enough was held out, and one document less would not be
        total = sum(map(len, texts))
        assert sum(len(d.text) for d in held) >= fraction * total


def test_a_lone_document_is_cut_at_a_line_end():
    ((head,), (tail,)) = hold_out([Document("book", "one\ntwo\nthree\nfour\n")], 0.4)
    assert head.text + tail.text == "one\ntwo\nthree\nfour\n"
    assert head.text.endswith("\n")


def test_files_are_read_in_order_and_binaries_counted(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "secret.txt").write_text("hidden")
    (tmp_path / "b" / "two.txt").write_text("zwei äöü")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.py").write_text("print()")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    report = read_files([tmp_path], [".txt"])
    assert [d.text for d in report.documents] == ["one", "zwei äöü"]
    assert {path.name for path in report.skipped} == {"image.txt", "latin.txt"}
    assert [path.name for path in report.empty] == ["empty.txt"]
    assert count_bytes(report.documents) == 3 + 11
    assert len(read_files([tmp_path]).documents) == 3


def test_no_text_is_one_line(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"no text to train on .* 1 binary") as caught:
        read_files([tmp_path])
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read_files([tmp_path / "missing"])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (70_000, "uint32")])
def test_token_file_round_trip(tmp_path, vocab_size, dtype):
    documents = [[5, 6, 7], [], [vocab_size - 1]]
    written = write_token_file(tmp_path / "t", documents, vocab_size, 0, 1)
    found = open_token_file(tmp_path / "t")
    assert found == written
    assert found.dtype == dtype
    assert found.open().tolist() == [0, 5, 6, 7, 1, 0, 1, 0, vocab_size - 1, 1]
    assert not list(tmp_path.rglob("*.part"))


def test_a_token_file_cut_short_is_named(tmp_path):
    write_token_file(tmp_path, [[1, 2, 3]], 10, None, None)
    (tmp_path / "tokens.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="2 bytes, should be 6"):
        open_token_file(tmp_path)
    (tmp_path / "tokens.json").write_text(json.dumps({"dtype": "uint16"}))
    with pytest.raises(DataError, match="not a token file"):
        open_token_file(tmp_path)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(DataError, match="token id 10 outside 0 to 9"):
        write_token_file(tmp_path, [[1, 10]], 10, None, None)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 3))
def test_one_pass_sees_every_token_once(length, size, seed):
    tokens = np.arange(50, dtype=np.uint16)
    packed = PackedSequences(tokens, length, seed)
    steps = -(-packed.sequences // size)
    rows = np.concatenate([packed.batch(step, size) for step in range(steps)])
    inputs = rows[: packed.sequences, :-1]
    assert sorted(inputs.ravel()) == list(range(packed.sequences * length))
    np.testing.assert_array_equal(rows[:, 1:], rows[:, :-1] + 1)  # labels follow inputs


def test_the_order_depends_on_seed_and_step_alone():
    tokens = np.arange(4000, dtype=np.uint16)
    packed = PackedSequences(tokens, 8, seed=1)
    forwards = [packed.batch(step, 16) for step in range(80)]  # 2.5 passes
    again = PackedSequences(tokens, 8, seed=1)
    for step in reversed(range(80)):
        np.testing.assert_array_equal(again.batch(step, 16), forwards[step])
    other = PackedSequences(tokens, 8, seed=2).batch(0, 16)
    assert not np.array_equal(other, forwards[0])
    # A pass has its own shuffle.
    first = PackedSequences(tokens, 8, seed=1).batch(0, 499)
    second = PackedSequences(tokens, 8, seed=1).batch(1, 499)
    assert not np.array_equal(first, second)
    assert set(first[:, 0]) == set(second[:, 0])


def test_too_little_text_is_one_line():
    with pytest.raises(DataError, match="8 tokens of text are too few for one sequence of 8"):
        PackedSequences(np.arange(8), 8, seed=0)
