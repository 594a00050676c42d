import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection

from dynamics import plot
from dynamics.plot.style import words_of
from tests.fishers import BLOCKS, with_fisher
from tests.trees import example_tree


@pytest.fixture(scope="module")
def tree():
    return with_fisher(example_tree(3, 2))


def test_draws_the_stored_eigenvalues_with_their_interval(tree):
    figure = plot.fisher_spectrum(tree, block=BLOCKS[0], step=200)
    stored = tree["fisher"].to_dataset().sel(block=BLOCKS[0], task="all", step=200)
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == list(range(1, 41))
    assert np.array_equal(line.get_ydata(), stored["eigenvalue"])
    (band,) = [each for each in figure.axes[0].collections if isinstance(each, FillBetweenPolyCollection)]
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == stored["eigenvalue_low"].min()
    assert heights.max() == stored["eigenvalue_high"].max()


def test_says_what_it_shows(tree):
    figure = plot.fisher_spectrum(tree, task="chart")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Eigenvalues of the Fisher, step 300, chart"
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "Index, largest first",
        "Eigenvalue of the Fisher\n(loss²/weight²)",
    )
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "plug-in",
        "95 % interval, without bias",
    ]
    assert words_of(figure)[1].startswith("10 eigenvalues on a logarithmic axis, from ")


def test_zeros_are_counted_and_not_drawn(tree):
    tree = tree.copy(deep=True)
    for name in ("eigenvalue", "eigenvalue_low", "eigenvalue_high"):
        tree["fisher"][name][..., -3:] = 0.0
    figure = plot.fisher_spectrum(tree)
    assert len(figure.axes[0].lines[0].get_ydata()) == 37
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "plug-in (3 zeros not drawn)"


def test_the_last_step_that_has_eigenvalues_is_drawn(tree):
    tree = tree.copy(deep=True)
    tree["fisher"]["eigenvalue"][2] = np.nan
    assert plot.fisher_spectrum(tree).axes[0].get_title(loc="left") == "Eigenvalues of the Fisher, step 200"
    tree["fisher"]["eigenvalue"][:] = np.nan
    figure = plot.fisher_spectrum(tree)
    assert [text.get_text() for text in figure.axes[0].texts] == ["No eigenvalue above zero"]
    assert words_of(figure)[1] == "No eigenvalue is above zero."


def test_what_is_not_there_is_an_error(tree):
    with pytest.raises(ValueError, match=r"^Expected a step of the result, got 5\. There are: 100, 200, 300\.$"):
        plot.fisher_spectrum(tree, step=5)
