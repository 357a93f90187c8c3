"""What `ds-model convert` and `quantize` take for gigabytes of FP8, beside a plain copy.

`python -m bench.conversion` makes a directory of the released layout with random numbers, converts
it, and writes docs/assets/conversion.json and its table in docs/how-to/load-released-weights.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.marks import replaced
from bench.process import ROOT
from ds_model import ModelConfig
from ds_model.checkpoint.fp8 import SCALES, is_quantized, quantization_config
from ds_model.checkpoint.layout import layout
from ds_model.checkpoint.writer import TensorWriter

DOCS = ROOT / "docs"
WORK = ROOT / "build" / "conversion"
SHARD = 1 << 30  # bytes
# V3's own widths, so that tensors are as large as they are there; fewer layers and experts.
CHANGED = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 16}
SMALLER = {"n_group": 4, "topk_group": 2, "vocab_size": 16384}
GB = 1e9


def write_source(directory: Path) -> dict[str, int]:
    """Write the directory that is converted; return its bytes and its largest tensor's numbers."""
    config = ModelConfig.preset("v3-671b").replace(**CHANGED, **SMALLER)
    rng = np.random.default_rng(0)
    # All finite numbers of E4M3, and none of them NaN.
    codes = rng.integers(0, 256, 1 << 24, np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    with TensorWriter(directory, SHARD) as writer:
        tensors = {s.name: s for entry in layout(config) for s in entry.sources}.values()
        for source in tensors:
            count = int(np.prod(source.shape))
            if is_quantized(source.name):
                values = np.resize(codes, count).view(ml_dtypes.float8_e4m3fn)
                writer.add(source.name, values.reshape(source.shape))
                blocks = [-(-size // 128) for size in source.shape]
                writer.add(source.name + SCALES, np.full(blocks, 0.01, np.float32))
            else:
                kind = np.float32 if source.name.endswith("bias") else ml_dtypes.bfloat16
                writer.add(source.name, np.full(source.shape, 0.5, kind))
        writer.finish()
    values = config.to_dict() | {"quantization_config": quantization_config()}
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    largest = max(int(np.prod(source.shape)) for source in tensors)
    return {"source": size(directory), "largest": largest}


def size(directory: Path) -> int:
    """Return the bytes of a directory's files."""
    return sum(path.stat().st_size for path in directory.iterdir())


class Watch:
    """The most memory of its own that a process held, sampled; mapped files do not count."""

    def __init__(self, process: int) -> None:
        self.most = 0
        self._status = Path(f"/proc/{process}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Stop sampling and return the most, in bytes."""
        self._ended.set()
        self._thread.join()
        return self.most

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            try:
                lines = self._status.read_text(encoding="ascii").splitlines()
            except OSError:
                return
            own = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
            self.most = max(self.most, *(int(kilobytes) * 1024 for kilobytes in own), 0)


def convert(source: Path, target: Path, *words: str, how: str = "convert") -> dict[str, Any]:
    """Convert in a process of its own, to the disk and not just to the cache."""
    shutil.rmtree(target, ignore_errors=True)
    program = "from ds_model.cli import main; main()"
    command = [sys.executable, "-c", program, how, str(source), str(target), *words]
    start = time.perf_counter()
    running = subprocess.Popen(command)
    watch = Watch(running.pid)
    if running.wait():
        raise RuntimeError(f"{' '.join(words)} ended with status {running.returncode}")
    seconds, most = time.perf_counter() - start, watch.stop()
    found = {"seconds": seconds, "own_memory": most, "written": size(target)}
    shutil.rmtree(target)
    return found


def idle_memory() -> int:
    """Return what the program holds before it does anything: TensorFlow, mostly."""
    program = (
        "import ds_model.cli; from pathlib import Path;"
        "s=Path('/proc/self/status').read_text().splitlines();"
        "print([l.split()[1] for l in s if l.startswith('RssAnon:')][0])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    return int(run.stdout) * 1024


def copy(source: Path, target: Path) -> dict[str, Any]:
    """Copy the directory, to the disk."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    found = {"seconds": time.perf_counter() - start, "written": size(target)}
    shutil.rmtree(target)
    return found


def table(found: dict[str, Any]) -> str:
    """Return the page's table."""
    head = (
        f"From {found['source'] / GB:.1f} GB of FP8 in shards of {SHARD / GB:.1f} GB; the largest "
        f"tensor has {found['largest'] / 1e6:.0f} million numbers. Memory is the process's own, "
        f"beyond the {found['idle'] / GB:.2f} GB that it holds before it begins."
    )
    lines = [
        head,
        "",
        "| | seconds | written | GB a second, read and written | of a plain copy | memory |",
        "|---|---|---|---|---|---|",
    ]
    plain = rate(found["source"], found["runs"]["plain copy"])
    for name, run in found["runs"].items():
        speed = rate(found["source"], run)
        held = f"{(run['own_memory'] - found['idle']) / GB:.2f} GB" if "own_memory" in run else "-"
        lines.append(
            f"| {name} | {run['seconds']:.1f} | {run['written'] / GB:.1f} GB | {speed:.2f} | "
            f"{speed / plain:.0%} | {held} |"
        )
    return "\n".join(lines)


def rate(source: int, run: dict[str, Any]) -> float:
    """Return GB a second, what is read and what is written together."""
    return (source + run["written"]) / run["seconds"] / GB


def main() -> int:
    """Measure, or write the table again."""
    parser = argparse.ArgumentParser(prog="bench.conversion", description=__doc__)
    parser.add_argument("--render", action="store_true", help="write the page from its data")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder of the page [docs]")
    given = parser.parse_args()
    data = given.out / "assets" / "conversion.json"
    if not given.render:
        source, target = WORK / "source", WORK / "target"
        shutil.rmtree(WORK, ignore_errors=True)
        found: dict[str, Any] = {**write_source(source), "idle": idle_memory()}
        found["runs"] = {
            "plain copy": copy(source, target),
            "as it is": convert(source, target),
            "to bfloat16": convert(source, target, "--dtype", "bfloat16"),
            "to float32": convert(source, target, "--dtype", "float32"),
            "to fp8, rounded anew": convert(source, target, "--dtype", "fp8"),
            "to int8": convert(source, target, "--mode", "int8", how="quantize"),
            "to int4": convert(source, target, "--mode", "int4", how="quantize"),
        }
        shutil.rmtree(WORK)
        data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = given.out / "how-to" / "load-released-weights.md"
    shown = table(json.loads(data.read_text(encoding="utf-8")))
    page.write_text(replaced(page.read_text(encoding="utf-8"), shown), encoding="utf-8")
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
