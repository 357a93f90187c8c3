"""The table of where time goes, and what it counts."""

import shutil
import time

import pytest

from bench import shares
from bench.tasks import TASKS


def test_functions_are_counted_by_kind():
    found = shares.by_kind(
        {
            "[.] ds::thin<1, 4, (ds::Type)0>": 40.0,
            "[.] ds::put_tile<14>": 10.0,
            "[.] ds::multiply_in_vectors<2>": 10.0,
            "[.] ds::copy": 4.0,
            "[.] ds::Put::Put<ds::run_experts(ds::View const&)::{lambda}>": 4.0,
            "[.] std::_Function_handler<void (long, long), ds::rms_norm_op(ds::Context&)>": 4.0,
            "[.] ds::Threads::work": 4.0,
            "[.] Eigen::internal::EvalRange": 2.0,
            "[k] clear_page": 2.0,
        }
    )
    assert found["reading weights"] == 0.5
    assert found["multiplying"] == 0.25
    assert found["packing"] == 0.05
    assert found["sums, SwiGLU"] == 0.05
    assert found["optimizer, norms, losses"] == 0.05
    assert found["waiting"] == 0.05
    assert found["TensorFlow"] == 0.025
    assert found["all else"] == 0.025
    assert sum(found.values()) == pytest.approx(1)
    with pytest.raises(RuntimeError, match="no samples"):
        shares.by_kind({})


def test_without_perf_the_page_says_so(found, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    measured = shares.measure(tmp_path, lambda *_: {})
    found.kernels = {"shares": measured, "starting": {"1": 0.00065, "8": 0.0015}}
    text = shares.shares_table(found)
    assert "0.65 ms with 1, 1.50 ms with 8 streams" in text
    assert text.endswith("Not measured: perf is not on the PATH.")
    found.kernels = {}
    assert shares.shares_table(found) == ""


def test_the_table_has_a_row_for_each_task(found):
    row = dict.fromkeys([*shares.KINDS, shares.REST], 0.1)
    found.kernels = {"shares": {TASKS[0].key: row, TASKS[1].key: {"failed": "killed"}}}
    lines = shares.shares_table(found).splitlines()
    assert lines[-2].startswith(f"| {TASKS[0].title} | 10% | 10% |")
    assert lines[-1] == f"| {TASKS[1].title} | killed |"


@pytest.mark.skipif(shutil.which("perf") is None, reason="Linux' perf is not installed")
def test_perf_sees_only_what_it_is_to_watch(tmp_path):
    def busy():
        end = time.process_time() + 0.2
        while time.process_time() < end:
            sum(range(1000))

    data = tmp_path / "data"
    with shares._perf(tmp_path, data) as watch:
        busy()
    assert shares._report(data) == {}
    data.unlink()
    for pipe in ("control", "answers"):
        (tmp_path / pipe).unlink()
    with shares._perf(tmp_path, data) as watch:
        watch(True)
        busy()
        watch(False)
    assert sum(shares._report(data).values()) == pytest.approx(100, abs=1)
