import pytest

from bench.tasks import Task
from bench.workers.worker import Timed, Worker

TASK = Task("decode", 1, 4, "float32", new=10)


class Ways(Worker):
    """Three ways to do a task: one fails, one is slow, one is fast."""

    def __init__(self, speeds):
        super().__init__("model", "float32", 1, thorough=True)
        self.speeds, self.alive = speeds, None

    def versions(self):
        return {}

    def vocab_size(self):
        return 10

    def logits(self, ids):
        raise NotImplementedError

    def greedy(self, ids, new):
        raise NotImplementedError

    def modes(self, task):
        return {name: lambda name=name: self.setup(name, task) for name in self.speeds}

    def setup(self, name, task):
        self.alive = name  # as setting up a mode of one model ends the one before

        def run():
            if self.speeds[self.alive] is None:
                raise MemoryError("too large")
            return Timed(task.tokens / self.speeds[self.alive], task.tokens)

        return run


def test_the_fastest_mode_is_kept_and_set_up_again():
    worker = Ways({"fast": 100.0, "broken": None, "slow": 20.0})
    found = worker.prepare(TASK)
    assert found["mode"] == "fast"
    assert found["tried"] == {"fast": 100.0, "broken": "MemoryError: too large", "slow": 20.0}
    assert worker.run() == [0.1, 10]


def test_a_task_that_cannot_be_done_says_why():
    found = Ways({"only": None}).prepare(TASK)
    assert found == {
        "mode": None,
        "first_seconds": None,
        "tried": {"only": "MemoryError: too large"},
    }


def test_running_needs_preparing():
    with pytest.raises(RuntimeError, match="prepare"):
        Ways({}).run()
