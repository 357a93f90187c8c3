"""Serving under load, beside other servers and beside ourselves with parts turned off.

`python -m bench.serving` writes docs/assets/serving.json, the plot and the figures in
docs/phases/6-serving.md. Parts, each kept when it is done: `peers` (streams at 1, 8, 32 and 128
clients beside vLLM, llama-server and plain `generate`), `engine` (continuous batching, prefix
reuse, what the engine adds to a step), `drafts` (on a trained `mini`), `endurance` (10,000
requests).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from bench.environments import PEERS, Environment, PeerError
from bench.machine import machine
from bench.process import ROOT
from bench.servers import LLAMA, OURS, VLLM, Recipe, Server, llama, ours, vllm
from bench.serving_report import publish
from bench.tasks import Precision
from bench.weights import write
from ds_model import Tokenizer
from ds_train.data import state_of_the_union
from ds_train.pretrain import pretrain
from ds_train.quickstart import quickstart_config

DOCS = ROOT / "docs"
WORK = ROOT / "build" / "serving"
PROMPT, NEW = 512, 128
CLIENTS = (1, 8, 32, 128)
REPEATS = {1: 5, 8: 3, 32: 2, 128: 1}  # of a crowd, each time a server runs
ROUNDS = 2  # times that each server runs, in turn
SETTLE = 1.0
STEPS = 900  # of the training of `mini`
GENERATE = "transformers"


class Crowd(BaseModel):
    """What one server did for so many clients at once; each figure a run.

    Attributes:
        speed: tokens written a second, all clients together.
        first: seconds to the first token, the median client's.
        late: the same, of the client at 95%.
        between: seconds from token to token, the median client's mean.
    """

    model_config = ConfigDict(extra="forbid")

    speed: list[float] = []
    first: list[float] = []
    late: list[float] = []
    between: list[float] = []


class Kept(BaseModel):
    """A server at one precision.

    Attributes:
        crowds: by the number of clients.
        start_seconds: from start to ready, each time.
        memory: bytes after 32 clients, each time.
    """

    model_config = ConfigDict(extra="forbid")

    crowds: dict[int, Crowd] = {}
    start_seconds: list[float] = []
    memory: list[int] = []


class Found(BaseModel):
    """Everything that was measured."""

    model_config = ConfigDict(extra="forbid")

    machine: dict[str, str] = {}
    peers: dict[Precision, dict[str, Kept]] = {}
    rounds: dict[Precision, int] = {}
    missing: list[str] = []
    engine: dict[str, Any] = {}
    drafts: dict[str, Any] = {}
    endurance: dict[str, Any] = {}


def write_model(directory: Path) -> None:
    """Write preset `bench` with a tokenizer that all servers read."""
    if (directory / "tokenizer.json").exists():
        return
    write(directory, max_position_embeddings=4096, topk_method="noaux_tc")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    texts = [document.text for document in state_of_the_union()]
    Tokenizer.train(texts, config["vocab_size"], chat_template=None).save_pretrained(directory)


def ask(server: Server, clients: int, seed: int) -> dict[str, Any]:
    """Let a crowd ask, in a process of its own."""
    command = [sys.executable, "-m", "bench.serving_client", server.url, "bench"]
    command += [str(number) for number in (clients, PROMPT, NEW, seed)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise PeerError(f"{clients} clients: {run.stderr.strip().splitlines()[-1][:200]}")
    return dict(json.loads(run.stdout))


def note(crowd: Crowd, found: dict[str, Any], clients: int) -> None:
    """Add one run; all tokens must have come."""
    if found["tokens"] != clients * NEW:
        raise PeerError(f"{found['tokens']} tokens came of {clients * NEW}")
    crowd.speed.append(round(found["tokens"] / found["seconds"], 1))
    crowd.first.append(round(statistics.median(found["first"]), 4))
    crowd.late.append(round(found["first"][int(0.95 * (clients - 1))], 4))
    crowd.between.append(round(statistics.median(found["between"]), 5))


def one_server(recipe: Recipe, kept: Kept, clients: tuple[int, ...], seed: int) -> None:
    """Start a server, measure its crowds, end it."""
    with Server(recipe) as server:
        kept.start_seconds.append(round(server.start_seconds, 2))
        ask(server, min(clients), seed)  # the first requests meet what is not yet loaded
        for count in clients:
            crowd = kept.crowds.setdefault(count, Crowd())
            for repeat in range(REPEATS[count]):
                time.sleep(SETTLE)
                note(crowd, ask(server, count, seed + 1 + repeat), count)
            say(f"  {recipe.name}, {count} clients: {crowd.speed[-1]} tokens/s")
        kept.memory.append(server.memory())


def peers(
    found: Found,
    precision: Precision,
    environments: Path,
    clients: tuple[int, ...],
    keep: Callable[[], None],
) -> None:
    """Measure all servers at one precision, in turn, the order turned round each time."""
    model = WORK / "bench"
    write_model(model)
    all_kept = found.peers.setdefault(precision, {})
    for number in range(found.rounds.get(precision, 0), ROUNDS):
        names = [OURS, VLLM, LLAMA]
        for name in names if number % 2 else reversed(names):
            kept = all_kept.setdefault(name, Kept())
            say(f"{precision}, round {number + 1}: {name}")
            try:
                if name == LLAMA:  # its cache is split among its slots: one server for each crowd
                    for count in clients:
                        recipe = llama(model, precision, count, environments)
                        one_server(recipe, kept, (count,), 1000 * number)
                else:
                    most = max(clients)
                    recipe = (
                        ours(model, precision, most)
                        if name == OURS
                        else vllm(model, precision, most, environments)
                    )
                    one_server(recipe, kept, clients, 1000 * number)
            except PeerError as error:
                found.missing.append(f"{name}, {precision}: {error}")
        found.rounds[precision] = number + 1
        keep()


def generate(
    found: Found,
    precision: Precision,
    environments: Path,
    clients: tuple[int, ...],
    keep: Callable[[], None],
) -> None:
    """Measure plain `generate` of transformers: all rows at once, without a server."""
    environment = Environment(PEERS["transformers"], environments)
    kept = found.peers[precision].setdefault(GENERATE, Kept())
    try:
        environment.make()
    except PeerError as error:
        found.missing.append(f"{GENERATE}, {precision}: {error}")
        return
    for count in clients:
        if count in kept.crowds:
            continue
        command = [str(environment.python), "-m", "bench.workers.transformers_generate"]
        command += [str(WORK / "bench"), precision, str(count), str(PROMPT), str(NEW)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            found.missing.append(f"{GENERATE}, {precision}, {count} rows: {reason[:160]}")
            return
        seconds = json.loads(run.stdout.splitlines()[-1])
        kept.crowds[count] = Crowd(speed=[round(count * NEW / s, 1) for s in seconds])
        say(f"  generate, {count} rows: {kept.crowds[count].speed}")
        keep()


def run_case(name: str, **given: Any) -> dict[str, Any]:
    """Run one of `bench.serving_cases` in a process of its own."""
    command = [sys.executable, "-m", "bench.serving_cases", name, json.dumps(given)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{name}: {run.stderr.strip().splitlines()[-1]}")
    result = dict(json.loads(run.stdout.splitlines()[-1]))
    say(f"{name} {given}: {result}")
    return result


def engine(found: Found) -> None:
    """Measure the engine beside itself with parts turned off."""
    model = str(WORK / "bench")
    write_model(WORK / "bench")
    found.engine = {
        "together": run_case("together", model=model, clients=8),
        "prefix": run_case("prefix", model=model, shared=2048),
        "overhead": [run_case("overhead", model=model, clients=n) for n in (1, 8, 32)],
    }


def trained() -> Path:
    """Train the quickstart's model, once, and return its directory."""
    return pretrain(quickstart_config(STEPS), state_of_the_union(), WORK / "run").model


