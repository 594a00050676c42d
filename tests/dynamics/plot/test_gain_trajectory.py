import numpy as np
import pytest

from dynamics import plot
from dynamics.plot.style import words_of
from tests.fishers import BLOCKS, with_fisher
from tests.trees import example_tree


@pytest.fixture(scope="module")
def tree():
    return with_fisher(example_tree(3, 2), update="leading")


def points(figure, label):
    (found,) = [each for each in figure.axes[0].lines if each.get_label() == label]
    return found


@pytest.mark.parametrize(("label", "name"), [("gain, 95 % interval", "gain"), ("gain, centred Fisher", "gain_centred")])
def test_draws_the_stored_gains(tree, label, name):
    drawn = points(plot.gain_trajectory(tree, k=4, block=BLOCKS[1]), label)
    assert np.array_equal(drawn.get_ydata(), tree["concentration"][name].sel(k=4, block=BLOCKS[1]))
    assert drawn.get_xdata() == pytest.approx([100, 200, 300], abs=3)


def test_the_largest_k_with_a_gain_is_the_default(tree):
    assert (
        plot.gain_trajectory(tree).axes[0].get_title(loc="left") == "Gain over a fresh gradient, 16 leading directions"
    )
    tree = tree.copy(deep=True)
    tree["concentration"]["gain"][..., -1] = np.nan
    assert (
        plot.gain_trajectory(tree).axes[0].get_title(loc="left") == "Gain over a fresh gradient, 8 leading directions"
    )
    assert "1 leading direction" in words_of(plot.gain_trajectory(tree, k=1))[0]


def test_steps_that_are_proven_are_filled(tree):
    tree = tree.copy(deep=True)
    tree["concentration"]["concentrated"][1] = False
    lines = plot.gain_trajectory(tree).axes[0].lines[1:]
    filled = [line for line in lines if line.get_markerfacecolor() != "white" and len(line.get_xdata())]
    assert [len(line.get_xdata()) for line in filled] == [2, 2]


def test_a_single_step_has_both_gains_beside_its_tick():
    figure = plot.gain_trajectory(with_fisher(example_tree([7], 2), steps=(7,)))
    low, high = figure.axes[0].get_xlim()
    assert low < 7 < high
    for label in ("gain, 95 % interval", "gain, centred Fisher"):
        assert abs(points(figure, label).get_xdata()[0] - 7) < 0.1 * (high - low)
    assert figure.axes[0].get_xticks().tolist() == [7]


def test_without_a_null_it_says_so():
    figure = plot.gain_trajectory(with_fisher(example_tree([7], 2), steps=(7,), batch_size=0))
    assert [text.get_text() for text in figure.axes[0].texts] == ["No values: see the findings"]
    assert words_of(figure)[1] == "No step has a value."


def test_a_k_that_is_not_there_is_an_error(tree):
    with pytest.raises(ValueError, match=r"^Expected a k of the result, got 3\. There are: 1, 2, 4, 8, 16\.$"):
        plot.gain_trajectory(tree, k=3)
