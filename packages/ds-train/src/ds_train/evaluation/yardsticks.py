"""Three compressors that any language model should beat, in bits per byte on the same bytes.

Each sees the training text and then codes the held-out text:

- byte unigrams: byte frequencies of the training text, plus one count for each of 256 bytes;
- `xz -9`: the size of training and held-out text compressed together, minus that of the
  training text alone (preset 9: a window of 64 MiB);
- a back-off 5-gram over bytes: see `ds_train.evaluation.ngram`.
"""

import lzma
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ds_train.evaluation.ngram import ByteNgram


def unigram_bits_per_byte(training: Sequence[bytes], held_out: Sequence[bytes]) -> float:
    """Returns the cross-entropy of the held-out bytes under add-one byte frequencies."""
    counts = np.ones(256)
    for text in training:
        counts += np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    bits = -np.log2(counts / counts.sum())
    seen = np.bincount(np.frombuffer(b"".join(held_out), np.uint8), minlength=256)
    return float((bits * seen).sum() / seen.sum())


def xz_bits_per_byte(training: Sequence[bytes], held_out: Sequence[bytes]) -> float:
    """Returns what the held-out bytes add to an `xz -9` file of the training text.

    Documents are joined by line ends, which count as neither text.
    """
    before = b"\n".join(training) + b"\n"
    held = b"\n".join(held_out)
    # lzma lets other threads run: two cores halve the wait.
    with ThreadPoolExecutor(max_workers=2) as pool:
        alone, both = pool.map(
            lambda text: len(lzma.compress(text, preset=9)), [before, before + held]
        )
    return 8 * (both - alone) / sum(map(len, held_out))


def ngram_bits_per_byte(training: Sequence[bytes], held_out: Sequence[bytes]) -> float:
    """Returns the cross-entropy of the held-out bytes under the back-off 5-gram."""
    return ByteNgram(training, order=5).bits_per_byte(held_out)
