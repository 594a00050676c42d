import numpy as np
import pytest

from dynamics import plot
from dynamics.plot.select import row_groups
from tests.trees import HOSTILE, example_tree, matrix_names


@pytest.fixture(scope="module")
def tree():
    return example_tree(matrices=21, missing=matrix_names(2))


def test_draws_the_stored_numbers_by_role_and_layer(tree):
    figure = plot.heatmap(tree, variable="frobenius_norm")
    (image,) = figure.axes[0].images
    update = tree["update"].to_dataset()
    order = [position for group in row_groups(update) for position in group.positions]
    stored = update["frobenius_norm"].sel(kind="total").values.T[order]
    assert np.array_equal(image.get_array().filled(np.nan), stored, equal_nan=True)


def test_cells_without_a_value_are_masked(tree):
    (image,) = plot.heatmap(tree).axes[0].images
    assert np.ma.getmaskarray(image.get_array()).sum() == 2


def test_says_what_it_shows(tree):
    figure = plot.heatmap(tree, variable="entropy_deficit", kind="increment")
    axes, bar = figure.axes
    assert axes.get_title(loc="left") == "Entropy deficit of the increments"
    assert bar.get_ylabel() == "Entropy deficit (nat)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "200", "300", "400", "500", "600"]
    assert axes.get_yticklabels()[0].get_text() == "self_attn.q_proj\n0 to 2"


def test_a_variable_without_kinds_is_drawn_too(tree):
    assert (
        plot.heatmap(tree, variable="increment_cosine").axes[0].get_title(loc="left")
        == "Cosine with the previous increment"
    )


def test_five_hundred_matrices_fit_a_page():
    figure = plot.heatmap(example_tree(steps=2, matrices=500))
    assert figure.get_figheight() <= 11
    assert len(figure.axes[0].get_yticks()) <= 60
    assert len(plot.to_svg(figure)) < 200_000


@pytest.mark.parametrize(
    "awkward",
    [
        {"steps": 1},
        {"matrices": 1},
        {"zero": matrix_names(14)},
        {"matrices": [HOSTILE, "x" * 300, "_y"]},
    ],
)
def test_awkward_results_are_drawn(awkward):
    svg = plot.to_svg(plot.heatmap(example_tree(**awkward)))
    assert ">nan" not in svg
    assert '"nan' not in svg
    assert "<script" not in svg


def test_a_variable_of_other_dimensions_is_refused(tree):
    with pytest.raises(
        ValueError, match=r"^Expected a variable of step and matrix, got 'suggested_rank' with \('matrix',\)\.$"
    ):
        plot.heatmap(tree, variable="suggested_rank")
