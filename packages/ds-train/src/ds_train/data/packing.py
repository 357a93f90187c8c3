"""Packed sequences in an order that is a function of the seed and the step alone.

Sequence `i` is tokens `[i * S, i * S + S]`, S + 1 ids: S inputs and, one further, S labels.
Documents are packed without masking between them, as in the paper (section 4.1). Each pass
over the data has its own shuffle, drawn from (seed, pass). So a run that resumes needs the
step and nothing else.
"""

from functools import lru_cache

import numpy as np

from ds_train.errors import DataError


class PackedSequences:
    """Batches of packed sequences.

    Args:
        tokens: All ids `[tokens]`, any unsigned integer dtype; a memory map will do.
        sequence_length: S, tokens of input in each sequence.
        seed: Chooses the order.

    Raises:
        DataError: If there are fewer than S + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, seed: int) -> None:
        self.sequences = (len(tokens) - 1) // sequence_length
        if self.sequences < 1:
            msg = (
                f"{len(tokens)} tokens of text are too few for one sequence of "
                f"{sequence_length} and its label; give more text or a smaller sequence_length"
            )
            raise DataError(msg)
        self._tokens = tokens
        self._length = sequence_length
        self._seed = seed
        # Two: a batch may reach from the end of one pass into the next.
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def batch(self, step: int, size: int) -> np.ndarray:
        """Returns the sequences of one optimizer step, `[size, S + 1]` int32.

        Args:
            step: Optimizer step, from 0.
            size: Sequences a step, micro-batches and replicas included.
        """
        wanted = range(step * size, (step + 1) * size)
        starts = [self._order(i // self.sequences)[i % self.sequences] for i in wanted]
        rows = [self._tokens[s * self._length : (s + 1) * self._length + 1] for s in starts]
        return np.stack(rows).astype(np.int32)

    def _shuffle(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        return generator.permutation(self.sequences)
