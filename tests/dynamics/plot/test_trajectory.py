import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

from dynamics import plot
from tests.trees import example_tree, matrix_names


@pytest.fixture(scope="module")
def tree():
    return example_tree()


def medians(figure):
    return [line for line in figure.axes[0].lines if len(line.get_xdata()) and "median" in str(line.get_label())]


def bands(figure):
    return [band for band in figure.axes[0].collections if isinstance(band, FillBetweenPolyCollection)]


def labels(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_draws_the_stored_median(tree):
    figure = plot.trajectory(tree, variable="stable_rank")
    stored = tree["summary"]["stable_rank_quantile"].sel(kind="total", quantile=0.5)
    (line,) = medians(figure)
    assert np.array_equal(line.get_xdata(), stored["step"])
    assert np.array_equal(line.get_ydata(), stored)


def test_quartiles_and_null_are_bands_of_the_stored_numbers(tree):
    null, quartiles = bands(plot.trajectory(tree, variable="effective_rank_energy"))
    summary = tree["summary"].to_dataset().sel(kind="total")
    assert null.get_paths()[0].vertices[:, 1].max() == summary["effective_rank_energy_null_high"].max()
    assert null.get_paths()[0].vertices[:, 1].min() == summary["effective_rank_energy_null_low"].min()
    assert quartiles.get_paths()[0].vertices[:, 1].max() == summary["effective_rank_energy_quantile"].max()


def test_a_variable_without_a_null_has_one_band(tree):
    assert len(bands(plot.trajectory(tree, variable="frobenius_norm"))) == 1


def test_says_what_it_shows(tree):
    figure = plot.trajectory(tree, variable="entropy_deficit", kind="increment")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Entropy deficit of the increments"
    assert axes.get_xlabel() == "Optimizer step"
    assert axes.get_ylabel() == "Entropy deficit (nat)"
    assert labels(figure) == ["median over matrices", "quartiles"]


def test_segments_are_not_joined():
    tree = example_tree(steps=[10, 20, 30, 40], segment=[0, 1, 0, 1])
    lines = medians(plot.trajectory(tree))
    assert [line.get_xdata().tolist() for line in lines] == [[10, 30], [20, 40]]
    assert lines[0].get_color() != lines[1].get_color()
    assert lines[0].get_marker() != lines[1].get_marker()


def test_one_step_shows_its_quartiles_and_its_null():
    tree = example_tree(steps=1)
    figure = plot.trajectory(tree)
    (quartiles,) = [c for c in figure.axes[0].collections if c.get_label() == "quartiles"]
    stored = tree["summary"]["effective_rank_energy_quantile"].sel(kind="total").values[0]
    assert quartiles.get_paths()[0].vertices[:, 1].tolist() == [stored[0], stored[2]]
    assert figure.axes[0].get_xticks().tolist() == [100]
    assert labels(figure)[-1] == "chance, same shape, 5–95 %"


def test_without_a_value_it_says_so():
    figure = plot.trajectory(example_tree(steps=1), kind="increment")
    assert [text.get_text() for text in figure.axes[0].texts] == ["No values: see the findings"]
    assert "nan" not in plot.to_svg(figure)


def test_missing_values_break_the_line():
    tree = example_tree(zero=matrix_names(14))
    tree["summary"]["frobenius_norm_quantile"].loc[{"step": 300}] = np.nan
    assert "nan" not in plot.to_svg(plot.trajectory(tree, variable="frobenius_norm"))


def test_draws_into_the_users_axes(tree):
    axes = Figure().subplots(1, 2)[1]
    assert plot.trajectory(tree, ax=axes) is axes.figure
    assert len(axes.lines) == 1


def test_an_unknown_variable_is_refused(tree):
    with pytest.raises(
        ValueError, match=r"^Expected the name of a variable of the result, got 'rank_quantile'\. There"
    ):
        plot.trajectory(tree, variable="rank")


def test_several_runs_are_refused():
    from tests.trees import example_runs

    with pytest.raises(
        ValueError, match=r"^Expected the result of one run, got 1 runs\. Pass one: tree\['runs/a'\]\.$"
    ):
        plot.trajectory(example_runs(a=example_tree(steps=1)))
