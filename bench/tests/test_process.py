import os
import sys

import pytest

from bench.load import session_seconds
from bench.process import Process, WorkerError

ECHO = """
import sys
from bench.protocol import private_stdout, serve
answers = private_stdout()
print("noise on stdout")
tasks = {
    "echo": lambda word: word,
    "sum": lambda n: sum(range(n)),
    "end": lambda: sys.exit("no such thing"),
}
serve(tasks, sys.stdin, answers)
"""


@pytest.fixture
def worker():
    with Process([sys.executable, "-c", ECHO], {}) as process:
        yield process


def test_answers_come_back_whatever_else_is_printed(worker):
    assert worker.ask("echo", word=["é", 1.5]) == ["é", 1.5]
    with pytest.raises(WorkerError, match="KeyError: 'shout'"):
        worker.ask("shout")
    assert worker.ask("echo", word="still here") == "still here"


def test_a_worker_that_ends_says_its_last_words(worker):
    with pytest.raises(WorkerError, match="ended with status 1: no such thing"):
        worker.ask("end")


def test_a_worker_is_a_session_whose_time_can_be_read(worker):
    worker.ask("sum", n=5_000_000)  # some ticks of the clock, which are 10 ms
    assert os.getsid(worker.session) == worker.session
    assert session_seconds([worker.session]) > 0
    worker.close()
    assert session_seconds([worker.session]) == 0
