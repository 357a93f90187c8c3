"""Text in pieces against `CausalLM.generate` and `Tokenizer.decode`."""

import numpy as np
import pytest

from conftest import PROMPT
from ds_model import Tokenizer
from ds_model.tokenizer import BOS_TOKEN
from ds_serve.writing import Options, encode_text, end_tokens, write


@pytest.fixture
def prompt(tokenizer):
    return tokenizer.encode(PROMPT)


def gather(pieces):
    pieces = list(pieces)
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    return "".join(p.text for p in pieces), pieces[-1].tokens, pieces[-1].finish_reason


def test_greedy_text_is_that_of_generate(model, tokenizer, prompt, greedy):
    ids = greedy(prompt, 24)
    assert len(set(ids.tolist())) > 4  # a text that could be told from a wrong one
    expected = tokenizer.decode(ids)
    assert gather(write(model, tokenizer, prompt, Options(24))) == (expected, 24, "length")


def test_same_seed_same_text_and_another_seed_another(model, tokenizer, prompt):
    def text(seed):
        return gather(write(model, tokenizer, prompt, Options(24, 1.0, 0.9, seed)))[0]

    assert text(3) == text(3)
    assert len({text(seed) for seed in range(4)}) > 1


def test_end_token_ends_and_is_not_text(model, tokenizer, prompt, greedy, monkeypatch):
    ids = greedy(prompt, 24).tolist()
    at = 9
    place = ids.index(ids[at])
    monkeypatch.setattr(model, "config", model.config.replace(eos_token_id=ids[at]))
    expected = tokenizer.decode(ids[:place])
    assert gather(write(model, tokenizer, prompt, Options(24))) == (expected, place + 1, "stop")


def test_end_tokens_are_the_configs_and_the_tokenizers(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "config", model.config.replace(eos_token_id=[5, 6]))
    assert end_tokens(model, tokenizer) == {5, 6, tokenizer.eos_token_id}


@pytest.mark.parametrize("length", [1, 3, 7])
def test_stop_string_cuts_wherever_tokens_end(model, tokenizer, prompt, greedy, length):
    ids = greedy(prompt, 24)
    full = tokenizer.decode(ids)
    for start in range(2, 16, 3):
        stop = full[start : start + length]
        text, tokens, reason = gather(write(model, tokenizer, prompt, Options(24, stop=(stop,))))
        assert (text, reason) == (full[: full.index(stop)], "stop")
        assert stop in tokenizer.decode(ids[:tokens])
        assert stop not in tokenizer.decode(ids[: tokens - 1])


class Reciting:
    """A stand-in for the model that gives set tokens in chunks of a set size."""

    def __init__(self, ids, size, config):
        self.chunks = [np.array([ids[i : i + size]]) for i in range(0, len(ids), size)]
        self.config = config

    def stream(self, *_, **__):
        yield from self.chunks


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("stop", [(), ("🙂",), ("café",), ("s!",)], ids=str)
def test_characters_arrive_whole(model, tokenizer, size, stop):
    said = "Naïve 🙂 café, 日本 citizens!"
    reciting = Reciting(tokenizer.encode(said), size, model.config)
    pieces = list(write(reciting, tokenizer, [0], Options(99, stop=stop)))
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)
    assert "".join(piece.text for piece in pieces) == (
        said.split(stop[0], maxsplit=1)[0] if stop else said
    )


def test_an_end_token_shows_what_was_held_back(model, tokenizer):
    ids = [*tokenizer.encode("citizens E"), tokenizer.eos_token_id, *tokenizer.encode("more")]
    pieces = list(write(Reciting(ids, 3, model.config), tokenizer, [0], Options(99, stop=("END",))))
    assert "".join(piece.text for piece in pieces) == "citizens E"
    assert pieces[-1].finish_reason == "stop"


def test_a_document_begins_with_the_first_token_once(tokenizer):
    first, ids = tokenizer.bos_token_id, tokenizer.encode(PROMPT)
    assert encode_text(tokenizer, PROMPT) == [first, *ids]
    assert encode_text(tokenizer, BOS_TOKEN + PROMPT) == [first, *ids]
    assert encode_text(tokenizer, "") == []
    nameless = Tokenizer.train([PROMPT], 300, special_tokens=())
    assert encode_text(nameless, PROMPT) == nameless.encode(PROMPT)
