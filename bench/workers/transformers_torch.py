"""transformers on torch: eager and compiled, with each of its two ways to run experts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from bench.limits import PRODUCT, READS, best_rate
from bench.tasks import Precision, Task
from bench.workers.worker import Run, Timed, Worker, main

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Transformers(Worker):
    """The fastest of its modes, chosen anew for each task."""

    def __init__(self, model: Path, precision: Precision, threads: int, *, thorough: bool) -> None:
        super().__init__(model, precision, threads, thorough=thorough)
        torch.set_num_threads(threads)
        transformers.logging.disable_progress_bar()
        self._lm = self._load(DTYPES[precision])

    def versions(self) -> dict[str, str]:
        """Return torch's and transformers'."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def vocab_size(self) -> int:
        """Return how many tokens the model knows."""
        return int(self._lm.config.vocab_size)

    def modes(self, task: Task) -> dict[str, Callable[[], Run]]:
        """Return eager and compiled, with each way to run experts that the machine can hold.

        `batched_mm` copies the weights of every token's experts: for 2048 tokens of preset `bench`
        13 GB a layer. So it is for decoding, where it is the faster one.
        """
        ways = {"train": self._train, "prefill": self._prefill, "decode": self._decode}

        def setup(experts: str, compiled: bool) -> Callable[[], Run]:
            return lambda: ways[task.kind](task, experts, compiled)

        tried = [("grouped_mm", False), ("grouped_mm", True)]
        if task.kind == "decode":
            tried += [("batched_mm", False), ("batched_mm", True)]
        if not self.thorough:  # those that won on every machine so far
            tried = tried[2:] or tried[:1]
        return {
            f"{'torch.compile' if compiled else 'eager'}, {experts}": setup(experts, compiled)
            for experts, compiled in tried
        }

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the last positions' logits `[B, V]`."""
        with torch.inference_mode():
            return (
                self._lm(torch.tensor(ids).long(), logits_to_keep=1).logits[:, -1].float().numpy()
            )

    def greedy(self, ids: np.ndarray, new: int) -> np.ndarray:
        """Return the best next tokens `[B, new]`, through the cache."""
        found = []
        cache = DynamicCache(config=self._lm.config)
        tokens = torch.tensor(ids).long()
        with torch.inference_mode():
            for _ in range(new):
                tokens = self._next(self._lm, tokens, cache)
                found.append(tokens)
        return torch.cat(found, dim=1).numpy()

    def first_step(self, task: Task) -> dict[str, float]:
        """Return the loss and gradient norm before any update."""
        stepping = Stepping(self._load(torch.float32), task)
        return {"loss": stepping.gradients(), "gradient_norm": stepping.norm()}

    def limits(self) -> dict[str, float]:
        """Return torch's products and reads; see `bench.limits`."""
        found = {}
        for name, dtype in DTYPES.items():
            found[f"gemm_{name}"] = best_rate(_product(dtype)) / 1e9
        for size in READS:
            rows, ones = torch.ones(size // 16384, 4096), torch.ones(4096)
            ways = (rows.sum, partial(torch.mv, rows, ones))
            found[f"read_{size >> 20}mb"] = max(best_rate(_read(size, way)) for way in ways) / 1e9
        return found

    def _load(self, dtype: torch.dtype) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
        return model.eval()

    def _ready(self, experts: str, compiled: bool) -> Callable[..., Any]:
        torch._dynamo.reset()  # noqa: SLF001 - torch's documented way to forget compiled code
        self._lm.set_experts_implementation(experts)
        return torch.compile(self._lm, dynamic=False) if compiled else self._lm

    def _prefill(self, task: Task, experts: str, compiled: bool) -> Run:
        call = self._ready(experts, compiled)
        ids = torch.tensor(task.ids(self.vocab_size())).long()

        def run() -> Timed:
            start = time.perf_counter()
            with torch.inference_mode():
                call(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).numpy()
            return Timed(time.perf_counter() - start, task.tokens)

        return run

    def _decode(self, task: Task, experts: str, compiled: bool) -> Run:
        ids = torch.tensor(task.ids(self.vocab_size())).long()
        room = task.length + task.new
        config = self._lm.config
        kept: Any = DynamicCache(config=config)
        if compiled:  # only a cache of fixed size keeps the compiled code from being made again
            kept = StaticCache(config=config, max_cache_len=room + 1)
        self._lm.set_experts_implementation("grouped_mm")  # the prompt is too long for the other
        with torch.inference_mode():
            first = self._next(self._lm, ids, kept)
        call = self._ready(experts, compiled)

        def run() -> Timed:
            token = first
            _shorten(kept, task.length)
            start = time.perf_counter()
            with torch.inference_mode():
                for position in range(task.length, room):
                    token = self._next(call, token, kept, position)
            return Timed(time.perf_counter() - start, task.tokens)

        return run

    @staticmethod
    def _next(
        call: Callable[..., Any], tokens: torch.Tensor, cache: Any, position: int | None = None
    ) -> torch.Tensor:
        """Return the best next token `[B, 1]` after feeding tokens `[B, S]`."""
        places = {}
        if position is not None:
            places["position_ids"] = torch.full((len(tokens), 1), position)
        out = call(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **places)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _train(self, task: Task, experts: str, compiled: bool) -> Run:
        torch._dynamo.reset()  # noqa: SLF001 - torch's documented way to forget compiled code
        model = self._load(torch.float32)
        model.set_experts_implementation(experts)
        stepping = Stepping(model, task, compiled=compiled)

        def run() -> Timed:
            start = time.perf_counter()
            stepping.step()
            return Timed(time.perf_counter() - start, task.tokens)

        return run


def _shorten(cache: Any, length: int) -> None:
    """Forget what a cache holds past `length` tokens."""
    if isinstance(cache, DynamicCache):
        cache.crop(length - cache.get_seq_length())
    else:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)


class Stepping:
    """Training steps on one batch; "bfloat16" is autocast over float32 weights."""

    def __init__(self, model: Any, task: Task, *, compiled: bool = False) -> None:
        self._model = model.train()
        self._call = torch.compile(model, dynamic=False) if compiled else model
        self._ids = torch.tensor(task.ids(int(model.config.vocab_size))).long()
        self._mixed = task.precision == "bfloat16"
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def gradients(self) -> float:
        """Return the loss (nats), and leave the gradients in place."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._mixed):
            logits = self._call(self._ids[:, :-1], use_cache=False).logits
        flat = logits.float().reshape(-1, logits.shape[-1])
        loss: Any = torch.nn.functional.cross_entropy(flat, self._ids[:, 1:].reshape(-1))
        loss.backward()
        return loss.item()

    def norm(self) -> float:
        """Return the gradient's norm, summed in float64: torch's own is out by 1e-4 here."""
        found = [parameter.grad for parameter in self._model.parameters()]
        return sum(grad.double().square().sum().item() for grad in found if grad is not None) ** 0.5

    def step(self) -> None:
        """Do one step: loss, gradients, clipping, AdamW."""
        self.gradients()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()


def _product(dtype: torch.dtype) -> Callable[[], float]:
    a, b = (torch.randn(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
    out = torch.empty(PRODUCT, PRODUCT, dtype=dtype)

    def rate() -> float:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        return 2 * PRODUCT**3 / (time.perf_counter() - start)

    return rate


def _read(size: int, way: Callable[[], torch.Tensor]) -> Callable[[], float]:
    def rate() -> float:
        start = time.perf_counter()
        way()
        return size / (time.perf_counter() - start)

    return rate


if __name__ == "__main__":
    main(Transformers)
