"""Figures of associations and of groups: their numbers are the result's, and names are drawn as they are."""

import re

import numpy as np
import pytest
import xarray as xr

from dynamics import plot
from dynamics.plot.figures import figures
from dynamics.relate.run_measures import UPDATE_HEADLINE, relate
from dynamics.relate.score_files import ScoreRow
from dynamics.report.page import MOST_PAIRS, MOST_STATEMENTS, related_sections
from tests.trees import example_tree

RUNS = [f"{group}_s{seed}" for group in ("imax", "$dmax") for seed in range(1, 5)]


@pytest.fixture(scope="module")
def groups():
    trees = {run: example_tree(run=run, steps=4, matrices=3) for run in RUNS}
    rng = np.random.default_rng(0)
    for tree in trees.values():
        for measure in ("participation_ratio", "stable_rank"):
            tree["summary"][f"{measure}_quantile"] *= rng.uniform(0.8, 1.2, (4, 2, 3))
    rows = [
        ScoreRow(run, step, task, float(rng.uniform()))
        for run in RUNS
        for step in (100, 200, 300, 400)
        for task in ("vqa/accuracy", "$x$/f1")
    ]
    return relate(trees, rows, labels={run: run[:-3] for run in RUNS}).groups


def texts(figure):
    axes = figure.axes[0]
    return [text.get_text() for text in [*axes.get_yticklabels(), *axes.get_xticklabels(), *axes.texts, axes.title]]


def test_forest(groups):
    figure = plot.association(groups["association"])
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o" and len(line.get_xdata())]
    first = groups["association"].sel(task="all", measure=UPDATE_HEADLINE)
    assert points[0].get_xdata()[0] == pytest.approx(first["coefficient"].item())
    whisker = figure.axes[0].collections[0].get_segments()[0][:, 0]
    np.testing.assert_allclose(whisker, [first["low"].item(), first["high"].item()])
    assert f"{UPDATE_HEADLINE} (headline)" in texts(figure)
    assert "8 runs" in figure.axes[0].get_title(loc="left")


def test_grid(groups):
    shown = texts(plot.association_grid(groups["association"]))
    value = groups["association"]["coefficient"].sel(task="vqa/accuracy", measure="total/stable_rank").item()
    assert np.isfinite(value)
    assert any(f"{value:.2f}".replace("-", "−") in text for text in shown)
    assert "$x$/f1" in shown


def test_scatter(groups):
    figure = plot.score_scatter(groups["association"], task="vqa/accuracy")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 1]
    assert len(lines) == len(RUNS)
    scores = groups["association"]["score"].sel(scored_task="vqa/accuracy", run=RUNS[0]).values
    assert set(lines[0].get_ydata()) <= set(scores)


def test_bands(groups):
    figure = plot.comparison(groups["comparison"])
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert len(lines) == len(RUNS) + 2
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "$dmax, median of 4 runs" in labels


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (plot.association, {"tasks": ["no"]}, "Expected tasks of the association, got 'no'."),
        (plot.score_scatter, {"measure": "no"}, "Expected a measure of the association, got 'no'."),
        (plot.score_scatter, {"task": "no"}, "Expected a task of the association, got 'no'."),
        (plot.comparison, {"measure": "no"}, "Expected a measure of the comparison, got 'no'."),
    ],
)
def test_unknown_names_are_refused(groups, function, options, message):
    name = "comparison" if function is plot.comparison else "association"
    with pytest.raises(ValueError, match=re.escape(message)):
        function(groups[name], **options)


def test_a_result_without_them_says_what_they_need():
    tree = example_tree(steps=2, matrices=2)
    with pytest.raises(ValueError, match=re.escape("needs scores of its runs (--scores FILE)")):
        plot.association(tree)
    with pytest.raises(ValueError, match=re.escape("needs groups of runs (LABEL=RUN)")):
        plot.comparison(tree)
    assert not {"association", "comparison"} & set(figures(tree))


def test_many_tasks_stay_within_a_page():
    trees = {run: example_tree(run=run, steps=4, matrices=3) for run in RUNS[:2]}
    rng = np.random.default_rng(0)
    rows = [
        ScoreRow(run, step, f"task{number}/accuracy", float(rng.uniform()))
        for run in trees
        for step in (100, 200, 300, 400)
        for number in range(300)
    ]
    group = relate(trees, rows).groups["association"]
    assert group.sizes["task"] == 301
    grid, forest = plot.association_grid(group), plot.association(group)
    assert max(*grid.get_size_inches(), *forest.get_size_inches()) <= 30
    assert "20 of 301 tasks" in grid.axes[0].get_title(loc="left")
    assert "4 of 301 tasks" in forest.axes[0].get_title(loc="left")
    tree = xr.DataTree.from_dict({"/association": group})
    part = related_sections(tree, {})["association"]
    assert len(part["rows"]) == MOST_PAIRS
    assert {row[0] for row in part["rows"][:1]} <= set(group["measure"].values.tolist())
    assert f"{MOST_PAIRS} of {301 * group.sizes['measure']:,} (shown" in part["words"]
    assert len(part["statements"]) <= MOST_STATEMENTS
    assert len(part["statements"]) + part["more"] == len(group.attrs["statements"])


def test_tasks_with_the_same_reason_share_a_sentence():
    trees = {run: example_tree(run=run, steps=4, matrices=3) for run in RUNS[:2]}
    rows = [ScoreRow(run, 100, f"task{number}/accuracy", 0.5) for run in trees for number in range(100)]
    group = relate(trees, rows).groups["association"]
    assert len(group.attrs["statements"]) == 1
    assert "and 93 more: no run has a step with both." in group.attrs["statements"][0]


def test_every_figure_becomes_svg(groups):
    for figure in (
        plot.association(groups["association"]),
        plot.association_grid(groups["association"]),
        plot.score_scatter(groups["association"]),
        plot.comparison(groups["comparison"]),
    ):
        assert plot.to_svg(figure).startswith("<svg")
