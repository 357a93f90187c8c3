"""The line in which requests wait for the model, which serves one at a time.

One thread runs all model work in order of arrival. It never waits for a reader: a client
that reads slowly keeps its own text in memory, and the next in line starts. Continuous
batching will replace this line.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class LineFullError(RuntimeError):
    """As many requests wait as may; `retry_after` says in how many seconds to try again."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class Job(Generic[T]):
    """One request's work: iterate over it for what it produces, or cancel it.

    `cancel` takes it out of the line, or stops it after the piece that it is at.
    """

    def __init__(self, produce: Callable[[], Generator[T, None, None]]) -> None:
        self._produce = produce
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[T | None] = asyncio.Queue()
        self._stop = threading.Event()
        self._future: Future[None] | None = None

    def start(self, thread: ThreadPoolExecutor) -> Future[None]:
        """Queue the work on the model's thread."""
        self._future = thread.submit(self._work)
        self._future.add_done_callback(lambda _: self._hand_over(None))
        return self._future

    def cancel(self) -> None:
        """Give up the place in the line, or stop at the next piece; harmless when done."""
        self._stop.set()
        if self._future is not None:
            self._future.cancel()

    async def __aiter__(self) -> AsyncIterator[T]:
        """Yield the pieces as they come; raise what the work raised."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if self._future is not None and not self._future.cancelled():
            self._future.result()

    def _work(self) -> None:
        with contextlib.closing(self._produce()) as pieces:
            for piece in pieces:
                if self._stop.is_set():
                    return
                self._hand_over(piece)

    def _hand_over(self, piece: T | None) -> None:
        # The loop is closed only when nobody reads any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Line:
    """The waiting line: first come, first served, and bounded.

    Args:
        max_waiting: requests that may wait besides the one that is served.
    """

    def __init__(self, max_waiting: int) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ds-serve-model")
        self._places = threading.Semaphore(1 + max_waiting)
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()
        self._max_waiting = max_waiting
        self._last_seconds = 1.0
        self.open = True

    @property
    def requests(self) -> int:
        """Requests that are served or waiting."""
        with self._lock:
            return len(self._jobs)

    def submit(self, produce: Callable[[], Generator[T, None, None]]) -> Job[T]:
        """Join the line; call it from a coroutine.

        Args:
            produce: makes the generator that does the work, on the model's thread.

        Raises:
            LineFullError: no place is free.
        """
        if not self._places.acquire(blocking=False):
            raise LineFullError(self._max_waiting, max(1, math.ceil(self._last_seconds)))
        job = Job(self._timed(produce))
        with self._lock:
            self._jobs.add(job)
        job.start(self._thread).add_done_callback(lambda _: self._leave(job))
        return job

    def close(self) -> None:
        """Cancel all work and let the thread end."""
        self.open = False
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        self._thread.shutdown(wait=False)

    def _leave(self, job: Job) -> None:
        with self._lock:
            self._jobs.discard(job)
        self._places.release()

    def _timed(
        self, produce: Callable[[], Generator[T, None, None]]
    ) -> Callable[[], Generator[T, None, None]]:
        def timed() -> Generator[T, None, None]:
            start = time.monotonic()
            with contextlib.closing(produce()) as pieces:
                yield from pieces
            self._last_seconds = time.monotonic() - start

        return timed
