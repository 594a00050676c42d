import re

import numpy as np
import pytest

from dynamics import plot
from tests.dynamics.report.test_score_summary import scored
from tests.trees import HOSTILE, example_tree


@pytest.fixture(scope="module")
def tree():
    return scored(mmlu__acc=[0.62, 0.60, np.nan, 0.5], eval_loss=[2.0, 1.5, 1.2, 1.3])


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]


def test_each_score_has_a_panel_with_its_values_and_a_ring_around_the_best(tree):
    figure = plot.scores(tree)
    assert titles(figure) == ["mmlu/acc", "eval_loss"]
    line, *_, ring = figure.axes[0].lines
    assert line.get_xdata().tolist() == [0, 100, 300]
    assert line.get_ydata().tolist() == [0.62, 0.6, 0.5]
    assert (ring.get_xdata().tolist(), ring.get_ydata().tolist()) == ([0], [0.62])
    assert "best 1.20 at step 200" in plot.to_svg(figure)


def test_the_training_loss_stands_beside_the_held_out_one_alone(tree):
    accuracy, loss = plot.scores(tree).axes
    assert accuracy.get_legend() is None
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training loss"]
    logged = tree["training"]["value"].sel(metric="loss").values
    assert loss.lines[0].get_ydata().tolist() == logged[np.isfinite(logged)].tolist()


def test_six_of_many_scores_are_drawn_and_others_where_they_are_named():
    many = scored(**{f"t{number}__acc": [0.1, 0.2, 0.3, 0.4] for number in range(9)})
    assert titles(plot.scores(many)) == [f"t{number}/acc" for number in range(6)]
    assert titles(plot.scores(many, tasks=["t8/acc"])) == ["t8/acc"]
    with pytest.raises(ValueError, match=re.escape("Expected a task with scores, got 'no'. There are: t0/acc")):
        plot.scores(many, tasks=["no"])


def test_names_from_files_stay_text(tree):
    group = tree["score"].to_dataset().assign_coords(task=[HOSTILE, "eval_loss"])
    assert "<script" not in plot.to_svg(plot.scores(group))


def test_without_any_value_it_says_so(tree):
    nothing = tree["score"].to_dataset()
    figure = plot.scores(nothing.assign(score=nothing["score"] * np.nan))
    assert figure.axes[0].texts[0].get_text() == "No score has a value"


def test_a_result_without_scores_is_refused():
    with pytest.raises(ValueError, match=re.escape("Expected a result with the group /score")):
        plot.scores(example_tree(steps=2, matrices=2))


def test_it_is_among_the_figures_of_a_result(tree):
    assert "scores" in plot.drawings(tree)
