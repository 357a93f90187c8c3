import pytest

from bench.__main__ import forget
from bench.found import Found
from bench.process import ROOT
from bench.publish import NOTES, decode_limits, publish
from bench.report import page, read_notes


def test_the_page_is_what_its_data_and_notes_give(config):
    data = (ROOT / "docs" / "assets" / "benchmarks.json").read_text(encoding="utf-8")
    found = Found.model_validate_json(data)
    expected = page(found, config, read_notes(NOTES))
    written = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert written == expected, "run `python3 dev.py bench -- --render`"


def test_all_is_written_and_reads_back(found, tmp_path):
    found.growth = [
        {"group": "batch", "series": "float32", "x": 1, "context": 512, "new": 32}
        | {"step_seconds": 0.01, "peak": 2**30}
    ]
    publish(found, tmp_path)
    again = Found.model_validate_json((tmp_path / "assets" / "benchmarks.json").read_text())
    assert again == found
    text = (tmp_path / "benchmarks.md").read_text()
    assert "assets/benchmarks-batch.png" in text
    assert (tmp_path / "assets" / "benchmarks-batch.png").exists()


def test_the_limit_of_a_batch_is_that_of_its_row(found, config):
    found.growth = [{"group": "batch", "series": "float32", "x": 8, "context": 512, "new": 32}]
    limits = decode_limits(found, config)
    assert limits.keys() == {8}
    # Twice as many bytes a weight, half the tokens a second.
    assert limits[8]["bfloat16"] == pytest.approx(2 * limits[8]["float32"])


def test_what_is_measured_again_is_forgotten_and_the_rest_is_kept():
    data = (ROOT / "docs" / "assets" / "benchmarks.json").read_text(encoding="utf-8")
    found, before = Found.model_validate_json(data), Found.model_validate_json(data)
    again = [row.task for row in found.rows if row.task.precision == "int8"]
    forget(found, again, ["llama.cpp"])
    assert [row.task for row in found.rows] == [r.task for r in before.rows if r.task not in again]
    gone = [line for line in before.agreement if line not in found.agreement]
    assert {(line.system, line.precision) for line in gone} == {
        ("ours", "int8"),
        ("llama.cpp", "int8"),
    }
