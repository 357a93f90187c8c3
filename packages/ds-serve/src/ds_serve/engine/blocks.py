"""The blocks of the latent cache: who holds them, and which hold text that may come again.

A block is free, or held by one or more sequences. A full one has a *key*, a hash of all tokens up
to its end, under which a later sequence that begins alike finds it (arXiv 2312.07104), also when
it has become free meanwhile: free blocks are given out again the least recently used first.

Everything here is plain Python; nothing knows of tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

ROOT = b""


class NoBlockError(RuntimeError):
    """Every block is held."""


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of a block.

    Args:
        parent: key of the block before; `ROOT` for the first.
        tokens: those that the block holds.
    """
    return blake2b(parent + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


class BlockPool:
    """A fixed number of blocks.

    Args:
        blocks: how many there are.

    Attributes:
        blocks: how many there are.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._holders = [0] * blocks
        self._keys: list[bytes | None] = [None] * blocks
        self._by_key: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))

    @property
    def free(self) -> int:
        """Blocks that nobody holds, those with text that may come again included."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that can be found by a key."""
        return len(self._by_key)

    def shared(self, block: int) -> bool:
        """Say whether more than one sequence holds a block."""
        return self._holders[block] > 1

    def take(self) -> int:
        """Hold a block that was free, and forget what it held.

        Raises:
            NoBlockError: none is free.
        """
        if not self._free:
            raise NoBlockError(f"all {self.blocks} blocks are held")
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Hold a block that others hold, or that can be found."""
        if self._holders[block] == 0:
            del self._free[block]
        self._holders[block] += 1

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks with these keys up to the first that there is not; holds none."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def publish(self, block: int, key: bytes) -> None:
        """Let a full block be found; where another has the key already, that one stays."""
        if key not in self._by_key and self._keys[block] is None:
            self._by_key[key] = block
            self._keys[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back; of those that become free the last is used up first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)  # nothing to lose

    def forget_all(self) -> None:
        """Let no block be found any more."""
        for block in list(self._by_key.values()):
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise if the books do not balance: what tests call after each step.

        Args:
            tables: the blocks that each sequence holds.

        Raises:
            AssertionError: a block is lost, or held by more or fewer than claim it.
        """
        claimed = [0] * self.blocks
        for table in tables:
            for block in table:
                claimed[block] += 1
        if claimed != self._holders:
            raise AssertionError(f"held {self._holders}, claimed {claimed}")
        if set(self._free) != {i for i, n in enumerate(claimed) if n == 0}:
            raise AssertionError(f"free {list(self._free)}, claimed {claimed}")
        if any(self._keys[block] != key for key, block in self._by_key.items()):
            raise AssertionError("a block is found by a key that is not its own")
