"""A tiny random model with a tokenizer trained here, and ways to hold it still."""

from __future__ import annotations

import queue
import threading
from typing import Any

import keras
import pytest
import uvicorn
from fastapi.testclient import TestClient

from ds_model import CausalLM, ModelConfig, Tokenizer
from ds_serve import Engine, EngineOptions, Text, create_app

TEXTS = ["The state of the union is strong, my fellow citizens; naïve café doubts fade. "] * 40
PROMPT = "The state of the union"
SMALL = EngineOptions(max_running=4, max_waiting=8, step_tokens=16, block_size=4)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=330)


@pytest.fixture(scope="session")
def base_tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=330, chat_template=None)


def as_document(tokenizer, text):
    """Ids of a text as the model was trained to meet it: with the first token in front."""
    return [tokenizer.bos_token_id, *tokenizer.encode(text)]


@pytest.fixture(scope="session")
def model(tokenizer):
    keras.utils.set_random_seed(7)
    # Large weights, so that greedy text varies.
    config = ModelConfig.preset("tiny").replace(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=128,
        initializer_range=0.3,
        num_nextn_predict_layers=1,
        eos_token_id=None,
    )
    model = CausalLM(config)
    # What is no plain text gets logit 0, which random ones beat: greedy text has no end token
    # and no parts of characters.
    texts = [tokenizer.decode([i]) for i in range(config.vocab_size)]
    unwanted = [i for i, t in enumerate(texts) if not (t.isascii() and t.isprintable() and t)]
    kernel = model.lm_head.kernel.numpy()
    kernel[:, unwanted] = 0.0
    model.lm_head.kernel.assign(kernel)
    return model


@pytest.fixture(scope="session")
def greedy(model):
    """The greedy continuation by `CausalLM.generate`, as ids: what served text must equal."""

    def continue_prompt(ids, new):
        return model.generate([ids], max_new_tokens=new, eos_token_id=()).numpy()[0, len(ids) :]

    return continue_prompt


@pytest.fixture(scope="session")
def client(model, tokenizer):
    with TestClient(create_app(model, tokenizer, "tiny", options=SMALL)) as client:
        yield client


def check_each_step(engine):
    """Let the engine's books be checked after each step; a fault is kept for the test to see."""
    faults: list[AssertionError] = []

    def check(_):
        try:
            engine.scheduler.check()
        except AssertionError as fault:
            faults.append(fault)

    engine.observers.append(check)
    return faults


class Writer:
    """An engine, and texts that it has written."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.faults = check_each_step(engine)
        engine.start()

    def begin(self, prompt, rules, **more):
        """A text, and the queue of its updates."""
        updates: queue.SimpleQueue[Any] = queue.SimpleQueue()
        return Text(prompt, rules, updates.put, **more), updates

    def write(self, *asked, **more):
        """The ids that come of prompts and rules, all submitted at once."""
        begun = [self.begin(prompt, rules, **more) for prompt, rules in asked]
        self.engine.submit([text for text, _ in begun])
        return [[token.id for token in tokens_of(updates)] for _, updates in begun]

    def close(self):
        self.engine.close()
        assert not self.faults
        assert self.engine.scheduler.pool.free == self.engine.scheduler.pool.blocks


def tokens_of(updates, timeout=60):
    """All tokens of a text, until its end."""
    tokens = []
    while True:
        update = updates.get(timeout=timeout)
        if update.error is not None:
            raise update.error
        tokens += update.tokens
        if update.finish_reason is not None:
            return tokens


@pytest.fixture(scope="module")
def writer(model):
    writer = Writer(Engine(model, SMALL))
    yield writer
    writer.close()


class HeldSteps:
    """An engine's steps, one for each permit."""

    def __init__(self, engine: Engine) -> None:
        self.steps = engine.steps
        self.permits = threading.Semaphore(0)
        self.begun = threading.Event()
        self.done = 0
        engine.steps = self

    def run(self, plan):
        self.begun.set()
        assert self.permits.acquire(timeout=60)
        self.done += 1
        return self.steps.run(plan)

    def __getattr__(self, name):
        return getattr(self.steps, name)


@pytest.fixture
def held(model):
    """An engine whose steps wait for permits; it gets as many as it likes in the end."""
    engine = Engine(model, EngineOptions(max_running=1, max_waiting=1, block_size=8))
    steps = HeldSteps(engine)
    yield engine, steps
    steps.permits.release(100_000)


def wait_for(condition):
    """Wait until a condition holds; the alternative would be a hook in the server for tests."""
    never = threading.Event()
    for _ in range(2000):
        if condition():
            return
        never.wait(0.01)
    raise TimeoutError


class LiveServer(uvicorn.Server):
    """uvicorn in a thread; `url` is known once `up` is set."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.port = self.servers[0].sockets[0].getsockname()[1]
        self.up.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@pytest.fixture(scope="module")
def live():
    """Starts servers on free ports and stops them."""
    running = []

    def start(app, **more) -> LiveServer:
        server = LiveServer(uvicorn.Config(app, port=0, log_level="warning", **more))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        assert server.up.wait(30)
        return server

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(30)
