import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection, LineCollection

from dynamics.plot.marks import draw_interval
from dynamics.plot.style import COLOURS, MARKERS, panel

AT = np.arange(1.0, 6.0)


def drawn(middle, low=None, high=None, number=0):
    middle = np.array(middle, dtype=np.float64)
    low, high = (middle - 1 if low is None else np.array(low)), (middle + 1 if high is None else np.array(high))
    with panel(None, "", "") as axes:
        draw_interval(axes, AT[: len(middle)], (middle, low, high), number, "line", "interval")
    return axes


def of_kind(axes, kind):
    return [each for each in axes.collections if isinstance(each, kind)]


def test_draws_the_numbers_and_their_ends():
    axes = drawn([1.0, 2.0, 4.0], number=2)
    (line,) = axes.lines
    assert line.get_ydata().tolist() == [1, 2, 4]
    assert (line.get_color(), line.get_marker()) == (COLOURS[2], MARKERS[2])
    (band,) = of_kind(axes, FillBetweenPolyCollection)
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0, 5)
    assert not of_kind(axes, LineCollection)


def test_a_point_between_gaps_has_a_bar():
    axes = drawn([1.0, 2.0, np.nan, 4.0])
    (bars,) = of_kind(axes, LineCollection)
    assert bars.get_segments()[0].tolist() == [[4, 3], [4, 5]]
    assert axes.get_legend_handles_labels()[1] == ["line", "interval"]


def test_a_single_point_has_a_bar_and_its_name_in_the_legend():
    axes = drawn([3.0])
    assert not of_kind(axes, FillBetweenPolyCollection)
    assert axes.get_legend_handles_labels()[1] == ["line", "interval"]


@pytest.mark.parametrize("ends", [{"low": [np.nan] * 3}, {"high": [np.nan] * 3}])
def test_without_an_interval_there_is_a_line_alone(ends):
    axes = drawn([1.0, 2.0, 3.0], **ends)
    assert len(axes.lines) == 1
    assert not axes.collections


def test_many_points_have_no_markers_but_where_they_stand_alone():
    middle = np.ones(60)
    middle[[10, 12]] = np.nan
    with panel(None, "", "") as axes:
        draw_interval(axes, np.arange(60.0), (middle, middle, middle), 0, "line", "interval")
    assert np.flatnonzero(axes.lines[0].get_markevery()).tolist() == [11]
