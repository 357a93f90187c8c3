"""Our engine alone, a case a process: `python -m bench.serving_cases NAME JSON`."""

from __future__ import annotations

import gc
import json
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ds_model import CausalLM, Tokenizer
from ds_serve import Engine, EngineOptions, Rules, StepReport, Text, Update
from ds_train.data import hold_out, state_of_the_union
from ds_train.quickstart import quickstart_config

PROMPT, NEW = 512, 128


class Crowd:
    """Texts that are written, and when their tokens come."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.first: dict[int, float] = {}
        self._left = threading.Semaphore(0)

    def run(self, asked: list[tuple[list[int], Rules]], *, at_once: bool = True) -> float:
        """Return the seconds that all took."""
        self.first.clear()
        begun = time.perf_counter()

        def listener(index: int) -> Callable[[Update], None]:
            def listen(update: Update) -> None:
                if update.tokens and index not in self.first:
                    self.first[index] = time.perf_counter() - begun
                if update.error is not None:
                    raise update.error
                if update.finish_reason is not None:
                    self._left.release()

            return listen

        self.texts = [Text(prompt, rules, listener(i)) for i, (prompt, rules) in enumerate(asked)]
        if at_once:
            self.engine.submit(self.texts)
        for text in self.texts:
            if not at_once:
                self.engine.submit([text])
            self._left.acquire()
        return time.perf_counter() - begun


def started(model: CausalLM, **options: Any) -> Engine:
    """Return an engine that is warm."""
    engine = Engine(model, EngineOptions(**options))
    for _ in engine.warm_up():
        pass
    gc.collect()
    gc.freeze()
    engine.start()
    return engine


def prompts(model: CausalLM, count: int, length: int = PROMPT, seed: int = 0) -> list[list[int]]:
    """Return random prompts."""
    numbers = np.random.default_rng(seed)
    return numbers.integers(0, model.config.vocab_size, (count, length)).tolist()


def together(model: str, clients: int) -> dict[str, Any]:
    """Compare texts that share steps with texts one after the other."""
    lm = CausalLM.from_pretrained(model, dtype="bfloat16")
    crowd = Crowd(started(lm, max_running=clients, cache_tokens=clients * 1024))
    found: dict[str, list[float]] = {"together": [], "in turn": []}
    for turn in range(3):
        asked = [(prompt, Rules(NEW)) for prompt in prompts(lm, clients, seed=turn)]
        again = [(prompt, Rules(NEW)) for prompt in prompts(lm, clients, seed=turn + 100)]
        found["together"].append(clients * NEW / crowd.run(asked))
        found["in turn"].append(clients * NEW / crowd.run(again, at_once=False))
    crowd.engine.close()
    return {"clients": clients} | {k: round(statistics.median(v), 1) for k, v in found.items()}


def prefix(model: str, shared: int) -> dict[str, Any]:
    """Compare the time to a first token with and without a beginning that was read before."""
    lm = CausalLM.from_pretrained(model, dtype="bfloat16")
    crowd = Crowd(started(lm, max_running=4, cache_tokens=8 * (shared + 256)))
    cold: list[float] = []
    warm: list[float] = []
    for turn in range(5):
        (beginning,) = prompts(lm, 1, shared, seed=turn)
        for i, times in enumerate((cold, warm)):
            (tail,) = prompts(lm, 1, 32, seed=1000 + 10 * turn + i)
            crowd.run([(beginning + tail, Rules(1))])
            times.append(crowd.first[0])
    crowd.engine.close()
    return {
        "shared": shared,
        "cold": round(statistics.median(cold), 5),
        "warm": round(statistics.median(warm), 5),
    }


def overhead(model: str, clients: int) -> dict[str, Any]:
    """Say what the engine adds to the compiled steps, and what one of them takes.

    Each step that the engine did is done again by the graph alone, one after the other: one step
    repeated would read the same few experts each time.
    """
    lm = CausalLM.from_pretrained(model, dtype="bfloat16")
    engine = started(lm, max_running=max(clients, 4), cache_tokens=clients * 1024 + 1024)
    crowd = Crowd(engine)
    steps: list[tuple[float, float]] = []
    inputs: list[Any] = []
    tensors = engine.steps.tensors

    def note(report: StepReport) -> None:
        if report.read == clients:
            steps.append((report.seconds, report.model_seconds))

    def keep(plan: Any) -> Any:
        found = tensors(plan)
        if sum(len(piece.tokens) for piece in plan.pieces) == clients:
            inputs.append(found)
        return found

    engine.observers.append(note)
    engine.steps.tensors = keep  # type: ignore[method-assign]
    usual = engine.steps.plain.executor
    found: dict[str, list[float]] = {usual: [], "": []}
    for turn in range(4):  # in turn: a machine has better and worse seconds
        inputs.clear()
        crowd.run([(prompt, Rules(NEW)) for prompt in prompts(lm, clients, seed=turn)])
        for executor in (usual, "") if turn % 2 else ("", usual):
            engine.steps.plain.executor = executor
            found[executor] += _seconds_of(engine, inputs)
        engine.steps.plain.executor = usual
    engine.close()
    bare, handed = (statistics.median(found[executor]) for executor in (usual, ""))
    whole = statistics.median(seconds for seconds, _ in steps)
    return {
        "clients": clients,
        "step": round(whole, 6),
        "bare": round(bare, 6),
        "handed": round(handed, 6),
        "outside_graph": round(1 - statistics.median(m / s for s, m in steps), 4),
    }


def _seconds_of(engine: Engine, inputs: list[Any]) -> list[float]:
    """Return what the compiled graph alone takes for each of these steps."""
    seconds = []
    for step in inputs:
        begun = time.perf_counter()
        engine.steps.call(step)
        seconds.append(time.perf_counter() - begun)
    return seconds


def drafts(model: str, clients: int) -> dict[str, Any]:
    """Compare speed with and without drafts, on held-out speeches, greedily and drawn."""
    lm = CausalLM.from_pretrained(model)
    tokenizer = Tokenizer.from_pretrained(model)
    _, held_out = hold_out(state_of_the_union(), quickstart_config().data.held_out)
    texts = [tokenizer.encode(document.text)[:96] for document in held_out]
    options = {"max_running": clients, "cache_tokens": 64 * 256, "block_size": 16}
    crowds = {draft: Crowd(started(lm, **options, draft=draft)) for draft in (False, True)}
    found: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("drawn", 0.8)):
        rates: dict[bool, list[float]] = {False: [], True: []}
        written: dict[bool, list[list[int]]] = {}
        tried = right = 0
        for turn in range(4):
            asked = [
                (texts[(turn + i) % len(texts)], Rules(NEW, temperature=temperature, seed=i))
                for i in range(clients)
            ]
            for draft in (False, True) if turn % 2 else (True, False):
                crowd = crowds[draft]
                crowd.engine.scheduler.pool.forget_all()
                seconds = crowd.run(asked)
                rates[draft].append(clients * NEW / seconds)
                written[draft] = [text.tokens for text in crowd.texts]
                tried += sum(text.drafts for text in crowd.texts)
                right += sum(text.accepted for text in crowd.texts)
        found[name] = {
            "accepted": round(right / tried, 3),
            "without": round(statistics.median(rates[False]), 1),
            "with": round(statistics.median(rates[True]), 1),
            "same": written[False] == written[True],
        }
    for crowd in crowds.values():
        crowd.engine.close()
    return {"clients": clients} | found


def endurance(model: str, requests: int) -> dict[str, Any]:
    """Send random requests, give up a third of them, and watch memory and blocks."""
    lm = CausalLM.from_pretrained(model)
    engine = started(lm, max_running=16, max_waiting=64, cache_tokens=4096, block_size=16)
    faults = 0

    def check(_: Any) -> None:
        nonlocal faults
        try:
            engine.scheduler.check()
        except AssertionError:
            faults += 1

    engine.observers.append(check)
    numbers = random.Random(0)  # noqa: S311 - a load, no secrets
    places = threading.Semaphore(48)
    ended: dict[str, int] = {}
    lock = threading.Lock()
    memory = []

    def listen(update: Update) -> None:
        if update.finish_reason is not None:
            with lock:
                ended[update.finish_reason] = ended.get(update.finish_reason, 0) + 1
            places.release()

    begun = time.perf_counter()
    shared = [numbers.randrange(lm.config.vocab_size) for _ in range(64)]
    for number in range(requests):
        places.acquire()
        head = shared[: numbers.choice([0, 32, 64])]
        tail = [numbers.randrange(lm.config.vocab_size) for _ in range(numbers.randint(1, 60))]
        rules = Rules(
            numbers.randint(1, 40),
            temperature=numbers.choice([0.0, 0.8]),
            top_p=numbers.choice([1.0, 0.9]),
            presence_penalty=numbers.choice([0.0, 0.5]),
        )
        text = Text(head + tail, rules, listen)
        engine.submit([text])
        if numbers.random() < 1 / 3:
            threading.Timer(numbers.random() * 0.2, engine.cancel, ([text],)).start()
        if number % (requests // 20) == 0:
            memory.append(_resident())
    while sum(ended.values()) < requests:
        time.sleep(0.05)
    seconds = time.perf_counter() - begun
    memory.append(_resident())
    pool = engine.scheduler.pool
    free = pool.free == pool.blocks
    engine.close()
    return {
        "requests": requests,
        "ended": ended,
        "memory_mib": memory,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "all_blocks_free": free,
        "faults": faults,
        "preemptions": engine.scheduler.preemptions,
        "seconds": round(seconds, 1),
    }


def _resident() -> int:
    """Return the MiB that this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a line of the kernel's
        return int(file.read().split()[1]) * resource.getpagesize() // 2**20


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "together": together,
    "prefix": prefix,
    "overhead": overhead,
    "drafts": drafts,
    "endurance": endurance,
}


if __name__ == "__main__":
    case: Callable[..., dict[str, Any]] = CASES[sys.argv[1]]
    print(json.dumps(case(**json.loads(sys.argv[2]))))
