import re

import numpy as np
import pytest

from dynamics import plot
from dynamics.plot.style import words_of
from tests.fishers import MEANS, with_fisher
from tests.trees import example_tree


@pytest.fixture(scope="module")
def tree():
    return with_fisher(example_tree(3, 2))


def curves(figure):
    return {container.get_label(): container for container in figure.axes[0].containers}


@pytest.mark.parametrize("variable", ["spectral_entropy", "dominant_ratio", "participation_ratio"])
def test_draws_the_stored_curve_of_all_and_of_each_task(tree, variable):
    drawn = curves(plot.rarefaction(tree, variable=variable, step=200))
    assert list(drawn) == ["all samples", *MEANS]
    stored = tree["fisher"][f"rarefied_{variable}"].sel(block="global", step=200)
    for label, task in {"all samples": "all", "grounding": "grounding"}.items():
        own = stored.sel(task=task).dropna("n")
        line = drawn[label].lines[0]
        assert line.get_xdata().tolist() == own["n"].values.tolist()
        assert np.array_equal(line.get_ydata(), own)


def test_bars_are_the_deviation_over_subsets(tree):
    stored = tree["fisher"].to_dataset().sel(block="global", step=300, task="all")
    (bars,) = curves(plot.rarefaction(tree))["all samples"].lines[2]
    heights = [(segment[1, 1] - segment[0, 1]) / 2 for segment in bars.get_segments()]
    assert heights == pytest.approx(stored["rarefied_spectral_entropy_deviation"].values)


def test_a_measure_without_a_deviation_has_no_bars(tree):
    assert not curves(plot.rarefaction(tree, variable="dominant_ratio"))["all samples"].has_yerr


def test_says_what_it_shows(tree):
    figure = plot.rarefaction(tree)
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Spectral entropy of n groups, step 300"
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "Number n of groups, one sample of each",
        "Spectral entropy of n groups (nat)",
    )
    assert axes.get_xticks().tolist() == [4, 8, 16, 40]  # 32 would touch 40
    assert words_of(figure)[1].startswith("Curves of the spectral entropy of n groups; all samples: ")


def test_a_task_without_a_curve_is_not_in_the_legend():
    figure = plot.rarefaction(with_fisher(example_tree([7], 2), steps=(7,), groups=3))
    assert list(curves(figure)) == ["all samples"]


def test_a_single_task_is_not_drawn_twice():
    figure = plot.rarefaction(with_fisher(example_tree([7], 2), steps=(7,), means={"a": (1.0, 0.0, 0.0, 0.0)}))
    assert list(curves(figure)) == ["all samples"]


def test_without_a_curve_it_says_so(tree):
    tree = tree.copy(deep=True)
    tree["fisher"]["rarefied_spectral_entropy"][:] = np.nan
    figure = plot.rarefaction(tree)
    assert [text.get_text() for text in figure.axes[0].texts] == ["No values: see the findings"]
    assert words_of(figure)[1] == "There is no curve."


def test_other_variables_are_refused(tree):
    said = "Expected one of spectral_entropy, dominant_ratio, participation_ratio, got 'trace'."
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        plot.rarefaction(tree, variable="trace")
