import re

import numpy as np
import pytest

from dynamics import plot
from tests.related import RUNS, related_groups, texts


@pytest.fixture(scope="module")
def group():
    return related_groups()["association"]


def test_each_run_is_a_line_of_the_stored_scores(group):
    figure = plot.score_scatter(group, task="vqa/accuracy")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 1]
    assert len(lines) == len(RUNS)
    scores = group["score"].sel(scored_task="vqa/accuracy", run=RUNS[0]).values
    assert set(lines[0].get_ydata()) <= set(scores)


def test_says_what_it_shows(group):
    figure = plot.score_scatter(group, task="$x$/f1")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Score and measure, 8 runs"
    assert axes.get_ylabel() == "$x$/f1"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["8 runs"]
    assert plot.to_svg(figure).startswith("<svg")


def test_few_runs_have_a_colour_and_a_name_each(group):
    few = group.assign(score=group["score"].where(group["run"].isin(RUNS[:3])))
    legend = plot.score_scatter(few).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == RUNS[:3]


def test_without_a_common_step_it_says_so(group):
    assert "No step has both" in texts(plot.score_scatter(group.assign(score=group["score"] * np.nan)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "no"}, "Expected a measure of the association, got 'no'."),
        ({"task": "no"}, "Expected a task of the association, got 'no'."),
    ],
)
def test_unknown_names_are_refused(group, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plot.score_scatter(group, **options)
