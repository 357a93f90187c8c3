"""The servers that are compared: how each is had, started, and known to be ready."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.environments import PEERS, Environment, PeerError
from bench.load import session_seconds
from bench.process import ROOT
from bench.systems import vllm_variables
from bench.tasks import Precision

OURS, VLLM, LLAMA = "ours", "vLLM", "llama-server"
CONTEXT = 704  # tokens of a text: 512 read, 128 written, and some to spare
START_SECONDS = 300
TYPES: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Recipe:
    """How a server is started.

    Attributes:
        name: as the page shows it.
        command: with `{port}` where that goes.
        variables: of its process's environment.
    """

    name: str
    command: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


def ours(model: Path, precision: Precision, clients: int) -> Recipe:
    """Return our server."""
    command = [sys.executable, "-m", "ds_serve", "serve", str(model), "--port", "{port}"]
    command += ["--dtype", precision, "--name", "bench", "--max-running", str(max(32, clients))]
    command += ["--cache-tokens", str(max(32, clients) * CONTEXT), "--step-tokens", "1024"]
    return Recipe(OURS, tuple(command), {"TF_CPP_MIN_LOG_LEVEL": "2"})


def vllm(model: Path, precision: Precision, clients: int, under: Path) -> Recipe:
    """Return vLLM's, at its defaults but for what it needs to run here.

    Raises:
        PeerError: it can't be had.
    """
    environment = Environment(PEERS["vLLM"], under)
    environment.make()
    command = [str(environment.python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "bench", "--dtype", precision]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(max(32, clients))]
    command += ["--port", "{port}", "--host", "127.0.0.1", "--disable-log-stats"]
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables |= vllm_variables(os.cpu_count() or 1)
    variables["PATH"] = f"{environment.python.parent}:{os.environ['PATH']}"
    return Recipe(VLLM, tuple(command), variables)


def llama(model: Path, precision: Precision, clients: int, under: Path) -> Recipe:
    """Return llama.cpp's, with a slot for each client.

    Raises:
        PeerError: it can't be had.
    """
    command = [str(llama_server(under)), "-m", str(gguf(model, precision, under))]
    command += ["--port", "{port}", "--host", "127.0.0.1", "-c", str(clients * CONTEXT)]
    command += ["-np", str(clients), "-t", str(os.cpu_count() or 1), "-b", "2048", "-ub", "512"]
    command += ["--no-webui", "--alias", "bench"]
    return Recipe(LLAMA, tuple(command))


def llama_server(under: Path) -> Path:
    """Return the server, compiled from the sources that llama.cpp's package brings.

    Raises:
        PeerError: it can't be compiled here.
    """
    environment = Environment(PEERS["llama.cpp"], under)
    environment.make()
    source = next(environment.source.glob("*/vendor/llama.cpp"), None)
    build = environment.folder / "server"
    made = build / "bin" / "llama-server"
    if made.exists():
        return made
    if source is None:
        raise PeerError(f"no llama.cpp source under {environment.source}")
    print(f"compiling llama-server into {build} ...", file=sys.stderr, flush=True)
    switches = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF"]
    switches += ["-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
    processors = str(os.cpu_count() or 1)
    for words in (
        ["-B", str(build), "-S", str(source), *switches],
        ["--build", str(build), "--target", "llama-server", "-j", processors],
    ):
        run = subprocess.run(["cmake", *words], capture_output=True, text=True, check=False)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise PeerError(f"llama-server can't be compiled: {reason[:160]}")
    return made


def gguf(model: Path, precision: Precision, under: Path) -> Path:
    """Return the model as llama.cpp reads it, tokenizer included.

    Raises:
        PeerError: the converter failed.
    """
    out = model / f"{precision}.gguf"
    if out.exists():
        return out
    converter = Environment(PEERS["transformers"], under)
    converter.make()
    source = next(Environment(PEERS["llama.cpp"], under).source.glob("*/vendor/llama.cpp"))
    command = [str(converter.python), "-m", "bench.workers.convert_gguf", str(source), str(model)]
    command += [str(out), TYPES[precision], "tokenizer"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise PeerError(f"converting to GGUF failed: {reason[:160]}")
    return out


class Server:
    """A server that runs.

    Args:
        recipe: how it is started.

    Attributes:
        url: of its API.
        start_seconds: from start to ready.

    Raises:
        PeerError: it did not become ready; its last line is the reason.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - closed below
        begun = time.monotonic()
        self._process = subprocess.Popen(
            [word.replace("{port}", str(port)) for word in recipe.command],
            stdout=self._log,
            stderr=self._log,
            cwd=tempfile.gettempdir(),
            env={**os.environ, **recipe.variables},
            start_new_session=True,
        )
        health = f"http://127.0.0.1:{port}/health"
        while not _answers(health):
            if self._process.poll() is not None or time.monotonic() - begun > START_SECONDS:
                reason = self._last_words()
                self.close()
                raise PeerError(f"{recipe.name} did not start: {reason}")
            time.sleep(0.1)
        self.start_seconds = time.monotonic() - begun

    @property
    def session(self) -> int:
        """The id that its own and its children's entries under /proc carry."""
        return self._process.pid

    def seconds(self) -> float:
        """Return the processors' time that it took so far."""
        return session_seconds([self.session])

    def memory(self) -> int:
        """Return the bytes that its processes hold, what they share counted once."""
        total = 0
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError, IndexError):
                stat = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                if int(stat[3]) == self.session:
                    rollup = (entry / "smaps_rollup").read_text(encoding="ascii")
                    line = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
                    total += int(line.split()[1]) * 1024
        return total

    def close(self) -> None:
        """End it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.session, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
                break
        with suppress(ProcessLookupError):
            os.killpg(self.session, signal.SIGKILL)  # children that it left
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1][:200] if lines else "it said nothing"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 - our own machine
            return bool(response.status == 200)
    except OSError:
        return False
