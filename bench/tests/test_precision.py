"""The figures of the FP8 page: paired by seed, and those that were measured."""

import pytest

from bench.marks import BEGIN, END, replaced
from bench.precision import DOCS, VARIANTS, config_of, in_order, read
from bench.precision_report import draw, figures, losses, runs_by_variant


def run(variant, seed, last):
    return {
        "variant": variant,
        "seed": seed,
        "steps": 20,
        "curve": [5.0, last],
        "last": last,
        "step_seconds": 0.5,
    }


RUNS = [
    run("FP8", 1, 4.02),
    run("BF16", 0, 4.0),
    run("BF16", 1, 4.0),
    run("FP8", 0, 3.99),
    run("FP8, one scale a tensor", 0, 4.4),
]


def test_a_run_is_compared_with_the_same_seed_in_bf16():
    text = losses(runs_by_variant(RUNS, list(VARIANTS)))
    assert "| BF16 | 2 | 4.0000 (4.0000 to 4.0000) | - | - |" in text
    assert "| FP8 | 2 | 4.0050 (3.9900 to 4.0200) | +0.12% (-0.25%, +0.50%) | yes |" in text
    assert "| +10.00% (+10.00%) | no |" in text


def test_memory_stands_beside_the_losses():
    held = {"weights": 4 << 20, "small_weights": 1 << 20, "moments": 4 << 20, "step": 9 << 20}
    found = {"runs": RUNS, "memory": {"FP8": held, "float32": {"failed": "killed"}}}
    text = figures(found, runs_by_variant(RUNS, list(VARIANTS)))
    assert "| FP8 | 4.0 MiB | 1.0 MiB | 4.0 MiB | 9.0 MiB | 0.50 |" in text
    assert "float32 |" not in text.split("\n\n")[1].replace("float32 weights |", "")


def test_figures_replace_those_between_the_marks():
    page = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert replaced(page, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter"
    with pytest.raises(ValueError, match="the page has no"):
        replaced("no marks", "new")


def test_the_plot_shows_something(tmp_path):
    draw(runs_by_variant(RUNS, list(VARIANTS)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_main_precisions_come_first_with_all_seeds():
    order = in_order(list(VARIANTS), 2)
    assert order[:6] == [(name, seed) for seed in (0, 1) for name in ("BF16", "FP8", "float32")]
    assert len(order) == 2 * len(VARIANTS) == len(set(order))


def test_variants_differ_in_rounding_alone():
    configs = [config_of(name, 600, 2) for name in VARIANTS]
    alike = {"train": {"dtype_policy"}, "fp8": True}
    assert len({config.model_dump_json(exclude=alike) for config in configs}) == 1
    rounding = {(c.train.dtype_policy, c.fp8.model_dump_json()) for c in configs}
    assert len(rounding) == len(configs)


def test_the_page_shows_its_data():
    found = read(DOCS / "assets" / "fp8.json").model_dump()
    page = (DOCS / "phases" / "1-fp8.md").read_text(encoding="utf-8")
    shown = figures(found, runs_by_variant(found["runs"], list(VARIANTS)))
    assert replaced(page, shown) == page
