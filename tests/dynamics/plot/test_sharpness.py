"""The curve of critical sharpness is the one in the result, beside what the learning rate allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import xarray as xr

from dynamics import plot
from dynamics.plot.figures import drawings
from dynamics.plot.style import words_of
from dynamics.schema import SHARPNESS, label_arrays
from tests.trees import example_tree


def measured(
    sharpness: Sequence[Sequence[float]] = ((8.0, 10.0, 6.0), (19.0, 21.0, 18.0)),
    rate: float = 0.1,
    tasks: Sequence[str] = ("report", "vqa"),
) -> xr.Dataset:
    """`/sharpness` of two steps, by step and task; intervals of a tenth."""
    values = np.asarray(sharpness)
    arrays = {
        "critical_sharpness": values,
        "critical_sharpness_low": 0.9 * values,
        "critical_sharpness_high": 1.1 * values,
        "learning_rate": np.full(len(values), rate),
    }
    coords = {"step": [100 * (n + 1) for n in range(len(values))], "task": ["all", *tasks]}
    return xr.Dataset(label_arrays(SHARPNESS, arrays), coords)


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_draws_all_samples_each_task_and_the_edge():
    drawn = lines(plot.sharpness(measured()))
    assert list(drawn) == ["all samples", "report", "vqa", "2/η"]
    assert drawn["all samples"].get_ydata().tolist() == [8.0, 19.0]
    assert drawn["vqa"].get_xdata().tolist() == [100, 200]
    assert drawn["2/η"].get_ydata().tolist() == [20.0, 20.0]


def test_without_a_learning_rate_the_edge_is_two_steps():
    drawn = lines(plot.sharpness(measured(rate=np.nan)))
    assert drawn["2: the step as it is"].get_ydata().tolist() == [2.0, 2.0]


def test_a_single_task_is_not_drawn_twice():
    assert list(lines(plot.sharpness(measured([[8.0, 8.0]], tasks=["one"])))) == ["all samples", "2/η"]


def test_says_what_it_shows():
    figure = plot.sharpness(measured())
    assert figure.axes[0].get_ylabel() == "Critical sharpness"
    assert figure.axes[0].get_yscale() == "log"
    title, description = words_of(figure)
    assert title == "Critical sharpness"
    assert description.startswith("Lines over optimizer steps with intervals; all samples: 8 at step 100 and 19 at")
    assert description.endswith("the dashed line ends at 20.")


def test_without_a_value_it_says_so():
    figure = plot.sharpness(measured(np.full((2, 3), np.nan)))
    assert [text.get_text() for text in figure.axes[0].texts] == ["No step has a critical sharpness"]
    assert words_of(figure)[1] == "There is no value."


def test_a_result_without_the_group_is_refused():
    with pytest.raises(ValueError, match="Expected a result with the group /sharpness"):
        plot.sharpness(example_tree(3, 2))


def test_it_is_among_the_figures_of_a_result_that_has_it():
    tree = example_tree([100, 200], 2)
    assert "sharpness" not in drawings(tree)
    tree["sharpness"] = xr.DataTree(measured())
    assert "sharpness" in drawings(tree)
