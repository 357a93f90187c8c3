import pytest
from matplotlib.image import imread

from bench import growth, growth_plots, growth_report, startup_report
from ds_model import parameter_counts

GIB = 2**30


def test_more_experts_cost_no_more_active_parameters_and_get_as_many_tokens(config):
    steps = [p for p in growth.points("m") if (p.group, p.series) == ("experts", "step")]
    assert [point.x for point in steps] == [32, 64, 128, 256]
    shares, active = set(), []
    for point in steps:
        changed = config.replace(n_routed_experts=point.x)
        tokens = point.arguments["batch"] * point.arguments["length"]
        shares.add(tokens * changed.num_experts_per_tok / point.x)
        router = 7 * point.x * changed.hidden_size
        active.append(parameter_counts(changed).active - router)
    assert shares == {128.0}
    assert len(set(active)) == 1


def test_every_point_is_a_valid_model(config):
    cases = {"batch", "context", "new", "length", "precision", "model", "recompute"}
    for point in growth.points("m"):
        config.replace(**{k: v for k, v in point.arguments.items() if k not in cases})


def test_scaling_by_one_is_the_preset(config):
    assert config.replace(**growth.scaled(512)) == config


@pytest.fixture
def measured():
    decode = {"group": "experts", "series": "decode", "parameters": 1e8, "peak": GIB}
    step = {"group": "experts", "series": "step", "parameters": 1e8, "peak": 3 * GIB}
    step |= {"tokens": 1000, "gradient_seconds": 2.0, "optimizer_seconds": 0.25}
    batch = {"group": "batch", "context": 512, "new": 32, "step_seconds": 0.01, "peak": GIB}
    return [
        decode | {"x": 32, "step_seconds": 0.010},
        decode | {"x": 64, "step_seconds": 0.011},
        step | {"x": 32},
        step | {"x": 64, "gradient_seconds": 2.5},
        batch | {"series": "float32", "x": 1},
        batch | {"series": "bfloat16", "x": 1},
        {"group": "memory", "series": "recomputed", "x": 2, "failed": "no such field"},
    ]


def test_the_table_says_what_is_not_flat(measured):
    text = growth_report.growth_section(measured, {"experts": "Why."})
    assert "| 64 | 100M | 11.00 (+10%) | 2.50 (+25%, not flat) | 250 | 1.0 | 3.0 |" in text
    assert "Why." in text


def test_a_point_that_failed_says_why(measured):
    text = growth_report.growth_section(measured, {})
    assert "- recomputed, 2: no such field" in text
    assert "benchmarks-memory.png" not in text


def test_each_group_that_was_measured_gets_a_picture(measured, tmp_path):
    good = [point for point in measured if "failed" not in point]
    limits = {1: {"float32": 700.0, "bfloat16": 1400.0}}
    assert growth_plots.write_plots(good, limits, tmp_path) == [
        "benchmarks-experts.png",
        "benchmarks-batch.png",
    ]
    picture = imread(tmp_path / "benchmarks-experts.png")
    assert picture.std() > 0.01  # lines were drawn


def test_start_up_is_held_to_its_targets():
    found = {
        "imports": {"tensorflow": 2.0, "ds_attention": 2.15},
        "train": {"first_seconds": 9.0, "seconds": 4.0},
        "first_token_float32": {
            "first_token_seconds": 2.5,
            "load_seconds": 0.4,
            "load_peak": GIB,
            "load_read": 0,
            "file_bytes": GIB,
        },
        "first_token_bfloat16": {"failed": "out of memory"},
    }
    text = startup_report.startup_section(found, {})
    assert "| `import ds_attention` beyond `import tensorflow` | 0.15 | 0.2: met |" in text
    assert "| first training step, 8 x 256, float32 | 9.00 | 6: not met |" in text
    assert "| 2.50 | 3: met |" in text
    assert "- first_token_bfloat16: out of memory" in text


def test_nothing_measured_is_nothing_said():
    assert growth_report.growth_section([], {}) == ""
    assert startup_report.startup_section({}, {}) == ""
