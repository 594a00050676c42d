import inspect
import re
from contextlib import nullcontext
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from dynamics import plot
from dynamics.plot import style
from dynamics.plot.style import describe, panel
from tests.trees import HOSTILE, example_tree

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def tree():
    return example_tree()


def test_equal_figures_give_equal_text(tree):
    assert plot.to_svg(plot.trajectory(tree)) == plot.to_svg(plot.trajectory(tree))


def test_is_one_element_with_title_and_description(tree):
    root = ElementTree.fromstring(plot.to_svg(plot.trajectory(tree, variable="stable_rank")))
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.find(f"{SVG}title").text == "Stable rank of the total update"
    assert root.find(f"{SVG}desc").text.startswith("Line over optimizer steps, median and quartiles over matrices.")


def test_words_are_text_and_escaped():
    figure = Figure()
    describe(figure, HOSTILE, HOSTILE)
    svg = plot.to_svg(figure)
    assert "<script" not in svg
    assert ElementTree.fromstring(svg).find(f"{SVG}title").text == HOSTILE


def test_text_stays_text(tree):
    texts = [text.text for text in ElementTree.fromstring(plot.to_svg(plot.trajectory(tree))).iter(f"{SVG}text")]
    assert "Optimizer step" in texts


def test_neither_time_nor_version_is_written(tree):
    svg = plot.to_svg(plot.trajectory(tree))
    assert "<metadata>" not in svg
    assert "Matplotlib v" not in svg
    assert "<style" not in svg


def test_references_point_into_the_same_figure(tree):
    for figure in plot.figures(tree).values():
        svg = plot.to_svg(figure)
        known = set(re.findall(r'\bid="([^"]+)"', svg))
        used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
        assert used
        assert used <= known


def test_foreign_letters_are_left_to_the_reader():
    figure = Figure()
    figure.subplots().set_title("层 0")
    assert "层 0" in plot.to_svg(figure)


@pytest.mark.parametrize("draw", [plot.trajectory, plot.heatmap, plot.training_log])
@pytest.mark.parametrize("layout", ["constrained", "compressed", "tight", "none", None])
def test_a_figure_that_is_laid_out_before_is_drawn_as_matplotlib_would(tree, draw, layout, monkeypatch):
    def figure_in_layout():
        figure = draw(tree)
        if layout != "tight" or draw is not plot.heatmap:  # a colour bar stands in the way of this one
            figure.set_layout_engine(layout)
        return figure

    figure = figure_in_layout()
    before = figure.get_layout_engine(), figure.canvas, figure.dpi
    drawn = plot.to_svg(figure)
    assert (figure.get_layout_engine(), figure.canvas, figure.dpi) == before
    monkeypatch.setattr(style, "_laid_out", nullcontext)
    assert drawn == plot.to_svg(figure_in_layout())


@pytest.mark.parametrize(
    ("values", "scale", "marked"),
    [([3.0, 4.0], "linear", True), ([-3.0, -2.0], "linear", True), ([0.0, 4.0], "linear", False),
     ([-1.0, 4.0], "linear", False), ([3.0, 4.0], "log", False)],
)  # fmt: skip
def test_an_axis_that_does_not_begin_at_zero_is_marked(values, scale, marked):
    with panel(None, "title", "description") as axes:
        axes.plot([0, 1], values)
        axes.set_yscale(scale)
    assert len(axes.patches) == marked
    own = Figure().subplots()
    with panel(own, "title", "description"):
        own.plot([0, 1], values)
    assert not own.patches


def test_what_is_no_figure_is_refused(tree):
    with pytest.raises(TypeError, match=r"Expected a matplotlib figure, got DataTree\. Draw one first"):
        inspect.unwrap(plot.to_svg)(tree)
