"""llama.cpp through llama-cpp-python's plain bindings, on a GGUF file of the same weights.

`float32` and `bfloat16` files hold those types; `int8` is Q8_0. Sequences are decoded as one batch,
as its server does. Its default is flash attention on a 16-bit cache, whatever the weights are; the
other way is plain attention, on a float32 cache where the weights are float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import llama_cpp as cpp
import numpy as np

from bench.tasks import Precision, Task
from bench.workers.worker import Run, Timed, Worker, main

MICRO_BATCH = 512  # tokens of one pass over a prompt, as by default


class LlamaCpp(Worker):
    """One GGUF file; a context for each task."""

    def __init__(self, model: Path, precision: Precision, threads: int, *, thorough: bool) -> None:
        super().__init__(model, precision, threads, thorough=thorough)
        cpp.llama_backend_init()
        self._quiet = cpp.llama_log_callback(lambda *_: None)  # kept: C calls it later
        cpp.llama_log_set(self._quiet, None)
        file = model / f"{precision}.gguf"
        wanted = cpp.llama_model_default_params()
        # Where there is a matrix unit, its copy of whole-number weights ends the process: an assert
        # on the experts' product.
        wanted.use_extra_bufts = precision not in ("int8", "int4") or not has_matrix_unit()
        self._lm = cpp.llama_model_load_from_file(str(file).encode(), wanted)
        if not self._lm:
            raise RuntimeError(f"llama.cpp does not load {file.name}")

    def versions(self) -> dict[str, str]:
        """Return the binding's, which pins llama.cpp's."""
        return {"llama-cpp-python": version("llama-cpp-python")}

    def vocab_size(self) -> int:
        """Return how many tokens the model knows."""
        return cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self._lm))

    def modes(self, task: Task) -> dict[str, Callable[[], Run]]:
        """Return its two kinds of attention, to prefill and to decode; it trains nothing here."""
        ways = {"prefill": self._prefill, "decode": self._decode}
        if task.kind not in ways:
            return {}
        return {
            "flash attention": lambda: ways[task.kind](task, flash=True),
            "plain attention": lambda: ways[task.kind](task, flash=False),
        }

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the last positions' logits `[B, V]`."""
        with self._sequences(len(ids), ids.shape[1]) as sequences:
            return sequences.feed(ids, 0)

    def every_logits(self, ids: np.ndarray) -> np.ndarray:
        """Return all positions' logits `[S, V]`."""
        sequences = self._context(1, len(ids), flash=False)
        try:
            return sequences.feed(ids[None], 0, every=True)
        finally:
            sequences.close()

    def greedy(self, ids: np.ndarray, new: int) -> np.ndarray:
        """Return the best next tokens `[B, new]`, through the cache."""
        with self._sequences(len(ids), ids.shape[1] + new) as sequences:
            found = [sequences.feed(ids, 0).argmax(-1)]
            for position in range(ids.shape[1], ids.shape[1] + new - 1):
                found.append(sequences.feed(found[-1][:, None], position).argmax(-1))
        return np.stack(found, axis=1)

    @contextmanager
    def _sequences(self, count: int, length: int) -> Iterator[Sequences]:
        made = self._context(count, length, flash=True)
        try:
            yield made
        finally:
            made.close()

    def _context(self, count: int, length: int, *, flash: bool) -> Sequences:
        wide = not flash and self.precision == "float32"
        return Sequences(
            self._lm, count, length, self.threads, self.vocab_size(), flash=flash, wide=wide
        )

    def _prefill(self, task: Task, *, flash: bool) -> Run:
        ids = task.ids(self.vocab_size())
        sequences = self._context(task.batch, task.length, flash=flash)

        def run() -> Timed:
            sequences.clear()
            start = time.perf_counter()
            sequences.feed(ids, 0).argmax(-1)
            return Timed(time.perf_counter() - start, task.tokens)

        return run

    def _decode(self, task: Task, *, flash: bool) -> Run:
        room = task.length + task.new
        sequences = self._context(task.batch, room, flash=flash)
        first = sequences.feed(task.ids(self.vocab_size()), 0).argmax(-1)

        def run() -> Timed:
            sequences.clear(task.length)
            token = first
            start = time.perf_counter()
            for position in range(task.length, room):
                token = sequences.feed(token[:, None], position).argmax(-1)
            return Timed(time.perf_counter() - start, task.tokens)

        return run


def has_matrix_unit() -> bool:
    """Say whether this is an x86 processor with AMX."""
    known = Path("/proc/cpuinfo")
    return known.exists() and "amx_int8" in known.read_text(encoding="ascii", errors="replace")


class Sequences:
    """A context with one cache for each of several sequences of one length.

    Args:
        model: of llama.cpp.
        count: of sequences.
        length: the longest.
        threads: for prompts and for single tokens.
        vocab: tokens that the model knows.
        flash: fused attention.
        wide: caches of float32.
    """

    def __init__(
        self,
        model: object,
        count: int,
        length: int,
        threads: int,
        vocab: int,
        *,
        flash: bool,
        wide: bool,
    ) -> None:
        self._count, self._vocab = count, vocab
        wanted = cpp.llama_context_default_params()
        wanted.n_ctx = count * length
        wanted.n_batch = count * length
        wanted.n_ubatch = MICRO_BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.n_seq_max = count
        wanted.kv_unified = False  # a cache each: a row then reads its own tokens only
        wanted.flash_attn_type = int(flash)
        if wide:
            wanted.type_k = wanted.type_v = cpp.GGML_TYPE_F32
        self._context = cpp.llama_init_from_model(model, wanted)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {count} x {length} tokens")
        self._memory = cpp.llama_get_memory(self._context)
        self._batch = cpp.llama_batch_init(count * length, 0, count)

    def feed(self, ids: np.ndarray, start: int, every: bool = False) -> np.ndarray:
        """Put ids `[B, S]` at positions from `start` on; returns the last ones' logits `[B, V]`.

        With `every` those of all `[B * S, V]`.
        """
        batch, (rows, columns) = self._batch, ids.shape
        batch.n_tokens = rows * columns
        flat = ids.ravel().tolist()
        for slot, token in enumerate(flat):
            row, column = divmod(slot, columns)
            batch.token[slot] = token
            batch.pos[slot] = start + column
            batch.n_seq_id[slot] = 1
            batch.seq_id[slot][0] = row
            batch.logits[slot] = every or column == columns - 1
        if code := cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gives {code} for {rows} x {columns} tokens")
        cpp.llama_synchronize(self._context)
        ends = range(rows * columns) if every else range(columns - 1, rows * columns, columns)
        found = [
            np.ctypeslib.as_array(
                cpp.llama_get_logits_ith(self._context, end), shape=(self._vocab,)
            )
            for end in ends
        ]
        return np.stack(found)

    def clear(self, position: int = 0) -> None:
        """Forget what stands at a position and after it."""
        for row in range(self._count):
            cpp.llama_memory_seq_rm(self._memory, row, position, -1)

    def close(self) -> None:
        """Give the memory back; done once, also when the last run that needs it is forgotten."""
        if self._context:
            cpp.llama_batch_free(self._batch)
            cpp.llama_free(self._context)
            self._context = None

    def __del__(self) -> None:
        self.close()


if __name__ == "__main__":
    main(LlamaCpp)
