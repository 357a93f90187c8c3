"""The pictures show the run's own numbers, and say what they are."""

import numpy as np
import pytest

from ds_model import Tokenizer
from ds_train.metrics_log import read_metrics
from ds_train.plots import (
    expert_layer_names,
    plot_expert_load,
    plot_loss,
    plot_routing,
    plot_stability,
)


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


def test_expert_load_is_in_shares_of_the_mean(finished, rows):
    names = expert_layer_names(finished.trainer.model)
    assert names == ["layer 1", "MTP module 1"]
    *panels, scale = plot_expert_load(rows, names).axes
    shares = panels[0].collections[0].get_array()  # [experts, steps]
    np.testing.assert_allclose(np.asarray(shares).mean(axis=0), 1.0)
    last = np.asarray(rows[-1]["loads"][0])
    np.testing.assert_allclose(shares[:, -1], last / last.mean())
    assert scale.get_ylabel() == "load / mean load"


def test_routing_shows_as_many_experts_as_a_token_has(finished):
    model = finished.trainer.model
    tokenizer = Tokenizer.train(["one two three"], 264)
    figure = plot_routing(model, tokenizer, "one two", expert_layer_names(model))
    panel = figure.axes[0]
    gates = panel.images[0].get_array().filled(np.nan)
    assert [text.get_text() for text in panel.get_xticklabels()] == list("one two")
    np.testing.assert_array_equal(np.isfinite(gates).sum(axis=0), 2)
    # Gates of a token are normalised and scaled by 2.5 (`routed_scaling_factor`).
    np.testing.assert_allclose(np.nansum(gates, axis=0), 2.5, rtol=1e-5)


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
