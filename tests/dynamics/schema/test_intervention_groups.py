"""What the schema says of the groups of interventions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from dynamics import schema
from dynamics.checkpoints import open_trajectory
from dynamics.pipeline import measure
from tests.runs import write_run

VARIABLES = [(group, name) for group, table in schema.INTERVENTION_GROUPS.items() for name in table]


@pytest.mark.parametrize(("group", "name"), VARIABLES)
def test_each_variable_has_a_definition_and_a_step(group: str, name: str) -> None:
    variable = schema.INTERVENTION_GROUPS[group][name]
    assert variable.definition
    assert variable.dims[0] == ("scale" if name == "scaled_loss" else "step")


@pytest.mark.parametrize(("group", "name"), [pair for pair in VARIABLES if pair[1].endswith("_low")])
def test_intervals_have_two_ends_like_their_number(group: str, name: str) -> None:
    table, stem = schema.INTERVENTION_GROUPS[group], name.removesuffix("_low")
    assert {table[f"{stem}{end}"].dims for end in ("_low", "_high", "")} == {table[stem].dims}


def test_a_group_with_all_its_variables_keeps_the_schema(tmp_path: Path) -> None:
    """What `/intervention` must have is in test_checks_interventions.py."""
    group, table = "sensitivity", schema.SENSITIVITY
    arrays = {name: np.zeros([1] * len(variable.dims)) for name, variable in table.items()}
    tree = measure(open_trajectory(write_run(tmp_path / "run")))
    tree[group] = xr.DataTree(xr.Dataset(schema.label_arrays(table, arrays)))
    schema.check(tree)
    first = next(iter(table))
    tree[group] = xr.DataTree(tree[group].to_dataset().drop_vars(first))
    with pytest.raises(ValueError, match=re.escape(f"/{group} lacks '{first}'")):
        schema.check(tree)
