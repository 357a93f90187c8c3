"""How good a model is: bits per byte on held-out documents, beside three yardsticks."""

from ds_train.evaluation.bits_per_byte import BitsPerByte, bits_per_byte
from ds_train.evaluation.ngram import ByteNgram
from ds_train.evaluation.yardsticks import (
    ngram_bits_per_byte,
    unigram_bits_per_byte,
    xz_bits_per_byte,
)

__all__ = [
    "BitsPerByte",
    "ByteNgram",
    "bits_per_byte",
    "ngram_bits_per_byte",
    "unigram_bits_per_byte",
    "xz_bits_per_byte",
]
