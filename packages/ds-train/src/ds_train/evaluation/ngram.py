"""A back-off n-gram model over bytes with Witten-Bell smoothing.

    P_k(c | h) = (N(h c) + T(h) P_{k-1}(c | h')) / (N(h) + T(h))

`h` is the last k-1 bytes, `h'` drops the oldest of them, `N` counts in the training text, and
`T(h)` is the number of different bytes seen after `h`. An unseen context backs off entirely;
below the unigrams stands the uniform distribution over 256 bytes. So every distribution sums
to 1 (Witten and Bell 1991, method C, in its interpolated form).

An n-gram is one integer, eight bits a byte, and a count table is two sorted arrays: 10 MB of
text take seconds.
"""

from collections.abc import Sequence

import numpy as np

_PAD = b"\0"


class ByteNgram:
    """The model, counted from training text.

    Args:
        training: Documents; each starts from an empty context.
        order: Longest n-gram, 1 to 7 bytes.

    Raises:
        ValueError: If `order` is outside 1 to 7 (an n-gram is kept in 64 bits).
    """

    def __init__(self, training: Sequence[bytes], order: int = 5) -> None:
        if not 1 <= order <= 7:
            msg = f"order must be 1 to 7, got {order}"
            raise ValueError(msg)
        self.order = order
        codes = self._codes(training)
        # One table for each length k: n-grams with their counts, contexts with N and T.
        self._tables = []
        for k in range(1, order + 1):
            grams, counts = _count(codes & _mask(k))
            heads = grams >> np.uint64(8)
            first = np.flatnonzero(np.r_[True, heads[1:] != heads[:-1]])
            totals = np.add.reduceat(counts, first)
            kinds = np.diff(np.r_[first, len(heads)])
            self._tables.append((grams, counts, heads[first], totals, kinds))

    def probabilities(self, context: bytes) -> np.ndarray:
        """Returns P(next byte | context), `[256]` float64, which sums to 1."""
        window = (_PAD * self.order + context)[len(context) + 1 :]
        head = np.uint64(int.from_bytes(window, "big"))
        return self._probability((head << np.uint64(8)) + np.arange(256, dtype=np.uint64))

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Returns the mean of `-log2 P` over all bytes of the documents."""
        return float(-np.log2(self._probability(self._codes(documents))).mean())

    def _codes(self, documents: Sequence[bytes]) -> np.ndarray:
        """The last `order` bytes at each position, as integers `[bytes]` uint64."""
        pad = _PAD * (self.order - 1)
        stream = np.frombuffer(pad + pad.join(documents), np.uint8)
        codes = np.zeros(len(stream) - self.order + 1, np.uint64)
        for lag in range(self.order):
            codes = (codes << np.uint64(8)) + stream[lag : lag + len(codes)]
        keep = np.ones(len(codes), bool)
        end = 0
        for text in documents[:-1]:
            end += len(text)
            keep[end : end + len(pad)] = False  # the padding of the next document
            end += len(pad)
        return codes[keep]

    def _probability(self, codes: np.ndarray) -> np.ndarray:
        probability = np.full(len(codes), 1 / 256)
        for k, (grams, counts, heads, totals, kinds) in enumerate(self._tables, start=1):
            gram = codes & _mask(k)
            n_gram = _look_up(grams, counts, gram)
            head = gram >> np.uint64(8)
            n_head, t_head = _look_up(heads, totals, head), _look_up(heads, kinds, head)
            seen = n_head > 0
            mixed = (n_gram + t_head * probability) / np.maximum(n_head + t_head, 1)
            probability = np.where(seen, mixed, probability)
        return probability


def _mask(length: int) -> np.uint64:
    return np.uint64((1 << (8 * length)) - 1)


def _count(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ordered = np.sort(codes)
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    return ordered[first], np.diff(np.r_[first, len(ordered)])


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
