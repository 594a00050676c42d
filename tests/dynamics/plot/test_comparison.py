import re

import numpy as np
import pytest

from dynamics import plot
from tests.related import RUNS, related_groups, texts
from tests.trees import example_tree


@pytest.fixture(scope="module")
def group():
    return related_groups()["comparison"]


def test_every_run_and_the_median_of_each_group_have_a_line(group):
    figure = plot.comparison(group)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert len(lines) == len(RUNS) + 2
    stored = group["group_median"].sel(group="$dmax", measure=group.attrs["headline"]).values
    (median,) = [line for line in lines if line.get_label() == "$dmax, median of 4 runs"]
    assert np.array_equal(median.get_ydata(), stored[np.isfinite(stored)])


def test_says_what_it_shows(group):
    figure = plot.comparison(group)
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Runs by group"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Optimizer step", group.attrs["headline"])
    assert "$dmax, median of 4 runs" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert plot.to_svg(figure).startswith("<svg")


def test_without_a_number_it_says_so(group):
    assert "No run has this measure" in texts(plot.comparison(group.assign(value=group["value"] * np.nan)))


def test_unknown_measures_are_refused(group):
    with pytest.raises(ValueError, match=re.escape("Expected a measure of the comparison, got 'no'.")):
        plot.comparison(group, measure="no")


def test_a_result_without_groups_says_what_it_needs():
    with pytest.raises(ValueError, match=re.escape("needs groups of runs (LABEL=RUN)")):
        plot.comparison(example_tree(steps=2, matrices=2))
