"""Byte-level BPE as DeepSeek-V3's (arXiv 2412.19437, section 4.1): its splits, its special tokens.

The pre-tokenizer suits many languages; numbers are cut into at most three digits. Nothing is
normalised, so every text comes back as it was.
"""

# ruff: noqa: RUF001 - the released token names are spelt with U+FF5C, not with a pipe

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from ds_model.errors import TokenizerError

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
PAD_TOKEN = "<｜▁pad▁｜>"
SPECIAL_TOKENS = (
    BOS_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
"""DeepSeek's special tokens under their released names, ids 0 to 7 in a tokenizer of ours."""

_SPLITS = (  # those of the released tokenizer.json: digits, CJK and kana, words and the rest
    r"\p{N}{1,3}",
    r"[一-龥\u3040-ゟ゠-ヿ]+",
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    show_progress: bool = False,
) -> tokenizers.Tokenizer:
    """Learn merges from `texts`; the arguments are those of `Tokenizer.train`.

    Raises:
        TokenizerError: `vocab_size` has no room for the bytes and the special tokens.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        message = (
            f"vocab_size is {vocab_size}; it must be at least {least}: 256 bytes and "
            f"{len(special_tokens)} special tokens"
        )
        raise TokenizerError(message)
    backend = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    return backend
