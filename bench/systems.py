"""The systems of a run: which worker, in which environment, with which file."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.environments import PEERS, Environment, PeerError
from bench.found import OURS, TRANSFORMERS
from bench.process import ROOT, Process
from bench.tasks import PRECISIONS, Precision

LLAMA, VLLM = "llama.cpp", "vLLM"
GGUF: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
FEWER: dict[Precision, str] = {"int4": "q4_0"}  # by llama.cpp's own quantizer
CACHE_GIB = 2  # vLLM's, enough for 32 sequences of 544 tokens


@dataclass(frozen=True)
class System:
    """One system, ready to be started.

    Attributes:
        name: as the page shows it.
        module: its worker.
        python: the interpreter of its environment.
        model: what the worker opens.
        precisions: those it has.
        variables: of its process's environment.
    """

    name: str
    module: str
    python: Path
    model: Path
    precisions: tuple[Precision, ...]
    variables: dict[str, str] = field(default_factory=dict)

    def start(self, precision: Precision, threads: int, *, thorough: bool) -> Process:
        """Start a worker at one precision, which tries all its modes if it is to be thorough."""
        command = [str(self.python), "-m", self.module, "--model", str(self.model)]
        command += ["--precision", precision, "--threads", str(threads)]
        command += ["--thorough"] if thorough else []
        return Process(command, {"OMP_NUM_THREADS": str(threads), **self.variables})


def ours(model: Path) -> System:
    """Return this library, in the environment that runs this."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2"}
    return System(OURS, "bench.workers.ours", Path(sys.executable), model, PRECISIONS, quiet)


def peer(name: str, under: Path, model: Path, threads: int) -> System:
    """Install a peer and give it the model.

    Args:
        name: of `PEERS`.
        under: where environments lie.
        model: the Hugging Face directory.
        threads: for its pools.

    Raises:
        PeerError: it can't be had here.
    """
    environment = Environment(PEERS[name], under)
    environment.make()
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    variables: dict[str, str] = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if name == LLAMA:
        model = gguf(environment, Environment(PEERS[TRANSFORMERS], under), model)
        precisions = (*GGUF, *FEWER)
    if name == VLLM:
        variables |= vllm_variables(threads)
    return System(name, PEERS[name].module, environment.python, model, precisions, variables)


def gguf(llama: Environment, converter: Environment, model: Path) -> Path:
    """Convert the model to every type, beside itself, and return the folder.

    Raises:
        PeerError: the converter failed; its last line is the reason.
    """
    converter.make()
    out = model / "gguf"
    out.mkdir(exist_ok=True)
    source = next(llama.source.glob("*/vendor/llama.cpp"), None)
    if source is None:
        raise PeerError(f"no llama.cpp source under {llama.source}; remove {llama.folder}")
    for precision, kind in GGUF.items():
        command = [str(converter.python), "-m", "bench.workers.convert_gguf", str(source)]
        command += [str(model), str(out / f"{precision}.gguf"), kind]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise PeerError(f"converting to GGUF {kind} failed: {reason[:160]}")
    for precision, kind in FEWER.items():
        command = [str(llama.python), "-m", "bench.workers.quantize_gguf"]
        command += [str(out / "float32.gguf"), str(out / f"{precision}.gguf"), kind]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode:
            raise PeerError(f"llama.cpp does not quantize to {kind}: {run.stderr.strip()[-160:]}")
    return out


def vllm_variables(threads: int) -> dict[str, str]:
    """Return what vLLM needs on a machine without a GPU, at its fastest."""
    variables = {
        "VLLM_MLA_DISABLE": "1",  # its latent attention knows only latents of 512 + 64
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    allocator = tcmalloc()
    return variables | ({"LD_PRELOAD": str(allocator)} if allocator else {})


def tcmalloc() -> Path | None:
    """Return the allocator that vLLM's manual asks for, where it is installed."""
    folders = [Path("/usr/lib") / f"{os.uname().machine}-linux-gnu", Path("/usr/lib64")]
    found = [path for folder in folders for path in sorted(folder.glob("libtcmalloc*.so.4"))]
    return found[0] if found else None
