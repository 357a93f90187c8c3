"""The table of operations alone, and what its figures are figures of."""

from types import SimpleNamespace

import tensorflow as tf

from bench.kernels import _row, kernels_table


def test_speeds_stand_beside_the_limit(found):
    found.limits = {"gemm_float32": 200.0}
    rows = [
        {"operation": "product 1 x 2 x 3", "precision": "float32", "ours": 150.0, "stock": 120.4},
        {"operation": "experts", "precision": "bfloat16", "ours": 400.0, "stock": 90.0},
    ]
    found.kernels = {"rows": rows}
    text = kernels_table(found)
    assert "| product 1 x 2 x 3 | float32 | 150 | 120 | 75% |" in text
    assert "| experts | bfloat16 | 400 | 90 | - |" in text
    found.kernels = {}
    assert kernels_table(found) == ""


def test_operations_that_failed_say_why(found):
    found.kernels = {"failed": "ended with status -9: killed"}
    assert kernels_table(found).endswith("\n\nended with status -9: killed")


def test_a_speed_is_work_over_the_shortest_time(monkeypatch):
    clock = iter([0.0, 1.0] * 2 + [0.0, 4.0] * 2 + [0.0, 2.0, 0.0, 5.0] * 9)
    monkeypatch.setattr("bench.kernels.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    row = _row("product", "float32", 1e10, {"ours": lambda: None, "stock": lambda: tf.constant(0)})
    assert (row["ours"], row["stock"]) == (5.0, 2.0)
