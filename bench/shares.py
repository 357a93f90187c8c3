"""Where the time of a task goes, by what the processor was doing: samples that Linux' `perf` takes.

Decoding is watched from the first new token on, as it is timed. Waiting is a thread of ours that
looks for work while another one ends its share.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.found import Found
from bench.tasks import CONTEXT, TASKS, Task
from bench.workers.ours import Ours
from bench.workers.worker import Run

Case = Callable[[str, dict[str, Any]], dict[str, Any]]
# The preset's graph in a model so narrow that nothing is computed: only starting is left.
NARROW = {
    "vocab_size": 64,
    "num_attention_heads": 1,
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
}
WATCHED = 4.0  # seconds of each task
# The first that fits names a function's kind.
KINDS = {
    "reading weights": r"ds::thin",
    "multiplying": r"ds::(put_tile|tile<|multiply_|LeftTiles::multiply)",
    "packing": r"ds::(copy|pack|pair_rows|load_pairs|left_side|grouped|transpose)",
    "sums, SwiGLU": r"ds::Put::Put|ds::shared_rows|run_experts|sum_few",
    "attention": r"ds::(attend|widen|rotate|latent|LatentAttention)|LatentAttention",
    "optimizer, norms, losses": r"ds::(rms_norm|adamw|square_sum|cross_entropy|route)|"
    r"(rms_norm|adamw|square_sum|cross_entropy|route)\w*_op",
    "waiting": r"ds::Threads",
    "TensorFlow": r"tensorflow|tsl::|Eigen|absl|dnnl|Mkl|xla",
}
REST = "all else"


def starting(run_case: Case) -> dict[str, float]:
    """Return the seconds of a step of decoding in which nothing is computed, by batch."""
    point = {"context": CONTEXT, "new": 64, **NARROW}
    return {
        str(batch): run_case("decode", {"batch": batch, **point})["step_seconds"]
        for batch in (1, 8, 32)
    }


def measure(model: Path, run_case: Case) -> dict[str, Any]:
    """Return the shares of each task, or why there are none."""
    if shutil.which("perf") is None:
        return {"failed": "perf is not on the PATH"}
    tasks = [task for task in TASKS if not task.long]
    return {task.key: run_case("shares", {"model": str(model), "key": task.key}) for task in tasks}


def shares(model: str, key: str) -> dict[str, float]:
    """Do one task again and again for some seconds, watched."""
    task = next(task for task in TASKS if task.key == key)
    worker = Ours(Path(model), task.precision, os.cpu_count() or 1, thorough=False)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "perf.data"
        run = next(iter(worker.modes(task).values()))()
        run()
        run()  # all threads are there now: perf watches those that it finds
        with _perf(Path(folder), data) as watch:
            _repeat(worker, task, run, watch)
        return by_kind(_report(data))


def by_kind(samples: dict[str, float]) -> dict[str, float]:
    """Return the share of each kind of function, from the percentages of functions."""
    total = sum(samples.values())
    if not total:
        raise RuntimeError("perf took no samples")
    found = dict.fromkeys([*KINDS, REST], 0.0)
    for symbol, percent in samples.items():
        kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, symbol))
        found[next(kinds, REST)] += percent / total
    return {kind: round(value, 4) for kind, value in found.items()}


def shares_table(found: Found) -> str:
    """Return the page's section."""
    measured = found.kernels.get("shares")
    if not measured:
        return ""
    starts = ", ".join(
        f"{seconds * 1e3:.2f} ms with {batch}"
        for batch, seconds in found.kernels.get("starting", {}).items()
    )
    head = [
        "## Where the time goes",
        "",
        "Shares of both processors' time, sampled with Linux' `perf`, decoding from its first new",
        "token on. Multiplying reads packed operands from the caches; where rows are few, weights",
        "are read from memory and multiplied at once.",
        "",
        "Starting the operations of one step of decoding, measured in a model of the same graph",
        f"and widths of 16 to 64, takes {starts} streams.",
        "",
    ]
    if "failed" in measured:
        return "\n".join([*head, f"Not measured: {measured['failed']}."])
    kinds = [*KINDS, REST]
    lines = [f"| task | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for task in TASKS:
        row = measured.get(task.key)
        if row is None:
            continue
        cells = [row.get("failed", "")] if "failed" in row else [f"{row[k]:.0%}" for k in kinds]
        lines.append(f"| {task.title} | {' | '.join(cells)} |")
    return "\n".join([*head, *lines])


def _repeat(worker: Ours, task: Task, run: Run, watch: Callable[[bool], None]) -> None:
    spent = 0.0
    while spent < WATCHED:
        if task.kind == "decode":
            spent += worker.write(task, watch).seconds
            continue
        watch(True)
        spent += run().seconds
        watch(False)


@contextmanager
def _perf(folder: Path, data: Path) -> Iterator[Callable[[bool], None]]:
    """Run `perf` on this process; what is yielded turns it on and off."""
    control, answers = folder / "control", folder / "answers"
    for pipe in (control, answers):
        os.mkfifo(pipe)
    command = ["perf", "record", "--quiet", "--delay=-1", f"--output={data}"]
    command += [f"--control=fifo:{control},{answers}", f"--pid={os.getpid()}"]
    # Pipes opened for both directions, so that neither side waits for a process that has ended.
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as perf,
        control.open("r+b", buffering=0) as tell,
        answers.open("r+b", buffering=0) as heard,
    ):

        def watch(on: bool) -> None:
            if perf.poll() is not None:
                said = perf.stderr.read().decode() if perf.stderr else ""
                raise RuntimeError(f"perf ended: {said.strip()[:160]}")
            tell.write(b"enable\n" if on else b"disable\n")
            heard.read(5)  # "ack\n" and a zero

        watch(False)
        yield watch
        perf.terminate()
        perf.wait()


def _report(data: Path) -> dict[str, float]:
    """Return the percentage of each function."""
    command = ["perf", "report", "--quiet", "--stdio", "--no-children", "--sort=symbol"]
    command += ["--field-separator=\t", f"--input={data}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = {}
    for line in text.splitlines():
        percent, _, symbol = line.strip().partition("\t")
        if symbol:
            found[symbol] = found.get(symbol, 0.0) + float(percent.strip().rstrip("%"))
    return found
