"""The pictures show the numbers they were given, and say what they are."""

import numpy as np
import pytest

from ds_precision import E4M3, E5M2, E5M6
from ds_precision.figures import _positive_numbers, plot_formats, plot_rounding


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
def test_a_formats_numbers_are_all_its_codes(fmt):
    codes = np.arange(256, dtype=np.uint8).view(fmt.dtype.as_numpy_dtype).astype(np.float64)
    expected = np.sort(codes[np.isfinite(codes) & (codes > 0)])
    np.testing.assert_array_equal(_positive_numbers(fmt), expected)


def test_formats_stand_in_rows_with_their_errors():
    upper, lower = plot_formats((E4M3, E5M2, E5M6)).axes
    assert [text.get_text() for text in upper.get_yticklabels()] == ["E4M3", "E5M2", "E5M6"]
    marks = upper.get_lines()[0]
    assert marks.get_xdata().max() == 448
    for line, fmt in zip(lower.get_lines(), (E4M3, E5M2, E5M6), strict=True):
        x, error = line.get_xdata(), line.get_ydata()
        normal = (x >= fmt.smallest_normal) & (x <= fmt.max)
        worst = error[normal].max()
        assert worst <= fmt.worst_relative_error * 1.0001
        assert worst > 0.8 * fmt.worst_relative_error


def test_rounding_shows_errors_and_what_was_lost():
    x = np.array([[1.0, -2.0, 0.0, 4.0]])
    rounded = np.array([[1.1, -2.0, 0.0, 0.0]])
    figure = plot_rounding(x, {"coarse": rounded, "exact": x})
    coarse, exact, scale = figure.axes
    shown = coarse.images[0].get_array()
    np.testing.assert_allclose(shown[0, :3], [0.1, 1e-3, 1e-3])  # the scale ends at 0.1%
    assert shown.mask.tolist() == [[False, False, False, True]]
    assert coarse.get_title() == "coarse\n33.3% became zero"
    assert exact.get_title() == "exact\n0.0% became zero"
    assert scale.get_ylabel() == "relative error (black: lost)"


def test_rounding_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"coarse has shape \(1, 2\); x has \(1, 3\)"):
        plot_rounding(np.ones([1, 3]), {"coarse": np.ones([1, 2])})
