"""The client that all servers get: requests sent at once, answers read as they come.

A process of its own: `python -m bench.serving_client URL MODEL CLIENTS PROMPT NEW SEED`. It speaks
HTTP/1.1 over plain sockets and looks for events in what comes, so that it takes little of the two
processors that the server needs; every server is asked in the same words.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any
from urllib.parse import urlsplit


async def one(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send one request, and note when its tokens come."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    data = json.dumps(body).encode()
    head = (
        f"POST {parts.path}/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        "Connection: close\r\n\r\n"
    )
    begun = time.perf_counter()
    writer.write(head.encode() + data)
    await writer.drain()
    status = int((await reader.readline()).split()[1])
    first = last = None
    events, tokens = 0, 0
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        now = time.perf_counter()
        if line.startswith(b"data: [DONE]"):
            break
        event = json.loads(line[6:])
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        if event.get("choices"):
            events += 1
            first, last = first or now, now
    writer.close()
    if first is None or last is None:
        raise RuntimeError(f"{url} answered {status} and sent no token")
    return {
        "first": first - begun,
        "last": last - begun,
        "between": (last - first) / max(1, tokens - 1),
        "tokens": tokens,
        "events": events,
    }


async def crowd(
    url: str, model: str, clients: int, prompt: int, new: int, seed: int
) -> dict[str, Any]:
    """Let as many clients ask at once, each a prompt of its own, and wait for all."""
    numbers = random.Random(seed)  # noqa: S311 - prompts, no secrets
    bodies = [
        {
            "model": model,
            "prompt": [numbers.randrange(300, 8000) for _ in range(prompt)],
            "max_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(clients)
    ]
    begun = time.perf_counter()
    found = await asyncio.gather(*(one(url, body) for body in bodies))
    return {
        "seconds": time.perf_counter() - begun,
        "tokens": sum(answer["tokens"] for answer in found),
        "first": sorted(answer["first"] for answer in found),
        "between": sorted(answer["between"] for answer in found),
    }


def main() -> int:
    """Print one line of JSON."""
    url, model, *numbers = sys.argv[1:]
    clients, prompt, new, seed = map(int, numbers)
    print(json.dumps(asyncio.run(crowd(url, model, clients, prompt, new, seed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
