"""Streaming gives the text that decoding at once gives, and never half a character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from ds_model.byte_level_bpe import EOS_TOKEN
from ds_model.stream_decoder import StreamDecoder, byte_alphabet
from ds_model.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat on the mat, 世界 naïve 🙂"], 300)


def raw(token: int) -> bytes:
    return bytes([token])


def test_alphabet_is_the_library_s():
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    # GPT-2 writes a space as U+0120 and a line feed as U+010A.
    assert (alphabet["\u0120"], alphabet["\u010a"], alphabet["A"]) == (0x20, 0x0A, 0x41)


@given(st.text(min_size=1))
def test_every_piece_is_whole_characters(text):
    decoder = StreamDecoder(raw)
    pieces = [decoder.push(byte) for byte in text.encode()]
    assert decoder.finish() == ""
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)), st.booleans(), st.integers(1, 4))
def test_pieces_join_to_the_decoded_text_of_any_ids(ids, skip, step):
    decoder = TOKENIZER.stream_decoder(skip_special_tokens=skip)
    pieces = [decoder.push(ids[place : place + step]) for place in range(0, len(ids), step)]
    whole = TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert "".join([*pieces, decoder.finish()]) == whole


def test_held_back_bytes_come_out_as_one_replacement_at_the_end():
    decoder = StreamDecoder(raw)
    assert [decoder.push(byte) for byte in "世".encode()[:2]] == ["", ""]
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ord("a")) == "a"


@pytest.mark.parametrize(("skip", "shown"), [(True, ""), (False, EOS_TOKEN)])
def test_special_tokens_are_shown_on_request(skip, shown):
    decoder = TOKENIZER.stream_decoder(skip_special_tokens=skip)
    assert decoder.push(TOKENIZER.eos_token_id) == shown
