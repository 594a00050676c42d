import re

import matplotlib as mpl
import pytest

from dynamics import plot
from dynamics.plot.figures import HEATMAPS, OF_GRADIENTS, OVER_STEPS, figure_name, gradient_name
from tests.trees import HOSTILE, example_runs, example_tree, matrix_names


def test_a_full_result_has_every_figure():
    drawn = plot.figures(example_tree())
    over_steps = [figure_name(variable, kind) for variable, kind in OVER_STEPS]
    assert list(drawn) == [*over_steps, "training_loss", *(f"heatmap_{name}" for name in HEATMAPS), "spectra"]


def test_captured_gradients_have_figures_after_those_of_updates():
    drawn = list(plot.drawings(example_tree(gradients=[100, 200])))
    own = [gradient_name(variable) for variable in OF_GRADIENTS]
    assert own == ["gradient_norm", "gradient_effective_rank_energy", "gradient_dominant_ratio"]
    place = drawn.index(own[0])
    assert drawn[place : place + 3] == own
    assert drawn[place - 1] == figure_name(*OVER_STEPS[-1])
    assert len(drawn) == len(plot.drawings(example_tree())) + 3


def test_norms_alone_have_one_figure_of_gradients():
    drawn = plot.drawings(example_tree(gradients=[100], gradient_spectra=False))
    assert [name for name in drawn if name.startswith("gradient")] == ["gradient_norm"]


def test_one_checkpoint_has_no_figure_of_increments():
    drawn = plot.drawings(example_tree(steps=1))
    assert not {"frobenius_norm_increment", "effective_rank_energy_increment", "increment_cosine", "path_length"} & set(
        drawn
    )


def test_zero_updates_have_figures_of_their_size_only():
    drawn = plot.drawings(example_tree(zero=matrix_names(14)))
    assert set(drawn) == {
        "frobenius_norm_total",
        "frobenius_norm_increment",
        "path_length",
        "training_loss",
        "heatmap_frobenius_norm",
    }


def test_a_run_without_a_log_has_no_loss():
    tree = example_tree()
    del tree["training"]
    assert "training_loss" not in plot.drawings(tree)


def test_several_runs_have_their_figures_apart():
    drawn = plot.drawings(example_runs(a=example_tree(steps=2), b=example_tree(steps=1)))
    assert {"a/spectra", "b/spectra", "a/frobenius_norm_increment"} <= set(drawn)
    assert "b/frobenius_norm_increment" not in drawn


def test_a_figure_that_fails_leaves_the_others():
    tree = example_tree()
    draws = plot.drawings(tree)
    del tree["update"]["singular_value"]
    with pytest.raises(KeyError, match="singular_value"):
        draws["spectra"]()
    assert all(plot.to_svg(draw()).startswith("<svg") for name, draw in draws.items() if name != "spectra")


@pytest.mark.parametrize(
    "awkward",
    [
        {"steps": 1, "matrices": 1},
        {"segment": [0, 1, 0, 1, 1, 1]},
        {"missing": matrix_names(3)},
        {"steps": 1, "matrices": 1, "gradients": [100]},
        {"gradients": [100, 300], "gradient_spectra": False},
        {"matrices": [HOSTILE, "_a.0.b", "x" * 200, "层.0"]},
    ],
)
def test_no_missing_number_reaches_a_path(awkward):
    for figure in plot.figures(example_tree(**awkward)).values():
        paths = [line for line in plot.to_svg(figure).splitlines() if " d=" in line or "transform=" in line]
        assert not [line for line in paths if re.search(r"\b(nan|inf)\b", line.lower())]


def test_the_users_settings_stay_as_they_are():
    before = _settings()
    for figure in plot.figures(example_tree(steps=2)).values():
        plot.to_svg(figure)
    assert _settings() == before


def _settings():
    # Not dict(rcParams): reading the backend by its name would choose one.
    return dict(dict.items(mpl.rcParams))
