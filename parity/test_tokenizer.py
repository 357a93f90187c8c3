"""The tokenizer that we write is the one that `AutoTokenizer` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import transformers

from ds_model import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = (
    "My fellow citizens, in 1861 we met: 3.14159 is not 22/7.",
    "def f(x):\n    return x ** 2  # \u2248 4\n",
    "\u4f60\u597d, \u4e16\u754c! na\u00efve caf\u00e9 \U0001f680\u200d",
    "   leading, trailing   \n\n\t",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(TEXTS * 3, vocab_size=400).save_pretrained(path)
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_and_text(folder: Path, text: str) -> None:
    mine = Tokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = mine.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert mine.decode(ids) == text == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_same_special_tokens(folder: Path) -> None:
    mine = Tokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(mine, role) == getattr(theirs, role) is not None


def test_same_chat(folder: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who met?"},
        {"role": "assistant", "content": "We did."},
        {"role": "user", "content": "When?"},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    mine = Tokenizer.from_pretrained(folder)
    assert mine.decode(mine.apply_chat_template(messages), skip_special_tokens=False) == expected
    ids = theirs.encode(expected, add_special_tokens=False)
    assert mine.apply_chat_template(messages) == ids


def test_transformers_writes_what_we_read(folder: Path, tmp_path: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    mine, again = Tokenizer.from_pretrained(folder), Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == mine.encode(text)
    assert again.eos_token_id == mine.eos_token_id
