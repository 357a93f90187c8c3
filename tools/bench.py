"""Time training, prefill and decode beside transformers: `nox -s bench`.

Both run preset `bench` with the same weights, the same tokens, float32 and the same number of
threads, in one process, in turn. What is timed is said to agree first. Writes docs/benchmarks.md
and docs/assets/benchmarks.json. Run it on a machine that does nothing else: the share of the
processors that others used is measured and stated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
import torch
import transformers

from ds_model import CausalLM, ModelConfig
from ds_train import Callback, StepMetrics, TrainConfig, Trainer

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 512
NEW = 32
TRAIN = (8, 256)
Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One task, timed for both systems.

    Attributes:
        task: what was done.
        ours: tokens a second, the median over the rounds.
        peer: the same for transformers.
        ratio: the median of the rounds' ratios, each of two runs one after the other.
        lowest: the lowest of those ratios.
        highest: the highest.
    """

    task: str
    ours: float
    peer: float
    ratio: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Found:
    """What a run of the benchmark found, and where."""

    rows: list[Row]
    rounds: int
    threads: int
    logit_difference: float
    experts_of_peer: str
    used_by_others: float
    machine: str
    versions: dict[str, str]


def agreement(ours: CausalLM, peer: torch.nn.Module, ids: np.ndarray) -> float:
    """Return the largest logit difference over the largest logit, on one batch."""
    with torch.inference_mode():
        expected = peer(torch.tensor(ids).long()).logits.numpy()
    return float(np.abs(ours(ids).numpy() - expected).max() / np.abs(expected).max())


def prefill(ours: CausalLM, peer: torch.nn.Module, ids: np.ndarray) -> tuple[Run, Run]:
    """Return the two ways to read a prompt and give the logits of all its tokens."""
    forward = tf.function(ours.__call__, autograph=False)
    tokens, torch_tokens = tf.constant(ids), torch.tensor(ids).long()

    def peer_run() -> object:
        with torch.inference_mode():
            return peer(torch_tokens, use_cache=True).logits

    return lambda: forward(tokens).numpy(), peer_run


def generation(ours: CausalLM, peer: torch.nn.Module, ids: np.ndarray, new: int) -> tuple[Run, Run]:
    """Return the two ways to write `new` tokens after a prompt, greedily."""
    torch_tokens = torch.tensor(ids).long()

    def peer_run() -> object:
        mask = torch.ones_like(torch_tokens)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return peer.generate(torch_tokens, attention_mask=mask, **options)

    return lambda: ours.generate(ids, max_new_tokens=new, eos_token_id=[]).numpy(), peer_run


class PeerStep(Callback):
    """Does one of the peer's training steps after each of ours, and keeps both times."""

    def __init__(self, peer: torch.nn.Module, ids: np.ndarray) -> None:
        self.times: list[tuple[float, float]] = []
        self._peer, self._ids = peer, torch.tensor(ids).long()
        self._optimizer = torch.optim.AdamW(
            peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1
        )

    def on_step(self, metrics: StepMetrics) -> None:
        """Take our time from the trainer, and time the peer's loss, gradients and update."""
        ours = TRAIN[0] * TRAIN[1] / metrics.tokens_per_second
        self.times.append((ours, seconds(self._step)))

    def _step(self) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        logits = self._peer(self._ids[:, :-1], use_cache=False).logits
        flat = logits.reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, self._ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._peer.parameters(), 1.0)
        self._optimizer.step()
        return loss.item()


def training(
    peer: torch.nn.Module, ids: np.ndarray, folder: Path, rounds: int
) -> list[tuple[float, float]]:
    """Time steps of the trainer, and of the peer between them: loss, gradients, clipping, AdamW."""
    warm_up = 2
    config = TrainConfig.model_validate(
        {
            "model": {"preset": "bench"},
            "data": {"sequence_length": TRAIN[1]},
            "train": {"batch_size": TRAIN[0], "steps": rounds + warm_up},
        }
    )
    stepping = PeerStep(peer, ids)
    Trainer(config, ids.astype(np.uint16).ravel(), folder, callbacks=[stepping]).train()
    return stepping.times[warm_up:]


def seconds(run: Run) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def pairs(ours: Run, peer: Run, rounds: int) -> Iterator[tuple[float, float]]:
    """Time both in turn, after a warm-up that compiles; the order changes each round."""
    for run in (ours, peer, ours, peer):
        run()
    for index in range(rounds):
        if index % 2:
            late = seconds(peer)
            yield seconds(ours), late
        else:
            early = seconds(ours)
            yield early, seconds(peer)


