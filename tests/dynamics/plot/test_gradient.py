import re

import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

from dynamics import plot
from dynamics.plot.style import words_of
from tests.trees import example_runs, example_tree


@pytest.fixture(scope="module")
def tree():
    """Gradients at four of six steps; the first three are clipped."""
    return example_tree(gradients=[100, 200, 400, 600], matrices=4)


def labels(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def line(figure, label):
    (found,) = [each for each in figure.axes[0].lines if each.get_label() == label]
    return found


def bands(figure):
    return [each for each in figure.axes[0].collections if isinstance(each, FillBetweenPolyCollection)]


def quantile(tree, variable, which=0.5):
    return tree["summary_gradient"][f"{variable}_quantile"].sel(quantile=which)


@pytest.mark.parametrize(
    ("variable", "label"), [("norm_before_clip", "before clipping"), ("norm_after_clip", "after clipping")]
)
def test_draws_the_stored_medians_of_both_norms(tree, variable, label):
    drawn = line(plot.gradient(tree), label)
    assert drawn.get_xdata().tolist() == [100, 200, 400, 600]
    assert np.array_equal(drawn.get_ydata(), quantile(tree, variable))


def test_says_what_it_shows(tree):
    figure = plot.gradient(tree)
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Gradient norm of a matrix"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Optimizer step", "Gradient norm (loss per weight unit)")
    assert axes.get_yscale() == "log"
    assert labels(figure) == ["before clipping", "after clipping", "quartiles"]
    title, words = words_of(figure)
    assert title == "Gradient norm of a matrix"
    first = f"{float(quantile(tree, 'norm_before_clip')[0]):.3g} at step 100"
    assert words.startswith("Lines over optimizer steps, median and quartiles over matrices; before clipping: " + first)


def test_the_two_norms_look_different(tree):
    before, after = (line(plot.gradient(tree), f"{when} clipping") for when in ("before", "after"))
    assert before.get_color() != after.get_color()
    assert before.get_marker() != after.get_marker()


def test_where_clipping_changed_nothing_there_is_one_line(tree):
    tree = tree.copy(deep=True)
    tree["summary_gradient"]["norm_after_clip_quantile"] = tree["summary_gradient"]["norm_before_clip_quantile"]
    figure = plot.gradient(tree)
    assert labels(figure) == ["median over matrices; clipping changed nothing", "quartiles"]
    assert words_of(figure)[1].count("the median: ") == 1


def test_a_measure_stands_beside_random_factors(tree):
    figure = plot.gradient(tree, variable="dominant_ratio")
    summary = tree["summary_gradient"].to_dataset()
    null, quartiles = bands(figure)
    assert null.get_paths()[0].vertices[:, 1].max() == summary["dominant_ratio_null_high"].max()
    assert null.get_paths()[0].vertices[:, 1].min() == summary["dominant_ratio_null_low"].min()
    assert quartiles.get_paths()[0].vertices[:, 1].max() == summary["dominant_ratio_quantile"].max()
    assert np.array_equal(line(figure, "random factors, mean").get_ydata(), summary["dominant_ratio_null"])
    assert figure.axes[0].get_title(loc="left") == "Dominant ratio ρ of the gradient"
    assert figure.axes[0].get_yscale() == "linear"
    assert set(labels(figure)) == {
        "random factors, 5–95 %",
        "random factors, mean",
        "median over matrices",
        "quartiles",
    }


def test_units_stand_on_the_axis(tree):
    assert plot.gradient(tree, variable="entropy_energy").axes[0].get_ylabel() == "Spectral entropy (energy), nat"


def test_the_legend_is_below_the_axes_and_inside_the_figure(tree):
    for variable in ("norm", "dominant_ratio"):
        figure = plot.gradient(tree, variable=variable)
        figure.draw_without_rendering()
        legend = figure.axes[0].get_legend().get_window_extent()
        label = figure.axes[0].xaxis.label.get_window_extent()
        assert legend.y1 <= label.y0
        assert figure.bbox.x0 <= legend.x0
        assert legend.x1 <= figure.bbox.x1
        assert legend.y0 >= figure.bbox.y0


def test_less_than_a_decade_has_ticks(tree):
    figure = plot.gradient(tree)
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_ylim()
    shown = [tick for tick in figure.axes[0].get_yticks() if low <= tick <= high]
    assert len(shown) >= 2


def test_one_step_shows_its_quartiles_and_its_null():
    tree = example_tree(steps=1, gradients=[100], matrices=4)
    figure = plot.gradient(tree, variable="stable_rank")
    (quartiles,) = [each for each in figure.axes[0].collections if each.get_label() == "quartiles"]
    stored = tree["summary_gradient"]["stable_rank_quantile"].values[0]
    assert quartiles.get_paths()[0].vertices[:, 1].tolist() == [stored[0], stored[2]]
    assert figure.axes[0].get_xticks().tolist() == [100]
    assert "random factors, 5–95 %" in labels(figure)


def test_norms_without_spectra():
    tree = example_tree(gradients=[100, 200], gradient_spectra=False, matrices=4)
    assert np.isfinite(line(plot.gradient(tree), "before clipping").get_ydata()).all()
    figure = plot.gradient(tree, variable="stable_rank")
    assert [text.get_text() for text in figure.axes[0].texts] == ["No values: see the findings"]
    assert words_of(figure)[1] == "No step has a value."


def test_gradients_that_are_all_zero_have_no_place_on_a_logarithmic_axis(tree):
    tree = tree.copy(deep=True)
    for name in ("norm_before_clip_quantile", "norm_after_clip_quantile"):
        tree["summary_gradient"][name][:] = 0.0
    figure = plot.gradient(tree)
    assert [text.get_text() for text in figure.axes[0].texts] == ["No values: see the findings"]


def test_missing_and_zero_norms_reach_no_path(tree):
    tree = tree.copy(deep=True)
    for name in ("norm_before_clip_quantile", "norm_after_clip_quantile"):
        tree["summary_gradient"][name].values[1] = np.nan
        tree["summary_gradient"][name].values[2, 0] = 0.0
    paths = [row for row in plot.to_svg(plot.gradient(tree)).splitlines() if " d=" in row]
    assert not [row for row in paths if re.search(r"\b(nan|inf)\b", row.lower())]


def test_draws_into_the_users_axes(tree):
    axes = Figure().subplots(1, 2)[1]
    assert plot.gradient(tree, ax=axes) is axes.figure
    assert len(axes.lines) == 2
    assert axes.figure.get_label() == ""


def test_takes_the_group_itself(tree):
    figure = plot.gradient(tree["summary_gradient"].to_dataset())
    assert labels(figure) == labels(plot.gradient(tree))


def test_a_result_without_gradients_is_refused():
    with pytest.raises(ValueError, match=r"^Expected a result with the group /summary_gradient, got one with \["):
        plot.gradient(example_tree(steps=1))


def test_an_unknown_variable_is_refused(tree):
    with pytest.raises(
        ValueError, match=r"^Expected the name of a variable of the result, got 'rank_quantile'\. There"
    ):
        plot.gradient(tree, variable="rank")


def test_several_runs_are_refused(tree):
    with pytest.raises(
        ValueError, match=r"^Expected the result of one run, got 1 runs\. Pass one: tree\['runs/a'\]\.$"
    ):
        plot.gradient(example_runs(a=tree))
