import numpy as np
import pytest
import xarray as xr

from dynamics import plot
from dynamics.plot.select import standouts
from dynamics.plot.spectrum import spectra_of_standouts
from tests.trees import HOSTILE, example_tree, matrix_names


@pytest.fixture(scope="module")
def tree():
    return example_tree()


def test_draws_the_stored_singular_values(tree):
    name = matrix_names(3)[2]
    figure = plot.spectrum(tree, matrices=[name], step=300, kind="increment")
    (line,) = figure.axes[0].lines
    stored = tree["update"]["singular_value"].sel(step=300, kind="increment", matrix=name).values
    assert np.array_equal(line.get_ydata(), stored)
    assert line.get_xdata().tolist() == list(range(1, 17))
    assert figure.axes[0].get_yscale() == "log"


def test_shows_what_stands_out_by_default(tree):
    figure = plot.spectrum(tree)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(
        standouts(tree["update"].to_dataset())
    )


def test_zeros_are_counted_rather_than_drawn(tree):
    name = matrix_names(1)[0]
    update = tree["update"].to_dataset().copy(deep=True)
    update["singular_value"].loc[{"matrix": name, "kind": "total", "index": [6, 7]}] = 0.0
    figure = plot.spectrum(update, matrices=[name])
    assert len(figure.axes[0].lines[0].get_ydata()) == 6
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == f"{name} (2 zeros not drawn)"


def test_a_zero_update_has_nothing_to_draw():
    names = matrix_names(14)
    figure = plot.spectrum(example_tree(zero=names), matrices=names[:1])
    assert [text.get_text() for text in figure.axes[0].texts] == ["No singular value above zero"]


def test_null_band_of_one_matrix_where_it_is_stored(tree):
    name = matrix_names(1)[0]
    own = tree["update"]["singular_value"]
    null = tree["null"].to_dataset().assign(singular_value_low=own * 0.9, singular_value_high=own * 1.1)
    with_null = xr.DataTree.from_dict({"/update": tree["update"].to_dataset(), "/null": null})
    assert len(plot.spectrum(with_null, matrices=[name]).axes[0].collections) == 1
    assert len(plot.spectrum(with_null, matrices=matrix_names(2)).axes[0].collections) == 0
    without = xr.DataTree.from_dict({"/update": tree["update"].to_dataset()})
    assert len(plot.spectrum(without, matrices=[name]).axes[0].collections) == 0


def test_names_of_files_are_no_formulas_and_not_left_out():
    tree = example_tree(matrices=[HOSTILE, "_hidden"])
    figure = plot.spectrum(tree, matrices=[HOSTILE, "_hidden"])
    texts = figure.axes[0].get_legend().get_texts()
    assert [text.get_text().strip() for text in texts] == [HOSTILE, "_hidden"]
    svg = plot.to_svg(figure)
    assert "$a$" in svg
    assert "<script" not in svg


def test_a_long_legend_is_cut_and_says_so():
    tree = example_tree(matrices=30, steps=1)
    legend = plot.spectrum(tree, matrices=matrix_names(30)).axes[0].get_legend()
    assert len(legend.get_texts()) == 12
    assert legend.get_texts()[-1].get_text() == "… and 19 more"


@pytest.mark.parametrize("matrices", [1, 2, 5, 40])
def test_one_panel_for_each_that_stands_out(matrices):
    tree = example_tree(matrices=matrices)
    figure = spectra_of_standouts(tree)
    assert len(figure.axes) == len(standouts(tree["update"].to_dataset()))
    assert all(len(axes.lines) == 1 for axes in figure.axes)


def test_unknown_names_and_steps_are_refused(tree):
    with pytest.raises(ValueError, match=r"^Expected the name of a matrix of the result, got 'q'\.$"):
        plot.spectrum(tree, matrices=["q"])
    with pytest.raises(ValueError, match=r"^Expected a step of the result, got 7\. There are: 100, 200, "):
        plot.spectrum(tree, step=7)
