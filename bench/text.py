"""The quickstart's text, for runs that differ from it in one thing."""

from __future__ import annotations

from pathlib import Path

from ds_model import Tokenizer
from ds_train.data import Document, TokenFile, hold_out, state_of_the_union
from ds_train.prepare import pack, train_tokenizer
from ds_train.quickstart import quickstart_config


def packed(work: Path) -> tuple[Tokenizer, TokenFile, list[Document]]:
    """Return the tokenizer and the training tokens, made once, and the documents held out.

    Args:
        work: the folder that they are made in.
    """
    config = quickstart_config()
    training, held_out = hold_out(state_of_the_union(), config.data.held_out)
    tokenizer = train_tokenizer(training, work, config.model.build().vocab_size)
    return tokenizer, pack(training, tokenizer, work, lambda *_: None), list(held_out)
