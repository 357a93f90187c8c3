"""From a prompt's token ids to text in pieces: what the terminal chat writes through."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ds_serve.stopping import StopStrings

if TYPE_CHECKING:
    from ds_model import CausalLM, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Options:
    """How to write.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token; else what the logits are divided by.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the random numbers, below 2^31; None draws a new one.
        stop: strings that end the text, themselves left out.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What came since the piece before.

    Attributes:
        text: may be empty, as when a character still lacks bytes.
        tokens: number of tokens generated so far, an end token included.
        finish_reason: None except in the last piece: "stop" at an end token or a stop
            string, "length" at `max_tokens`.
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None = None


Pieces = Generator[Piece, None, None]


def write(model: CausalLM, tokenizer: Tokenizer, prompt: list[int], options: Options) -> Pieces:
    """Continue a prompt.

    Args:
        model: the model.
        tokenizer: its tokenizer, byte-level.
        prompt: token ids, at least one.
        options: how to write.

    Yields:
        Pieces; the last one, and no other, has a `finish_reason`.
    """
    ends = end_tokens(model, tokenizer)
    decoder = tokenizer.stream_decoder()
    stops = StopStrings(options.stop)
    tokens = 0
    for chunk in model.stream(
        np.array([prompt], np.int32),
        max_new_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        eos_token_id=sorted(ends),
    ):
        text = ""
        for token in chunk[0].tolist():
            tokens += 1
            if token in ends:
                rest = stops.feed(decoder.finish())
                yield Piece(text + rest + stops.flush(), tokens, "stop")
                return
            text += stops.feed(decoder.push(token))
            if stops.hit:
                yield Piece(text, tokens, "stop")
                return
        yield Piece(text, tokens)
    rest = stops.feed(decoder.finish())
    yield Piece(rest + stops.flush(), tokens, "stop" if stops.hit else "length")


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text that begins a document.

    It starts with the tokenizer's first token, if it has one: DeepSeek's models never saw a
    document without it, and `ds-train` puts it there too.

    Raises:
        ValueError: the text can't be encoded.
    """
    ids = tokenizer.encode(text, add_special_tokens=True)
    first = tokenizer.bos_token_id
    return ids if first is None or not ids or ids[0] == first else [first, *ids]


def end_tokens(model: CausalLM, tokenizer: Tokenizer) -> set[int]:
    """Return the ids that end a text, by config.json or by the tokenizer."""
    ends = set(model.config.eos_token_ids)
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}
