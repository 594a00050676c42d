"""Each expert's point is its load and the norm of its increment."""

from __future__ import annotations

import numpy as np

from dynamics import plot
from dynamics.plot.style import words_of
from tests.dynamics.plot.test_routing import measured


def test_draws_norms_over_loads_by_layer():
    table = measured()
    axes = plot.expert_updates(table).axes[0]
    points = {line.get_label().strip(): line for line in axes.lines}
    np.testing.assert_allclose(points["b.mlp"].get_xdata(), [2.5, 0.5, 0.0])
    np.testing.assert_allclose(points["b.mlp"].get_ydata(), [6.0, 5.0, 4.0])
    assert axes.get_xlabel() == "Load (1: uniform)"


def test_says_what_it_shows():
    title, description = words_of(plot.expert_updates(measured()))
    assert title == "Increment of each expert over its load at step 200"
    assert description == "Points of 6 experts in 2 layers; rank correlations from 1.0 to 1.0."


def test_without_norms_it_says_so():
    figure = plot.expert_updates(measured(moved=False))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["No expert has a load and an increment of its own"]
