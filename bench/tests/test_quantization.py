"""The figures of the page on small weights: in their columns, and those that were measured."""

import json

import numpy as np
import pytest

from bench.marks import replaced
from bench.quantization import DOCS, WINDOW, WINDOWS, Found, rounded, windows
from bench.quantization_report import draw, errors_table, figures, quality_table
from ds_model import Tokenizer

SPEED = {"mode": "x", "tried": {}, "first_seconds": 1.0, "ratio": None}
LINE = {"divergence": 2e-4, "same": 0.99, "bits_per_byte": 1.5}
FOUND = {
    "parameters": 1000,
    "tokens": 12,
    "quality": [
        {"system": "ours", "precision": "int8", "file_bytes": 1250, **LINE},
        {"system": "llama.cpp", "precision": "int8", "file_bytes": 1062, **LINE},
    ],
    "speeds": {
        "bench": [
            {
                "task": {"precision": "int8"},
                "systems": {
                    "ours": SPEED | {"speed": {"median": 200.0, "lowest": 1.0, "highest": 2.0}},
                    "llama.cpp": SPEED
                    | {
                        "speed": {"median": 100.0, "lowest": 1.0, "highest": 2.0},
                        "ratio": {"median": 2.0, "lowest": 1.9, "highest": 2.1},
                    },
                },
            }
        ]
    },
    "errors": {"int8": {"blk.0.ffn_up.weight": 0.005, "blk.1.ffn_up.weight": 0.007}},
    "missing": ["real weights: none"],
}


def test_a_form_has_its_bits_and_both_speeds_with_the_ratio_on_our_line():
    ours, theirs = quality_table(FOUND).splitlines()[-2:]
    assert ours == (
        "| int8 | 10.00 | 0.00 MB | 1.5000 | 2.0e-04 | 99.00% | - | 200 | 2.00 (1.90 to 2.10) |"
    )
    assert theirs.startswith("| llama.cpp Q8_0 | 8.50 |")
    assert theirs.endswith("| 100 | - |")


def test_errors_are_means_of_a_kind_and_the_worst_of_all():
    assert errors_table(FOUND["errors"]).splitlines()[-1] == "| int8 | 0.60% | 0.70% |"
    assert "- real weights: none" in figures(FOUND)


def test_the_plot_shows_something(tmp_path):
    draw(FOUND, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(("form", "most"), [("int8", 0.01), ("int4", 0.1), ("fp8", 0.04)])
def test_real_matrices_are_rounded_as_files_hold_them(form, most):
    matrix = np.random.default_rng(0).normal(size=(96, 64)).astype("f4")
    error = np.linalg.norm(rounded(matrix, form)[:] - matrix) / np.linalg.norm(matrix)
    assert most / 4 < error < most


def test_windows_overlap_by_the_token_that_is_only_read():
    tokenizer = Tokenizer.train(["the people of the United States, fellow citizens " * 40], 300)
    ids, size = windows(tokenizer)
    assert ids.shape == (WINDOWS, WINDOW + 1)
    np.testing.assert_array_equal(ids[1:, 0], ids[:-1, -1])
    assert size == len(tokenizer.decode(ids[:, 1:].ravel().tolist()).encode())


def test_the_page_shows_its_data():
    data = (DOCS / "assets" / "quantization.json").read_text(encoding="utf-8")
    found = Found.model_validate(json.loads(data)).model_dump()
    page = (DOCS / "phases" / "6-quantization.md").read_text(encoding="utf-8")
    assert replaced(page, figures(found)) == page
