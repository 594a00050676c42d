import re

import numpy as np
import pytest
import xarray as xr

from dynamics import plot
from dynamics.plot.association import most_telling
from dynamics.relate.run_measures import UPDATE_HEADLINE
from tests.related import many_tasks, related_groups, texts
from tests.trees import example_tree


@pytest.fixture(scope="module")
def group():
    return related_groups()["association"]


def test_draws_the_stored_coefficients_with_their_intervals(group):
    figure = plot.association(group)
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o" and len(line.get_xdata())]
    first = group.sel(task="all", measure=UPDATE_HEADLINE)
    assert points[0].get_xdata()[0] == pytest.approx(first["coefficient"].item())
    whisker = figure.axes[0].collections[0].get_segments()[0][:, 0]
    np.testing.assert_allclose(whisker, [first["low"].item(), first["high"].item()])


def test_says_what_it_shows(group):
    figure = plot.association(group)
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Association with scores, 8 runs"
    assert axes.get_xlabel() == "Correlation with the score"
    assert axes.get_yticklabels()[0].get_text() == f"{UPDATE_HEADLINE} (headline)"
    assert plot.to_svg(figure).startswith("<svg")
    box = axes.get_legend().get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_filled_marks_are_significant(group):
    changed = group.copy(deep=True)
    changed["holds"][:] = False
    changed["holds"].loc[{"task": "all", "measure": UPDATE_HEADLINE}] = True
    legends = [
        [text.get_text() for text in plot.association(data).axes[0].get_legend().get_texts()]
        for data in (changed, changed.assign(holds=xr.zeros_like(changed["holds"])))
    ]
    assert ["filled: significant" in legend for legend in legends] == [True, False]


def test_without_a_number_it_says_so(group):
    empty = group.assign(coefficient=group["coefficient"] * np.nan)
    assert "No associations: see the findings" in texts(plot.association(empty))


def test_of_many_tasks_four_are_drawn():
    figure = plot.association(many_tasks())
    assert max(figure.get_size_inches()) <= 30
    assert "4 of 301 tasks" in figure.axes[0].get_title(loc="left")


def test_tasks_with_something_significant_come_before_others():
    group = many_tasks().copy(deep=True)
    group["holds"][:] = False
    group["holds"].loc[{"task": "task299/accuracy"}] = True
    assert most_telling(group, 2) == ["all", "task299/accuracy"]


def test_unknown_tasks_are_refused(group):
    with pytest.raises(ValueError, match=re.escape("Expected tasks of the association, got 'no'. There are: ")):
        plot.association(group, tasks=["no"])


def test_a_result_without_scores_says_what_it_needs():
    with pytest.raises(ValueError, match=re.escape("needs scores of its runs (--scores FILE)")):
        plot.association(example_tree(steps=2, matrices=2))