def row(task: str, tokens: int, times: list[tuple[float, float]]) -> Row:
    """Turn a task's times into tokens a second and ratios."""
    print(f"timed {task}", file=sys.stderr, flush=True)
    ratios = [peer / ours for ours, peer in times]
    ours = statistics.median(tokens / first for first, _ in times)
    peer = statistics.median(tokens / second for _, second in times)
    return Row(task, ours, peer, statistics.median(ratios), min(ratios), max(ratios))


def decode_row(
    ours: CausalLM, peer: torch.nn.Module, ids: np.ndarray, rounds: int, title: str
) -> Row:
    """Time decoding alone: writing many tokens less writing one, from the same prompt."""
    many = list(pairs(*generation(ours, peer, ids, NEW + 1), rounds))
    one = list(pairs(*generation(ours, peer, ids, 1), rounds))
    first = [statistics.median(times) for times in zip(*one, strict=True)]
    times = [(a - first[0], b - first[1]) for a, b in many]
    return row(title, len(ids) * NEW, times)


def measure(rounds: int, threads: int) -> Found:
    """Run every task and return what was found."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    others = OtherLoad()
    random = np.random.default_rng(0)
    vocabulary = ModelConfig.preset("bench").vocab_size
    one = random.integers(0, vocabulary, (1, PROMPT), dtype=np.int32)
    eight = random.integers(0, vocabulary, (8, PROMPT), dtype=np.int32)
    batch = random.integers(0, vocabulary, (TRAIN[0], TRAIN[1] + 1), dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        ours = CausalLM(ModelConfig.preset("bench"))
        ours.save_pretrained(f"{folder}/model")
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/model", dtype=torch.float32
        )
        difference = agreement(ours, peer, one)
        rows = [
            row("prefill, 1 x 512", one.size, list(pairs(*prefill(ours, peer, one), rounds))),
            row("prefill, 8 x 512", eight.size, list(pairs(*prefill(ours, peer, eight), rounds))),
            decode_row(ours, peer, one, rounds, f"decode, 1 stream, {PROMPT} before"),
            decode_row(ours, peer, eight, rounds, f"decode, 8 streams, {PROMPT} before"),
        ]
        steps = training(peer, batch, Path(folder) / "run", rounds)
        rows.append(row("train step, 8 x 256", TRAIN[0] * TRAIN[1], steps))
    return Found(
        rows=rows,
        rounds=rounds,
        threads=threads,
        logit_difference=difference,
        experts_of_peer=str(getattr(peer.config, "_experts_implementation", "its default")),
        used_by_others=others.share(),
        machine=f"{platform.machine()}, {os.cpu_count()} processors, {platform.system()}",
        versions={
            "tensorflow": tf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


class OtherLoad:
    """The processors' time that other processes took since this was made."""

    def __init__(self) -> None:
        self._start, self._ours, self._all = time.monotonic(), time.process_time(), _busy()

    def share(self) -> float:
        """Return their share of all processors' time, from 0 to 1."""
        wall = (time.monotonic() - self._start) * (os.cpu_count() or 1)
        used = _busy() - self._all - (time.process_time() - self._ours)
        return round(max(0.0, used) / wall, 3)


def _busy() -> float:
    """Return the seconds that all processors have worked since the start, on Linux."""
    user, nice, system = Path("/proc/stat").read_text(encoding="ascii").split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def page(found: Found) -> str:
    """Return docs/benchmarks.md."""
    table = [
        f"| {line.task} | {line.ours:,.0f} | {line.peer:,.0f} "
        f"| {line.ratio:.2f} ({line.lowest:.2f} to {line.highest:.2f}) |"
        for line in found.rows
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return f"""# Benchmarks

Written by `python3 dev.py bench`. Preset `bench` (107.5M parameters, 26.2M active), random
weights, float32, tokens a second. The ratio is the median over rounds of one run of each, one
after the other, with its range in brackets. `transformers` is eager torch with its experts as
`{found.experts_of_peer}`. The two models' logits agree to {found.logit_difference:.0e} of the
largest.

| task | here | transformers | ratio |
|---|---|---|---|
{chr(10).join(table)}

{found.machine}; {found.threads} threads each, {found.rounds} rounds; other processes took
{found.used_by_others:.0%} of the processors. Versions: {versions}.

Not yet here: other peers, bfloat16, the machine's own limits, longer contexts.
"""


def main() -> None:
    """Measure, and write the page and its figures."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (5)")
    parser.add_argument("--threads", type=int, default=2, help="for both systems (2)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder to write into")
    asked = parser.parse_args()
    found = measure(asked.rounds, asked.threads)
    assets = asked.out / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    (assets / "benchmarks.json").write_text(
        json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8"
    )
    (asked.out / "benchmarks.md").write_text(page(found), encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    main()