def drafts(found: Found) -> None:
    """Let the MTP module of a trained `mini` guess."""
    model = str(trained())
    found.drafts = {
        str(clients): run_case("drafts", model=model, clients=clients) for clients in (1, 8, 32)
    }


def endurance(found: Found, requests: int) -> None:
    """Send random requests, a third of which are given up, and watch memory and blocks."""
    found.endurance = run_case("endurance", model=str(trained()), requests=requests)


def say(text: str) -> None:
    """Write a line of progress."""
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line's."""
    made = argparse.ArgumentParser(prog="bench.serving", description=__doc__)
    flag = made.add_argument
    flag("--parts", default="peers,engine,drafts,endurance", help="comma-separated [all]")
    flag("--precisions", default="bfloat16,float32", help="comma-separated [both]")
    flag("--clients", default=",".join(map(str, CLIENTS)), help="crowds [1,8,32,128]")
    flag("--requests", type=int, default=10_000, help="of the endurance run [10000]")
    flag("--again", action="store_true", help="forget what these parts found before")
    flag("--render", action="store_true", help="write the page again from its data")
    flag("--out", type=Path, default=DOCS, help="the folder of the page [docs]")
    flag("--environments", type=Path, default=ROOT / ".nox" / "bench", help="where peers lie")
    return made


def measure(found: Found, given: argparse.Namespace, keep: Callable[[], None]) -> None:
    """Measure what is missing."""
    WORK.mkdir(parents=True, exist_ok=True)
    found.machine = machine()
    clients = tuple(int(word) for word in given.clients.split(","))
    for part in given.parts.split(","):
        if given.again:
            setattr(found, part, {})
        if part == "peers":
            if given.again:
                found.rounds, found.missing = {}, []
            where = given.environments.resolve()
            for precision in given.precisions.split(","):
                peers(found, precision, where, clients, keep)
            for precision in given.precisions.split(","):
                generate(found, precision, where, clients, keep)
        elif not getattr(found, part):
            cases: dict[str, Callable[[], None]] = {
                "engine": lambda: engine(found),
                "drafts": lambda: drafts(found),
                "endurance": lambda: endurance(found, given.requests),
            }
            cases[part]()
        keep()


def main() -> int:
    """Measure what is missing, write the page."""
    given = parser().parse_args()
    data = given.out / "assets" / "serving.json"
    found = Found()
    if data.exists():
        found = Found.model_validate_json(data.read_text(encoding="utf-8"))

    def keep() -> None:
        data.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")

    if not given.render:
        measure(found, given, keep)
    publish(found.model_dump(), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
