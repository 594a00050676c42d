"""What is said of routing is complete, and broken records and results are refused."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from dynamics import schema
from dynamics.routing.dataset import routing_record
from dynamics.store.records import TABLES
from tests.dynamics.plot.test_routing import measured
from tests.trees import example_tree


def record() -> xr.Dataset:
    layers = {"a.mlp": (np.array([2.0, 1.0]), 3.0, 0.5), "b.mlp": (np.array([1.0, 1.0, 1.0]), 3.0, np.nan)}
    return routing_record(7, layers, {"routing": ["top-k", "soft"], "held_in": ["experts", "up,down"]})


def problem(dataset: xr.Dataset) -> str:
    return schema.check_record({"routing": dataset}, TABLES).get("routing", "")


def test_every_variable_is_defined():
    assert all(variable.definition and variable.units for variable in schema.ROUTING.values())
    assert schema.ROUTING_RECORD.keys() <= schema.ROUTING.keys()


def test_a_record_keeps_the_rules():
    assert problem(record()) == ""


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda r: r.drop_vars("margin"), "lacks 'margin' with the dimensions ('step', 'layer')"),
        (lambda r: r.drop_vars("held_in"), "lacks 'held_in' with the dimensions ('layer',)"),
        (lambda r: r.assign_coords(layer=["a", "a"]), "has two layers of one name"),
        (lambda r: r.assign_coords(layer=[1, 2]), "holds no text in 'layer'"),
        (lambda r: r.assign_coords(expert=[1, 2, 3]), "does not number its experts from 0"),
        (lambda r: r.assign_coords(experts=("layer", [2, 4])), "counts more experts than it has"),
        (lambda r: r.assign(assigned=-r["assigned"]), "does not count the tokens of each expert from 0"),
        (lambda r: r.assign(assigned=r["assigned"].fillna(0)), "does not count the tokens of each expert from 0"),
        (lambda r: r.assign(tokens=-r["tokens"]), "does not count its tokens"),
    ],
)
def test_a_broken_record_is_refused(broken, words):
    assert problem(broken(record())) == words


def test_a_broken_result_is_refused():
    tree = example_tree(3, 2)  # which breaks other rules
    for routing, is_whole in ((measured(), True), (measured().drop_vars("experts"), False)):
        tree["routing"] = xr.DataTree(routing)
        with pytest.raises(ValueError, match="breaks its schema") as refused:
            schema.check(tree)
        assert ("/routing" not in str(refused.value)) == is_whole
    assert "/routing lacks the coordinate 'experts' on 'layer'" in str(refused.value)
