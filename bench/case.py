"""One measurement in a fresh process, so that its peak memory is its own.

`python -m bench.case NAME JSON` prints one line of JSON. Memory is what the process held at its
peak beyond what it held with everything imported and no model. A case that asks for more memory
than most of the machine has fails by itself, and with it nothing else.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.protocol import one_line, private_stdout

MOST_MEMORY = 0.75  # of the machine's
REPEATS = 3
LONG = 20.0  # seconds: what takes longer is not done again
READY = [0]  # bytes held once everything is imported; set by `main`


def peak_bytes() -> int:
    """Return the most that this process has held, beyond its imports."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - READY[0]


def median_seconds(run: Callable[[], object]) -> float:
    """Return the median of several calls, after one that compiles; of fewer if they are long."""
    times = [seconds(run)]
    if times[0] < LONG:
        times = [seconds(run)]
        while len(times) < REPEATS and sum(times) < LONG:
            times.append(seconds(run))
    return statistics.median(times)


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(name: str, arguments: str) -> None:
    """Do one case of `bench.cases` and print what it found, or why it could not."""
    out = private_stdout()
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_DATA, (int(MOST_MEMORY * whole),) * 2)
    from bench import cases  # noqa: PLC0415 - start-up cases must see an empty process

    READY[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found: dict[str, Any]
    try:
        found = getattr(cases, name)(**json.loads(arguments))
    except Exception as error:  # noqa: BLE001 - out of memory has many names; the point says so
        found = {"failed": one_line(error)}
    out.write(json.dumps(found) + "\n")
    out.flush()


if __name__ == "__main__":
    from bench.case import main as run  # the module that `cases` imports, not a second copy

    run(*sys.argv[1:])
