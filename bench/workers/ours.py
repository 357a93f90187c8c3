"""This library, through its public names."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bench.tasks import Precision, Task
from bench.workers.worker import Run, Timed, Worker, main
from ds_model import CausalLM
from ds_precision import MODES
from ds_train import Callback, StepMetrics, TrainConfig, Trainer

FOREVER = 1_000_000  # steps that a stepping trainer is told to do; it is stopped long before


class Ours(Worker):
    """Our model, generation and trainer."""

    def __init__(self, model: Path, precision: Precision, threads: int, *, thorough: bool) -> None:
        super().__init__(model, precision, threads, thorough=thorough)
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self._lm = load(model, precision)
        self._stepping: Stepping | None = None

    def versions(self) -> dict[str, str]:
        """Return TensorFlow's and Keras'."""
        return {"tensorflow": tf.__version__, "keras": keras.__version__}

    def vocab_size(self) -> int:
        """Return how many tokens the model knows."""
        return self._lm.config.vocab_size

    def modes(self, task: Task) -> dict[str, Callable[[], Run]]:
        """Return our one way for each task."""
        ways: dict[str, Callable[[], Run]] = {
            "train": lambda: self._train(task),
            "prefill": lambda: self._prefill(task),
            "decode": lambda: self._decode(task),
        }
        self._stop_training()
        return {"tf.function": ways[task.kind]}

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the last positions' logits `[B, V]`."""
        return self._lm(ids, logits_to_keep=1).numpy()[:, -1]

    def every_logits(self, ids: np.ndarray) -> np.ndarray:
        """Return all positions' logits `[S, V]`."""
        return self._lm(ids[None]).numpy()[0]

    def greedy(self, ids: np.ndarray, new: int) -> np.ndarray:
        """Return the tokens that `generate` adds `[B, new]`."""
        whole = self._lm.generate(ids, max_new_tokens=new, eos_token_id=[]).numpy()
        return whole[:, ids.shape[1] :]

    def first_step(self, task: Task) -> dict[str, float]:
        """Return the loss and gradient norm of the first step that is timed later."""
        stepping = Stepping(self.model, task, self.vocab_size())
        metrics = stepping.step()
        stepping.stop()
        return {"loss": metrics.cross_entropy, "gradient_norm": metrics.gradient_norm}

    def limits(self) -> dict[str, float]:
        """Return the best of TensorFlow's products in graph mode; see `bench.limits`."""
        from bench.workers.tf_limits import measure  # noqa: PLC0415 - only one worker is asked

        return measure()

    def _prefill(self, task: Task) -> Run:
        """Read the prompts to their first new token, which needs the last positions' logits."""
        ids = task.ids(self.vocab_size())

        def run() -> Timed:
            start = time.perf_counter()
            self._lm.generate(ids, max_new_tokens=1, eos_token_id=[])
            return Timed(time.perf_counter() - start, task.tokens)

        return run

    def _decode(self, task: Task) -> Run:
        return lambda: self.write(task)

    def write(self, task: Task, watch: Callable[[bool], None] = lambda _: None) -> Timed:
        """Write tokens; the clock starts when the first one is there.

        Args:
            task: what to write.
            watch: called as the clock starts (true) and stops.
        """
        ids = task.ids(self.vocab_size())
        chunks = self._lm.stream(ids, max_new_tokens=task.new + 1, eos_token_id=[])
        first = next(chunks)
        watch(True)
        start = time.perf_counter()
        rest = sum(chunk.size for chunk in chunks)
        seconds = time.perf_counter() - start
        watch(False)
        if first.shape[1] != 1:
            raise RuntimeError(f"the first chunk holds {first.shape[1]} tokens; expected 1")
        return Timed(seconds, rest)

    def _train(self, task: Task) -> Run:
        stepping = self._stepping = Stepping(self.model, task, self.vocab_size())

        def run() -> Timed:
            start = time.perf_counter()
            stepping.step()
            return Timed(time.perf_counter() - start, task.tokens)

        return run

    def _stop_training(self) -> None:
        """Let the trainer and its memory go; other tasks come."""
        self._run = None
        if self._stepping is not None:
            self._stepping.stop()
            self._stepping = None


def load(model: Path, precision: Precision) -> CausalLM:
    """Open the model with weights of a precision; small ones beside bfloat16 activations."""
    if precision in MODES:
        return CausalLM.from_pretrained(model, quantize=precision, dtype="bfloat16")
    return CausalLM.from_pretrained(model, dtype=precision)


class _StoppedError(Exception):
    """Leaves the trainer's loop."""


class Stepping(Callback):
    """A trainer that does one step when told: its loop runs in a thread and waits between steps.

    The loss is the cross entropy alone and the router's biases stand still, as in the peers.
    What `train_table` holds goes to the trainer's `[train]`.
    """

    def __init__(self, model: Path, task: Task, vocab_size: int, **train_table: Any) -> None:
        self._go: Queue[bool] = Queue()  # False: stop
        self._done: Queue[StepMetrics | None] = Queue()
        self._error: Exception | None = None
        precise = task.precision == "float32"
        config = TrainConfig.model_validate(
            {
                "data": {"sequence_length": task.length},
                "schedule": {"peak": 1e-4, "warmup_steps": 0},
                "loss": {"balance_alpha": 0, "bias_update_speed": 0},
                "train": {
                    "batch_size": task.batch,
                    "steps": FOREVER,
                    "dtype_policy": "float32" if precise else "mixed_bfloat16",
                    **train_table,
                },
                "checkpoint": {"every": FOREVER},
            }
        )
        source = CausalLM.from_pretrained(model)
        self._trainer = Trainer(
            config,
            task.text(vocab_size).astype(np.uint16),
            tempfile.mkdtemp(),
            model_config=source.config,
            callbacks=[self],
        )
        for mine, theirs in zip(self._trainer.model.weights, source.weights, strict=True):
            mine.assign(theirs)
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def step(self) -> StepMetrics:
        """Do one step: loss, gradients, clipping, AdamW."""
        self._go.put(True)
        found = self._done.get()
        if found is None:
            raise RuntimeError(f"the trainer stopped: {self._error}") from self._error
        return found

    def stop(self) -> None:
        """End the loop between two steps."""
        self._go.put(False)
        self._thread.join()

    def on_start(self, step: int, steps: int) -> None:  # noqa: ARG002 - the trainer says them
        """Wait to be told to do the first step."""
        self._wait()

    def on_step(self, metrics: StepMetrics) -> None:
        """Hand over what the step found, and wait for the next."""
        self._done.put(metrics)
        self._wait()

    def _wait(self) -> None:
        if not self._go.get():
            raise _StoppedError

    def _loop(self) -> None:
        try:
            self._trainer.train()
        except _StoppedError:
            return
        except Exception as error:  # noqa: BLE001 - carried to the thread that asked
            self._error = error
            self._done.put(None)


if __name__ == "__main__":
    main(Ours)
