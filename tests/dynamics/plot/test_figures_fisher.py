import re

import numpy as np
import pytest

from dynamics import plot
from dynamics.plot.figures import fisher_drawings
from tests.fishers import MEANS, with_fisher
from tests.trees import example_tree

FISHER = ["fisher_ln_participation_ratio", "fisher_spectral_entropy", "fisher_dominant_ratio", "fisher_spectrum"]


@pytest.fixture(scope="module")
def drawn():
    tree = with_fisher(example_tree(3, 2), space="factor")
    return {name: draw() for name, draw in fisher_drawings(tree).items()}


def test_a_full_result_has_every_figure(drawn):
    assert list(drawn) == [
        *FISHER,
        "rarefaction",
        "concentration",
        "concentration_gain",
        "concentration_gain_over_steps",
        "tasks_cosine",
        "tasks_overlap",
        "tasks_transfer",
    ]


def test_every_figure_keeps_its_legend_inside(drawn):
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        legend = figure.axes[0].get_legend()
        if legend is not None:
            box = legend.get_window_extent()
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, name
            assert figure.bbox.y0 <= box.y0, name


def test_they_are_among_the_figures_of_a_result():
    tree = with_fisher(example_tree(3, 2))
    assert set(fisher_drawings(tree)) < set(plot.drawings(tree))


def test_without_a_fisher_there_is_none():
    assert fisher_drawings(example_tree(1, 2)) == {}


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, {"tasks_transfer", "concentration_gain_over_steps"}),
        ({"batch_size": 0}, {"tasks_transfer", "concentration_gain", "concentration_gain_over_steps"}),
        (
            {"update": "none"},
            {"tasks_transfer", "concentration", "concentration_gain", "concentration_gain_over_steps"},
        ),
        (
            {"means": {"a": MEANS["chart"]}},
            {"tasks_cosine", "tasks_overlap", "tasks_transfer", "concentration_gain_over_steps"},
        ),
    ],
)
def test_what_has_no_value_is_not_drawn(drawn, changes, absent):
    assert set(fisher_drawings(with_fisher(example_tree([7], 2), steps=(7,), **changes))) == set(drawn) - absent


def test_a_broken_fisher_is_not_drawn():
    tree = with_fisher(example_tree(3, 2))
    for name in ("fisher", "concentration", "tasks"):
        for variable, array in tree[name].data_vars.items():
            if array.dtype == np.float64:
                tree[name][variable][:] = np.nan
    assert fisher_drawings(tree) == {}


def test_a_result_of_some_blocks_only_has_no_figure_of_all():
    tree = with_fisher(example_tree(3, 2))
    part = {name: tree[name].to_dataset().drop_sel(block="global") for name in ("fisher", "concentration", "tasks")}
    assert fisher_drawings(type(tree).from_dict({f"/{name}": group for name, group in part.items()})) == {}


@pytest.mark.parametrize("changes", [{}, {"groups": 1, "batch_size": 0}])
def test_no_missing_number_reaches_a_path(changes):
    for draw in fisher_drawings(with_fisher(example_tree([7], 2), steps=(7,), **changes)).values():
        paths = [line for line in plot.to_svg(draw()).splitlines() if " d=" in line or "transform=" in line]
        assert not [line for line in paths if re.search(r"\b(nan|inf)\b", line.lower())]
