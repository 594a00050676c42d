import re

import numpy as np
import pytest
import xarray as xr

from dynamics import plot
from tests.related import RUNS, related_groups
from tests.trees import example_tree


def test_every_run_of_each_group_has_a_mark_and_the_group_its_mean():
    group = related_groups()["score_comparison"]
    figure = plot.score_comparison(group)
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == ["all", "vqa/accuracy", "$x$/f1"]
    panel = figure.axes[1]
    scores = group["score"].sel(task="vqa/accuracy")
    marks = np.concatenate([line.get_ydata() for line in panel.lines])
    assert sorted(marks) == sorted(scores.values.tolist())
    assert len(marks) == len(RUNS)
    means = [collection.get_segments()[0][0][1] for collection in panel.collections]
    assert means == pytest.approx([scores.values[:4].mean(), scores.values[4:].mean()])
    assert group.attrs["statements"][0].split(" (")[0] in plot.to_svg(figure)


def test_a_run_without_a_score_has_no_mark():
    group = related_groups()["score_comparison"].copy(deep=True)
    group["score"][0, 1] = np.nan
    assert sum(line.get_ydata().size for line in plot.score_comparison(group).axes[1].lines) == len(RUNS) - 1


def test_unknown_scores_are_refused_and_a_result_without_groups_says_what_it_needs():
    with pytest.raises(ValueError, match=re.escape("Expected a task with scores, got 'no'. There are: all, vqa")):
        plot.score_comparison(related_groups()["score_comparison"], tasks=["no"])
    with pytest.raises(ValueError, match=re.escape("needs groups of runs (LABEL=RUN) and their scores")):
        plot.score_comparison(example_tree(steps=2, matrices=2))


def test_it_is_among_the_figures_of_several_runs():
    groups = {f"/{name}": group for name, group in related_groups().items()}
    tree = example_tree(steps=2, matrices=2)
    assert "score_comparison" in plot.drawings(xr.DataTree.from_dict({**groups, "/runs/a": tree}))
