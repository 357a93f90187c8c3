import json

import pytest

from bench import cost, guard


def test_a_row_fails_below_its_floor_by_more_than_the_margin():
    floors = {"a": 0.4, "b": 0.4}
    assert guard.below({"a": 0.31, "b": 0.6, "new": 0.01}, floors) == []
    assert guard.below({"a": 0.29, "b": 0.6}, floors) == [
        "a is slower: 29.0% of the limit, floor 40.0% less 25%"
    ]


def test_the_best_run_is_held_to_the_best_limit(config):
    task = guard.TASKS_GUARDED[0]
    slow = {"gemm_float32": 100.0, "read_1024mb": 10.0}
    fast = {"gemm_float32": 200.0, "read_1024mb": 20.0}
    share = guard.best_share(config, task, [10.0, 30.0], [fast, slow])
    assert share == pytest.approx(30.0 * cost.train_flops(config) / 200e9)


def test_floors_are_of_rows_that_are_guarded():
    floors = json.loads(guard.FLOORS.read_text(encoding="utf-8"))
    assert floors.keys() <= {task.key for task in guard.TASKS_GUARDED}
    assert all(0 < floor < 1 for floor in floors.values())
