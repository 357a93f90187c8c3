"""What an experiment ran on: written down beside it, compared, made again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Self

import psutil
import tensorflow as tf


@dataclass(frozen=True)
class Environment:
    """Machine, Python, packages and commit.

    Attributes:
        python: Its version.
        system: Name and version of the operating system.
        processor: As the system names it.
        processors: How many.
        memory: Bytes.
        devices: TensorFlow's, as in "CPU" or "GPU: NVIDIA H100".
        commit: Of the git checkout that holds the working directory, with "+" where files differ
            from it; "" outside git.
        packages: Version of every installed distribution, by name; those installed from a folder
            as "VERSION @ FOLDER".
    """

    python: str
    system: str
    processor: str
    processors: int
    memory: int
    devices: tuple[str, ...]
    commit: str
    packages: dict[str, str]

    @classmethod
    def current(cls) -> Self:
        """Describe this process's surroundings."""
        return cls(
            python=platform.python_version(),
            system=platform.platform(),
            processor=_processor(),
            processors=os.cpu_count() or 1,
            memory=psutil.virtual_memory().total,
            devices=tuple(map(_device, tf.config.list_physical_devices())),
            commit=_commit(),
            packages=_packages(),
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds something else; names it.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**values, "devices": tuple(values["devices"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a snapshot of an environment: {error}") from error

    def differences(self, other: Environment) -> list[str]:
        """Say what differs, one line each; "" stands for what is not there."""
        lines = [
            f"{name}: {mine} -> {theirs}"
            for name in ("python", "system", "processor", "processors", "devices", "commit")
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]
        for name in sorted(self.packages.keys() | other.packages.keys()):
            mine, theirs = self.packages.get(name, ""), other.packages.get(name, "")
            if mine != theirs:
                lines.append(f"{name}: {mine} -> {theirs}")
        return lines

    def requirements(self) -> str:
        """Return the packages as a requirements file: exact versions, folders where they were."""
        lines = []
        for name, found in sorted(self.packages.items()):
            version, _, folder = found.partition(" @ ")
            lines.append(f"{name} @ file://{folder}" if folder else f"{name}=={version}")
        return "\n".join(lines) + "\n"

    def restore(self, folder: str | Path) -> Path:
        """Make a virtual environment with the same packages.

        Args:
            folder: Of the new environment; must not be there yet.

        Returns:
            Its interpreter.

        Raises:
            FileExistsError: The folder is there.
            ValueError: This Python's version is another one.
            subprocess.CalledProcessError: pip failed, and said why.
        """
        here = platform.python_version()
        if here.rpartition(".")[0] != self.python.rpartition(".")[0]:
            raise ValueError(f"the snapshot is of Python {self.python}; this is {here}")
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder}: is there; name a new folder")
        venv.create(folder, with_pip=True)
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        wanted = folder / "requirements.txt"
        wanted.write_text(self.requirements(), encoding="utf-8")
        command = [str(python), "-m", "pip", "install", "--no-deps", "-q", "-r", str(wanted)]
        subprocess.run(command, check=True)  # noqa: S603 - our own words
        return python


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device(device: tf.config.PhysicalDevice) -> str:
    details = tf.config.experimental.get_device_details(device)
    name = details.get("device_name")
    return f"{device.device_type}: {name}" if name else device.device_type


def _commit() -> str:
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    command = ["git", *words]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - ours
    return ran.stdout.strip()


def _packages() -> dict[str, str]:
    found = {}
    for distribution in distributions():
        origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
        folder = f" @ {origin.removeprefix('file://')}" if origin.startswith("file://") else ""
        found[distribution.name.lower().replace("_", "-")] = f"{distribution.version}{folder}"
    return found
