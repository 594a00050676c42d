import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import FillBetweenPolyCollection, LineCollection
from matplotlib.figure import Figure

from dynamics.plot.marks import draw_band, draw_quartiles, first_and_last, legend_below


@pytest.fixture
def axes():
    return Figure().subplots()


def quantiles(middle, spread=1.0):
    middle = np.asarray(middle, dtype=float)
    values = np.stack([middle - spread, middle, middle + spread], axis=1)
    return xr.DataArray(
        values,
        dims=("step", "quantile"),
        coords={"step": 10 * np.arange(1, len(middle) + 1), "quantile": [0.25, 0.5, 0.75]},
    )


def marked(line):
    every = line.get_markevery()
    return np.flatnonzero(every).tolist()


def test_a_line_and_a_band_of_the_numbers(axes):
    draw_quartiles(axes, quantiles([1, 2, 4]), 0, "median")
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_xydata().tolist() == [[10, 1], [20, 2], [30, 4]]
    assert isinstance(band, FillBetweenPolyCollection)
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert {(10, 0), (10, 2), (20, 1), (20, 3), (30, 3), (30, 5)} <= corners


def test_lines_differ_in_colour_and_marker(axes):
    for number in range(3):
        draw_quartiles(axes, quantiles([1, 2]), number, f"line {number}")
    assert len({line.get_color() for line in axes.lines}) == 3
    assert len({line.get_marker() for line in axes.lines}) == 3


def test_one_step_has_a_bar_for_its_quartiles(axes):
    draw_quartiles(axes, quantiles([3]), 0, "median")
    (bar,) = axes.collections
    assert isinstance(bar, LineCollection)
    assert bar.get_segments()[0].tolist() == [[10, 2], [10, 4]]


def test_nothing_known_leaves_no_band(axes):
    draw_quartiles(axes, quantiles([np.nan, np.nan]), 0, "median")
    assert len(axes.collections) == 0


def test_few_steps_have_a_marker_each_and_many_only_those_that_stand_alone(axes):
    few, many = [1.0] * 40, [1.0] * 100
    many[49], many[51] = np.nan, np.nan
    draw_quartiles(axes, quantiles(few), 0, "few")
    draw_quartiles(axes, quantiles(many), 1, "many")
    assert marked(axes.lines[0]) == list(range(40))
    assert marked(axes.lines[1]) == [50]


def test_the_first_and_the_last_step_are_no_neighbours(axes):
    # Round the end the last known step would have the first as its neighbour, and stay unseen.
    many = [1.0] * 99 + [np.nan] + [1.0]
    draw_quartiles(axes, quantiles(many), 0, "many")
    assert marked(axes.lines[0]) == [100]


def test_a_band_of_the_null(axes):
    draw_band(axes, np.array([1, 2]), np.array([0.0, 0.5]), np.array([1.0, 1.5]), "null")
    (band,) = axes.collections
    assert band.get_label() == "null"
    assert band.get_paths()[0].vertices[:, 1].max() == 1.5


def test_a_band_of_one_known_step_is_a_bar(axes):
    draw_band(axes, np.array([1, 2]), np.array([np.nan, 0.5]), np.array([np.nan, 1.5]), "null")
    (container,) = axes.containers
    assert container.get_label() == "null"
    (bar,) = [each for each in container.get_children() if isinstance(each, LineCollection)]
    assert bar.get_segments()[0].tolist() == [[2, 0.5], [2, 1.5]]


def test_a_band_of_nothing_is_nothing(axes):
    draw_band(axes, np.array([1]), np.array([np.nan]), np.array([np.nan]), "null")
    assert len(axes.collections) == 0
    assert len(axes.containers) == 0


def test_a_legend_says_once_and_last_what_lines_share(axes):
    for number, label in enumerate(("a", "b")):
        draw_quartiles(axes, quantiles([1, 2]), number, label)
    legend_below(axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "quartiles"]


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        ([1, 2, 4.5678], "1 at step 10 and 4.57 at step 30"),
        ([np.nan, 2, np.nan], "2 at step 20"),
        ([np.nan], ""),
    ],
)
def test_ends_in_words(middle, words):
    assert first_and_last(quantiles(middle).sel(quantile=0.5)) == words
