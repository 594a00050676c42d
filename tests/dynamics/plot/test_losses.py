"""The figure of losses has the changes of the result, their intervals, and predictions beside them."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from dynamics import plot
from dynamics.intervention.loss_changes import loss_changes
from dynamics.plot.figures import drawings
from dynamics.plot.style import words_of
from tests.dynamics.intervention.test_loss_changes import record, resolved
from tests.trees import example_tree


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_draws_each_task_and_marks_what_is_retained():
    losses = loss_changes(resolved(curvature=np.array([[0.2, 0.4]])))
    figure = plot.losses(losses)
    drawn = lines(figure)
    assert {"new", "old (retained)", "predicted, first order", "predicted, second order"} <= set(drawn)
    np.testing.assert_allclose(drawn["old (retained)"].get_ydata(), [0, 0.4], atol=1e-12)
    assert drawn["new"].get_xdata().tolist() == [0, 7]
    predicted = [line for line in figure.axes[0].lines if line.get_label() == "predicted, second order"]
    np.testing.assert_allclose(predicted[0].get_ydata(), [0, -0.9])
    assert figure.axes[0].get_ylabel() == "Change of the loss (nat)"


def test_says_what_it_shows():
    title, description = words_of(plot.losses(loss_changes(resolved())))
    assert title == "Change of the loss"
    assert description == "Lines over optimizer steps with intervals; new: -1 at step 7; old (retained): 0.4 at step 7."


def test_without_a_later_step_it_says_so():
    figure = plot.losses(loss_changes(record(np.ones((1, 4)), np.full(4, np.nan))))
    assert [text.get_text() for text in figure.axes[0].texts] == ["No step has a change of the loss"]


def test_names_from_files_are_drawn_as_they_are():
    losses = loss_changes(resolved()).assign_coords(task=["_$\\frac$", "<b>&"])
    svg = plot.to_svg(plot.losses(losses))
    assert "&lt;b&gt;&amp; (retained)" in svg


def test_a_result_without_the_group_is_refused():
    with pytest.raises(ValueError, match="Expected a result with the group /loss"):
        plot.losses(example_tree(3, 2))


def test_it_is_among_the_figures_of_a_result_that_has_it():
    tree = example_tree([100, 200], 2)
    assert "losses" not in drawings(tree)
    tree["loss"] = xr.DataTree(loss_changes(resolved()))
    assert "losses" in drawings(tree)
