"""The pictures show the numbers they were given, and say what they are."""

import numpy as np

from ds_attention.figures import plot_attention, plot_latent_spectrum


def test_each_head_has_its_panel():
    weights = np.random.default_rng(0).dirichlet(np.ones(4), size=(5, 4))
    figure = plot_attention(weights, words=["a", "b\n", "$", "d"], title="Layer 1")
    panels = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in panels] == [f"head {h}" for h in range(5)]
    for head, axis in enumerate(panels):
        np.testing.assert_array_equal(axis.images[0].get_array(), weights[head].astype(np.float32))
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["a", "b\\n", r"\$", "d"]
    assert figure.get_suptitle() == "Layer 1"


def test_long_sequences_show_no_words():
    figure = plot_attention(np.ones([1, 50, 50]) / 50, words=["x"] * 50)
    assert not [t for t in figure.axes[0].get_xticklabels() if t.get_text() == "x"]


def test_a_spectrum_finds_the_rank_that_is_there():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(200, 3)) @ np.linalg.qr(rng.normal(size=(8, 3)))[0].T
    (axis,) = plot_latent_spectrum({"rank 3": flat, "full": rng.normal(size=(4000, 8))}).axes
    low, _, full, _ = axis.get_lines()
    np.testing.assert_allclose(low.get_ydata()[2:], 100)
    assert low.get_label() == "rank 3: 3 of 8 for 90%, 3 for 99%"
    np.testing.assert_allclose(full.get_ydata(), 12.5 * np.arange(1, 9), atol=3)


def test_a_lone_latent_has_its_label():
    (axis,) = plot_latent_spectrum(np.eye(4), label="c_kv").axes
    assert axis.get_lines()[0].get_label().startswith("c_kv: ")
