"""A tiny random model with a tokenizer trained here, and ways to hold it still."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import keras
import pytest
import uvicorn
from fastapi.testclient import TestClient

from ds_model import CausalLM, ModelConfig, Tokenizer
from ds_serve import create_app

TEXTS = ["The state of the union is strong, my fellow citizens; naïve café doubts fade. "] * 40
PROMPT = "The state of the union"


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
    with TestClient(create_app(model, tokenizer, "tiny")) as client:
        yield client


@dataclass
class HeldModel:
    """The real model, giving one token for each permit; it tells when a stream has ended."""

    model: CausalLM
    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    started: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    given: int = 0

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def stream(self, *args: Any, **kwargs: Any):
        self.started.set()
        try:
            for chunk in self.model.stream(*args, **kwargs):
                for i in range(chunk.shape[1]):
                    assert self.permits.acquire(timeout=30)
                    self.given += 1
                    yield chunk[:, i : i + 1]
        finally:
            self.ended.set()

    def release_until_ended(self) -> None:
        """Give permits one by one; what notices an end in between leaves some unused."""
        while not self.ended.wait(0.02):
            self.permits.release()


@pytest.fixture
def held(model):
    held = HeldModel(model)
    yield held
    held.permits.release(10_000)


def wait_for(condition):
    """Wait until a condition holds; the alternative would be a hook in the server for tests."""
    never = threading.Event()
    for _ in range(1000):
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

    def start(app) -> LiveServer:
        server = LiveServer(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        assert server.up.wait(30)
        return server

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(30)
