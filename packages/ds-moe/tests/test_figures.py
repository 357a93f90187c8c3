"""The pictures show the routing that they were given, and say what they are."""

import numpy as np
import pytest

from ds_moe import Routing
from ds_moe.figures import plot_expert_load, plot_flow, plot_routing


def routing(indices, gates, experts=4):
    indices, gates = np.asarray(indices), np.asarray(gates, np.float32)
    load = np.bincount(indices.ravel(), minlength=experts).astype(np.float32)
    return Routing(indices, gates, np.zeros([len(indices), experts], np.float32), load)


FIRST = routing([[0, 1], [2, 3], [0, 3]], [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
SECOND = routing([[1, 2], [1, 0], [3, 2]], [[0.7, 0.3], [0.6, 0.4], [0.5, 0.1]])


def test_load_is_in_shares_of_the_mean():
    loads = np.array([[[2, 4, 6, 0]], [[3, 3, 3, 3]]])
    panel, scale = plot_expert_load(loads, steps=[10, 20], names=["layer 1"]).axes
    shares = panel.collections[0].get_array()  # [experts, steps]
    np.testing.assert_allclose(shares, [[2 / 3, 1], [4 / 3, 1], [2, 1], [0, 1]])
    assert panel.get_title(loc="left") == "layer 1"
    assert scale.get_ylabel() == "load / mean load"


def test_routing_shows_each_tokens_experts_and_gates():
    figure = plot_routing([FIRST, SECOND], ["we", "the\n"])
    first, second, _ = figure.axes
    gates = first.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(
        gates, [[0.9, np.nan], [0.1, np.nan], [np.nan, 0.2], [np.nan, 0.8]], rtol=1e-6
    )
    assert [text.get_text() for text in second.get_xticklabels()] == ["we", "the\\n"]
    assert second.get_title(loc="left") == "expert layer 1"


def test_flow_bands_are_as_wide_as_their_tokens():
    (axis,) = plot_flow([FIRST, SECOND], names=["layer 1", "layer 2"]).axes
    # Best experts: 0, 3, 0 and then 1, 1, 3.
    widths = sorted(
        round(float(np.ptp(band.get_paths()[0].vertices[[0, -2], 1])), 6)
        for band in axis.collections
    )
    heights = [bar.get_height() for bar in axis.patches]
    assert heights == [2, 0, 0, 1, 0, 2, 0, 1]
    assert len(widths) == 3  # 0 to 1, 3 to 1, 0 to 3
    assert [text.get_text() for text in axis.get_xticklabels()] == ["layer 1", "layer 2"]
    assert axis.get_ylabel() == "3 tokens, by their best expert"


def test_one_layer_has_no_flow():
    with pytest.raises(ValueError, match="1 layers have no way between them"):
        plot_flow([FIRST])
