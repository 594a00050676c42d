from importlib import import_module
from xml.etree import ElementTree

import pytest

from dynamics import plot
from dynamics.plot.hover_heatmap import fits_a_page
from tests.trees import HOSTILE, example_tree, matrix_names


@pytest.fixture(scope="module")
def tree():
    return example_tree(matrices=21, missing=matrix_names(1))


def titles(panel):
    return [title.text for title in ElementTree.fromstring(panel).iter("title")]


def test_every_cell_tells_matrix_step_and_value(tree):
    _, panels = plot.hover_heatmap(tree, variable="stable_rank")
    told = [title for _, panel in panels for title in titles(panel)]
    stored = tree["update"]["stable_rank"].sel(kind="total")
    expected = {
        f"{name}, step {step}: {float(stored.sel(step=step, matrix=name)):.4g}".replace("nan", "no value")
        for name in stored["matrix"].values
        for step in stored["step"].values
    }
    assert len(told) == 21 * 6
    assert set(told) == expected


def test_one_panel_for_each_role_with_its_layers(tree):
    _, panels = plot.hover_heatmap(tree)
    assert [label for label, _ in panels][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    words = [text.text for text in ElementTree.fromstring(panels[0][1]).iter("text")]
    assert words == ["0", "1", "2", "step 100", "600"]


def test_a_missing_value_has_its_own_colour(tree):
    _, panels = plot.hover_heatmap(tree)
    cells = [rect for _, panel in panels for rect in ElementTree.fromstring(panel).iter("rect")]
    grey = [rect for rect in cells if rect.get("fill") == "#dddddd"]
    assert [rect.find("title").text for rect in grey] == ["model.layers.0.self_attn.q_proj, step 600: no value"]


def test_the_extremes_have_the_ends_of_the_colour_map(tree):
    scale, panels = plot.hover_heatmap(tree)
    colours = [rect.get("fill") for rect in ElementTree.fromstring(scale).iter("rect")]
    drawn = {rect.get("fill") for _, panel in panels for rect in ElementTree.fromstring(panel).iter("rect")}
    assert {colours[0], colours[-2]} <= drawn
    assert len(set(colours)) == 65


def test_names_are_escaped():
    _, panels = plot.hover_heatmap(example_tree(steps=1, matrices=[HOSTILE]))
    assert titles(panels[0][1])[0].startswith(f"{HOSTILE}, step 100: ")
    assert "<script" not in panels[0][1]


def test_every_panel_has_words_for_who_cannot_see_it(tree):
    scale, panels = plot.hover_heatmap(tree)
    for element in [scale, *(panel for _, panel in panels)]:
        assert ElementTree.fromstring(element).get("role") == "img"
        assert len(ElementTree.fromstring(element).get("aria-label")) > 20


def test_too_many_cells_are_for_a_picture(tree, monkeypatch):
    module = import_module("dynamics.plot.hover_heatmap")
    monkeypatch.setattr(module, "MOST_CELLS", 21 * 6)
    assert fits_a_page(tree)
    monkeypatch.setattr(module, "MOST_CELLS", 21 * 6 - 1)
    assert not fits_a_page(tree)
