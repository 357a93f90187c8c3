"""The pictures show the run's own numbers, and say what they are."""

import numpy as np
import pytest

from ds_train import training_memory
from ds_train.figures import (
    expert_layer_names,
    plot_loss,
    plot_memory,
    plot_schedule,
    plot_stability,
    plot_training_memory,
)
from ds_train.metrics_log import read_metrics
from ds_train.notebook import MemoryProfile
from ds_train.parallel import Costs, Timetable, make_schedule


@pytest.fixture(scope="module")
def rows(finished):
    return read_metrics(finished.out / "metrics.jsonl")


def test_loss_curves_are_the_logged_ones(rows):
    upper, lower = plot_loss(rows).axes
    main, mtp = upper.get_lines()
    assert list(main.get_xdata()) == [1, 2, 4, 6]
    assert list(main.get_ydata()) == [row["cross_entropy"] for row in rows]
    assert list(mtp.get_ydata()) == [row["mtp_cross_entropy"] for row in rows]
    assert upper.get_ylabel() == "cross-entropy [nats per token]"
    assert lower.get_xlabel() == "optimizer step"


def test_expert_layers_are_named(finished):
    assert expert_layer_names(finished.trainer.model) == ["layer 1", "MTP module 1"]


def test_memory_is_drawn_beyond_the_start():
    line = MemoryProfile(2**20, 4 * 2**20, (0.0, 0.5), (2**20, 4 * 2**20))
    (axis,) = plot_memory({"a step": line}).axes
    (drawn,) = axis.get_lines()
    assert list(drawn.get_xdata()) == [0.0, 0.5]
    assert list(drawn.get_ydata()) == [0.0, 3.0]
    assert drawn.get_label() == "a step: peak 3 MiB"


def test_parts_of_a_steps_memory_are_those_of_the_closed_form(finished):
    found = training_memory(finished.trainer.model.config, 2, 16)
    (axis,) = plot_training_memory({"tiny": found, "again": found}).axes
    widths = [bar.get_width() * 2**20 for bar in axis.patches[:6]]
    activations = sum(found.activations.values())
    parts = [found.parameters, found.moments, found.gradients, activations]
    np.testing.assert_allclose(widths, [*parts, found.logits, found.scratch])
    assert axis.get_lines()[0].get_xdata()[0] * 2**20 == pytest.approx(found.peak)


def look(step, **underflow):
    operands = {
        f"block_0/mlp/up/{kind}": {"underflow": share, "amax": 10.0 * step, "drift": -step}
        for kind, share in underflow.items()
    }
    norms = {"block_0/mlp/up": 3.0, "block_0/mlp/down": 4.0, "embed_tokens/embeddings": 0.0}
    return {"step": step, "operands": operands, "gradient_norms": norms}


def test_stability_shows_the_worst_operand_of_each_kind_and_each_layers_norm():
    rows = [look(1, input=0.1, weight=0.2), look(2, input=0.3, weight=0.0)]
    rows[0]["operands"]["block_1/o_proj/input"] = {"underflow": 0.5, "amax": 1.0, "drift": 7}
    figure = plot_stability(rows)
    underflow, amax, drift, norms, _ = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in underflow.lines}
    assert lines["inputs"] == [0.5, 0.3]
    assert lines["weights"] == [0.2, 0.0]
    assert list(amax.lines[0].get_ydata()) == [10.0, 20.0]
    assert list(drift.lines[0].get_ydata()) == [7, -2]
    field = norms.collections[0].get_array()
    np.testing.assert_allclose(field, np.log10([[5, 5], [5, 5]]))  # no norm is below the least


def test_stability_without_fp8_is_the_norms_alone():
    assert len(plot_stability([look(1), look(2)]).axes) == 2


def test_a_schedule_is_drawn_as_it_is_timed():
    schedule = make_schedule("dualpipe", 4, 8)
    timetable = Timetable.of(schedule, Costs())
    (axis,) = plot_schedule(schedule, timetable).axes
    spans = [path for bars in axis.collections for path in bars.get_paths()]
    assert len(spans) == sum(len(slot) for slots in schedule.ranks for slot in slots)
    assert axis.get_xlim() == (0, timetable.length)
    assert axis.get_title() == f"dualpipe: 8 micro-batches, {2 / timetable.length:.1%} idle"
