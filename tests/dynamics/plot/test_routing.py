"""Curves of routing are those of the result: each layer, the worst in front, and uniform routing."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from dynamics import plot
from dynamics.plot.figures import drawings
from dynamics.plot.style import words_of
from dynamics.routing.dataset import joined_routing, measure_routing, routing_record
from tests.dynamics.routing.test_dataset import update
from tests.trees import example_tree


def measured(names: tuple[str, ...] = ("a.mlp", "b.mlp"), *, moved: bool = True) -> xr.Dataset:
    """``/routing`` of two steps: expert 0 of the second layer gets most tokens, and the last none at step 2."""
    counts = np.array([[[4.0, 4.0, 4.0], [8.0, 2.0, 2.0]], [[4.0, 4.0, 4.0], [10.0, 2.0, 0.0]]])
    about = {"routing": ["top-k"] * 2, "held_in": ["experts"] * 2}
    parts = [
        routing_record(100 * (row + 1), {name: (c, 6.0, 0.5) for name, c in zip(names, of, strict=True)}, about)
        for row, of in enumerate(counts)
    ]
    joined = joined_routing(parts)
    assert joined is not None
    matrices = [f"{name}.experts.w[{expert}]" for name in names for expert in range(3)] if moved else ["gate"]
    return measure_routing(joined, update(matrices, [1, 2, 3, 6, 5, 4][: len(matrices)], [100, 200]))


def lines(figure):
    return {line.get_label().strip(): line for line in figure.axes[0].lines}


def test_draws_each_layer_the_worst_and_uniform_routing():
    table = measured()
    drawn = lines(plot.routing(table, variable="largest_share"))
    assert list(drawn) == ["other layers", "b.mlp", "uniform routing"]
    np.testing.assert_allclose(drawn["b.mlp"].get_ydata(), [8 / 12, 10 / 12])
    assert drawn["b.mlp"].get_xdata().tolist() == [100, 200]
    chance = table["largest_share_chance"].sel(layer="b.mlp")
    np.testing.assert_allclose(drawn["uniform routing"].get_ydata(), chance)


@pytest.mark.parametrize("variable", ["effective_experts", "dead", "margin", "entropy"])
def test_every_number_of_layers_can_be_drawn(variable):
    table = measured()
    (worst,) = [line for label, line in lines(plot.routing(table, variable=variable)).items() if label.endswith("mlp")]
    assert worst.get_ydata().tolist() in table[variable].transpose("layer", "step").values.tolist()


def test_says_what_it_shows():
    title, description = words_of(plot.routing(measured(), variable="dead"))
    assert title == "Experts without a token"
    assert description == "Lines of 2 layers over optimizer steps; b.mlp: 0 at step 100 and 1 at step 200."


def test_a_number_of_experts_is_refused():
    with pytest.raises(ValueError, match="Expected a variable of step and layer, got 'load' with"):
        plot.routing(measured(), variable="load")


def test_a_result_without_the_group_is_refused():
    with pytest.raises(ValueError, match="Expected a result with the group /routing"):
        plot.routing(example_tree(3, 2))


def test_without_a_value_it_says_so():
    table = measured()
    figure = plot.routing(table.assign(margin=table["margin"] * np.nan), variable="margin")
    assert [text.get_text() for text in figure.axes[0].texts] == ["No step has a value"]


def test_names_from_files_are_drawn_as_they_are():
    svg = plot.to_svg(plot.routing(measured(("_$\\frac$", "<b>&")), variable="dead"))
    assert "&lt;b&gt;&amp;" in svg


def test_it_is_among_the_figures_of_a_result():
    tree = example_tree(3, 2)
    assert not [name for name in drawings(tree) if "rout" in name or "expert" in name]
    tree["routing"] = xr.DataTree(measured())
    names = {"expert_load", "expert_updates", "routing_effective_experts", "routing_largest_share", "routing_dead"}
    assert names <= drawings(tree).keys()
    tree["routing"] = xr.DataTree(measured(moved=False))
    assert "expert_updates" not in drawings(tree)
