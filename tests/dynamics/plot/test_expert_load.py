"""The heat map of loads has the numbers of the result."""

from __future__ import annotations

import numpy as np
import pytest

from dynamics import plot
from dynamics.plot.style import words_of
from tests.dynamics.plot.test_routing import measured


def test_draws_loads_in_multiples_of_a_uniform_one_and_marks_experts_without_a_token():
    table = measured()
    axes = plot.expert_load(table).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), 3 * table["load"].values[1])
    (dead,) = axes.lines
    assert (dead.get_xdata().tolist(), dead.get_ydata().tolist()) == ([2], [1])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a.mlp", "b.mlp"]


def test_of_another_step():
    table = measured()
    figure = plot.expert_load(table, step=100)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), 3 * table["load"].values[0])
    assert not figure.axes[0].lines
    with pytest.raises(ValueError, match=r"Expected a step with routing, got 7\. There are: \[100, 200\]\."):
        plot.expert_load(table, step=7)


def test_says_what_it_shows():
    title, description = words_of(plot.expert_load(measured()))
    assert title == "Load of each expert at step 200"
    assert description == (
        "Heatmap of 2 layers and up to 3 experts, from 0 to 2.5 times a uniform load; 1 expert without a token."
    )


def test_layers_with_fewer_experts_are_grey_there():
    table = measured()
    table["load"][1, 0, 2] = np.nan
    assert plot.expert_load(table).axes[0].images[0].get_array().mask.tolist() == [[False, False, True], [False] * 3]
