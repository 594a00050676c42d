import numpy as np
import pytest

from dynamics import plot
from dynamics.plot.style import ON_LIGHT, words_of
from tests.fishers import MEANS, with_fisher
from tests.trees import HOSTILE, example_tree


@pytest.fixture(scope="module")
def tree():
    return with_fisher(example_tree(3, 2), space="factor")


def cells(figure):
    """Texts by row and column."""
    return {(int(y), int(x)): text for text in figure.axes[0].texts for x, y in [text.get_position()]}


@pytest.mark.parametrize("variable", ["cosine", "overlap", "magnitude_similarity", "transfer"])
def test_draws_the_stored_numbers_of_the_tasks(tree, variable):
    (image,) = plot.task_matrix(tree, variable=variable, step=200).axes[0].images
    stored = tree["tasks"][variable].sel(step=200, block="global").drop_sel(task="all", task_="all")
    assert np.array_equal(image.get_array().filled(np.nan), stored, equal_nan=True)


def test_each_cell_tells_its_number_and_interval(tree):
    stored = tree["tasks"].to_dataset().sel(step=300, block="global", task="chart", task_="grounding")
    value, low, high = (f"{float(stored[f'cosine{end}']):.2g}".replace("-", "−") for end in ("", "_low", "_high"))
    written = cells(plot.task_matrix(tree))
    assert written[0, 2].get_text() == f"{value}\n{low} to {high}"
    assert written[0, 0].get_text() == "1"


def test_bold_is_what_has_a_sign(tree):
    written = cells(plot.task_matrix(tree, variable="transfer"))
    stored = tree["tasks"].to_dataset().sel(step=300, block="global").drop_sel(task="all", task_="all")
    decided = (stored["transfer_low"] > 0) | (stored["transfer_high"] < 0)
    for (row, column), text in written.items():
        bold = bool(decided[row, column]) and row != column
        assert (text.get_fontweight() == "bold") == bold, (row, column)
    overlaps = cells(plot.task_matrix(tree, variable="overlap")).values()
    assert {text.get_fontweight() for text in overlaps} == {"normal"}


def test_what_is_not_resolved_is_hatched_and_says_so(tree):
    figure = plot.task_matrix(tree)
    missing = np.isnan(tree["tasks"]["cosine"].sel(step=300, block="global").drop_sel(task="all", task_="all").values)
    assert missing.sum() == 7  # the task without a mean gradient, with each other and with itself
    assert len([patch for patch in figure.axes[0].patches if patch.get_hatch()]) == 7
    assert [text.get_text() for text in figure.axes[0].texts].count("not\nresolved") == 7


def test_says_what_it_shows(tree):
    figure = plot.task_matrix(tree)
    axes, bar = figure.axes
    assert axes.get_title(loc="left") == "Cosine of mean gradients, step 300"
    assert [label.get_text() for label in axes.get_yticklabels()] == list(MEANS)
    assert bar.get_ylabel() == "Cosine of mean gradients"
    title, words = words_of(figure)
    assert title == "Cosine of mean gradients, step 300"
    assert words.startswith("Matrix of 4 tasks: chart and document 0.")
    assert "chart and noise without a value" in words


def test_the_colours_of_what_has_bounds_are_the_same_for_every_run(tree):
    for variable, bounds in {"cosine": (-1, 1), "overlap": (0, 1)}.items():
        (image,) = plot.task_matrix(tree, variable=variable).axes[0].images
        assert image.get_clim() == bounds
    low, high = plot.task_matrix(tree, variable="transfer").axes[0].images[0].get_clim()
    assert low == -high


def test_a_transfer_has_its_direction_on_the_axes(tree):
    axes = plot.task_matrix(tree, variable="transfer").axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == (
        "A gradient step on this task …",
        "… lowers the loss of this one",
    )
    assert plot.task_matrix(tree).axes[0].get_xlabel() == ""


def test_letters_can_be_read_on_their_colour(tree):
    colours = {text.get_color() for text in plot.task_matrix(tree).axes[0].texts}
    assert {ON_LIGHT, "white"} <= colours


def test_many_tasks_have_colours_without_numbers():
    names = [f"task {number}" for number in range(12)]
    tree = with_fisher(example_tree([7], 2), steps=(7,), groups=2, means=dict.fromkeys(names, MEANS["chart"]))
    figure = plot.task_matrix(tree, variable="overlap")
    assert not figure.axes[0].texts
    assert words_of(figure)[1].endswith("; and 54 more.")


def test_names_of_tasks_are_drawn_as_they_are():
    tree = with_fisher(example_tree([7], 2), steps=(7,), means={"_a": MEANS["chart"], HOSTILE: MEANS["document"]})
    assert "<script" not in plot.to_svg(plot.task_matrix(tree))


def test_other_variables_are_refused(tree):
    with pytest.raises(
        ValueError, match=r"^Expected a variable of two tasks, got 'noise_scale' with \('step', 'block', 'task'\)\.$"
    ):
        plot.task_matrix(tree, variable="noise_scale")
