import pytest

from bench import race


class Fake:
    """A worker that always gives the same speed and notes when it ran."""

    session = -1

    def __init__(self, name, speed, log):
        self.name, self.speed, self.log = name, speed, log

    def ask(self, call):
        assert call == "run"
        self.log.append(self.name)
        if self.speed is None:
            raise race.WorkerError("out of memory")
        return [2.0, 2.0 * self.speed]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(race, "SETTLE", 0)

    def run(rounds, **speeds):
        log = []
        workers = {name: Fake(name, speed, log) for name, speed in speeds.items()}
        made = race.Race(workers, "ours", list(workers))
        for index in range(rounds):
            made.round(index)
        return made, log

    return run


def test_each_peer_runs_right_beside_us(run):
    made, log = run(2, ours=30, a=10, b=15)
    assert log == ["ours", "a", "b", "ours", "ours", "b", "a", "ours"]
    assert made.pairs == {"a": [(30, 10)] * 2, "b": [(30, 15)] * 2}
    assert made.runs["ours"] == [30] * 4


def test_without_peers_we_run_alone(run):
    made, log = run(3, ours=30)
    assert log == ["ours"] * 3
    assert made.pairs == {}


def test_without_us_the_peers_run_alone(run):
    made, log = run(2, a=10, b=15)
    assert log == ["a", "b"] * 2
    assert made.runs == {"a": [10, 10], "b": [15, 15]}
    assert made.pairs == {}


def test_a_peer_that_fails_is_left_out_and_the_rest_goes_on(run):
    made, log = run(2, ours=30, a=None, b=15)
    assert made.failed == {"a": "out of memory"}
    assert log.count("a") == 1
    assert made.pairs == {"a": [], "b": [(30, 15)] * 2}
