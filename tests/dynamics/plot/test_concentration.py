import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection

from dynamics import plot
from dynamics.plot.style import words_of
from dynamics.text import percent
from tests.fishers import BLOCKS, with_fisher
from tests.trees import example_tree


@pytest.fixture(scope="module")
def tree():
    return with_fisher(example_tree(3, 2))


@pytest.fixture(scope="module")
def here(tree):
    return tree["concentration"].to_dataset().sel(block="global", step=300)


def line(figure, label):
    (found,) = [each for each in figure.axes[0].lines if each.get_label() == label]
    return found


def labels(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_draws_the_stored_shares(tree, here):
    figure = plot.concentration(tree)
    for label, name in {
        "update, directions of all samples": "captured",
        "update, directions of half": "captured_split",
        "random direction, 95 %": "null_isotropic",
        "fresh gradient of 2 samples, 95 %": "null_gradient",
    }.items():
        drawn = line(figure, label)
        assert drawn.get_xdata().tolist() == [1, 2, 4, 8, 16]
        assert np.array_equal(drawn.get_ydata(), here[name]), name


def test_both_nulls_are_bands(tree, here):
    figure = plot.concentration(tree)
    bands = [each for each in figure.axes[0].collections if isinstance(each, FillBetweenPolyCollection)]
    for band, name in zip(bands, ["null_isotropic", "null_gradient"], strict=True):
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == here[f"{name}_low"].min()
        assert heights.max() == here[f"{name}_high"].max()
    assert bands[0].get_facecolor().tolist() != bands[1].get_facecolor().tolist()


def test_says_what_it_shows(tree, here):
    figure = plot.concentration(tree, block=BLOCKS[0], step=200)
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == f"Share of the update in k leading directions, step 200\n{BLOCKS[0]}"
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "Number k of leading directions of the Fisher",
        "Share of the squared norm",
    )
    assert axes.get_xticks().tolist() == [1, 2, 4, 8, 16]
    title, words = words_of(plot.concentration(tree))
    assert title == "Share of the update in k leading directions, step 300"
    share = percent(float(here["captured"][-1]))
    assert words.startswith(f"Lines over k. The update has {share} of its squared norm in 16 directions, ")


def test_without_a_batch_size_there_is_no_gradient_null():
    figure = plot.concentration(with_fisher(example_tree([7], 2), steps=(7,), batch_size=0))
    assert labels(figure) == ["random direction, 95 %", "update, directions of all samples"]


def gains(figure, which):
    """Points of one kind, unfilled: all of them."""
    (found,) = [each for each in figure.axes[0].lines if each.get_label() == which]
    return found


@pytest.mark.parametrize(("label", "name"), [("gain, 95 % interval", "gain"), ("gain, centred Fisher", "gain_centred")])
def test_gains_are_the_stored_ones(tree, here, label, name):
    assert np.array_equal(gains(plot.concentration(tree, show="gain"), label).get_ydata(), here[name])


def test_only_what_is_proven_is_filled(tree):
    open_ones = plot.concentration(tree, show="gain")
    assert all(point.get_markerfacecolor() == "white" for point in open_ones.axes[0].lines[1:])
    assert "filled: both above 1" not in labels(open_ones)
    leading = with_fisher(example_tree(3, 2), update="leading")
    proven = leading["concentration"]["concentrated"].sel(block="global", step=300)
    assert proven.all()  # the fixture's update lies along the leading direction
    figure = plot.concentration(leading, show="gain")
    filled = [point for point in figure.axes[0].lines[1:] if point.get_markerfacecolor() != "white"]
    assert [len(point.get_ydata()) for point in filled] == [5, 5, 0]
    assert labels(figure)[-1] == "filled: both above 1"


def test_a_flag_with_gaps_is_read_as_a_flag():
    leading = with_fisher(example_tree(3, 2), update="leading")
    leading["concentration"]["concentrated"] = leading["concentration"]["concentrated"].astype(float)
    leading["concentration"]["concentrated"][..., 1] = np.nan
    figure = plot.concentration(leading, show="gain")
    filled = [point for point in figure.axes[0].lines[1:] if point.get_markerfacecolor() != "white"]
    assert [len(point.get_ydata()) for point in filled] == [4, 4, 0]


def test_endless_intervals_leave_the_gains_visible(tree):
    tree = tree.copy(deep=True)
    tree["concentration"]["gain_high"][..., 0] = 1e6
    tree["concentration"]["gain_low"][..., 0] = 0.0
    low, high = plot.concentration(tree, show="gain").axes[0].get_ylim()
    gain = tree["concentration"]["gain"].sel(block="global", step=300)
    assert 0 < low < gain.min()
    assert gain.max() < high < 1e3


def test_without_an_update_it_says_so():
    tree = with_fisher(example_tree(3, 2), update="none")
    for show in ("share", "gain"):
        figure = plot.concentration(tree, show=show)
        assert [text.get_text() for text in figure.axes[0].texts] == ["No values: see the findings"]
        assert words_of(figure)[1] == "No k has a value."


def test_what_is_not_there_is_an_error(tree):
    with pytest.raises(ValueError, match=r"^Expected show='share' or show='gain', got 'gains'\.$"):
        plot.concentration(tree, show="gains")
    with pytest.raises(ValueError, match=r"^Expected a block of the result, got 'x'\. There are: "):
        plot.concentration(tree, block="x")


def test_the_optimizers_null_is_drawn_beside_the_gradients():
    tree = with_fisher(example_tree(3, 2), optimizer=True)
    here = tree["concentration"].to_dataset().sel(block="global", step=300)
    drawn = line(plot.concentration(tree), "fresh step of the optimizer, 95 %")
    assert np.array_equal(drawn.get_ydata(), here["null_optimizer"])
    gains = line(plot.concentration(tree, show="gain"), "gain over a step of the optimizer")
    assert np.array_equal(gains.get_ydata(), here["gain_optimizer"])


def test_a_null_that_is_the_gradients_is_not_drawn_twice(tree):
    shares = tree["concentration"].to_dataset().copy()
    for end in ("", "_low", "_high"):
        shares[f"gain_optimizer{end}"] = shares[f"gain{end}"]
    assert "gain over a step of the optimizer" not in labels(plot.concentration(shares, show="gain"))
    assert "fresh step of the optimizer, 95 %" not in labels(plot.concentration(shares))


@pytest.mark.filterwarnings("error:constrained_layout")
@pytest.mark.parametrize("show", ["share", "gain"])
def test_a_legend_with_the_optimizers_null_is_inside_the_figure(show):
    figure = plot.concentration(with_fisher(example_tree(3, 2), optimizer=True), show=show)
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend().get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert "Over a fresh step of the optimizer it is" in figure.get_label() or show == "share"
