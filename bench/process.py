"""The driver's side of a worker: start it, ask it, see what it costs, end it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
MOST_MEMORY = 0.6  # of the machine's, for one worker


class WorkerError(Exception):
    """A worker did not start, or answered with an error; the message is one line."""


class Process:
    """A worker in a session of its own, so that its children are counted and ended with it.

    Args:
        command: what to start.
        environment: variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed with the process
            mode="w+", suffix=".log", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        # One that asks for too much fails by itself, before the system ends whom it likes.
        most = int(MOST_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        with suppress(ProcessLookupError):
            resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (most, most))

    @property
    def session(self) -> int:
        """The id that its own and its children's entries under /proc carry."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def ask(self, call: str, **arguments: Any) -> Any:
        """Return the value of one call.

        Raises:
            WorkerError: it failed, or the worker has ended.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise WorkerError("the worker has no line to talk over")
        try:
            self._process.stdin.write(json.dumps({"call": call, "with": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(self._last_words())
        found = json.loads(line)
        if "error" in found:
            raise WorkerError(found["error"])
        return found["value"]

    def close(self) -> None:
        """End the worker and its children."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.session, signal.SIGKILL)
        self._process.wait()
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
        """Return the last line that the worker wrote before it ended."""
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        reason = lines[-1] if lines else "it said nothing"
        return f"ended with status {self._process.returncode}: {reason[:200]}"
