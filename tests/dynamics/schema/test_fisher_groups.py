"""What the schema says of the Fisher's groups."""

from __future__ import annotations

import pytest

from dynamics import schema

VARIABLES = [(group, name) for group, table in schema.FISHER_GROUPS.items() for name in table]


@pytest.mark.parametrize(("group", "name"), VARIABLES)
def test_each_variable_has_a_definition_and_a_step(group: str, name: str) -> None:
    variable = schema.FISHER_GROUPS[group][name]
    assert variable.definition
    assert variable.dims[0] == "step"


@pytest.mark.parametrize(("group", "name"), [pair for pair in VARIABLES if pair[1].endswith("_low")])
def test_intervals_have_two_ends_like_their_number(group: str, name: str) -> None:
    table, stem = schema.FISHER_GROUPS[group], name.removesuffix("_low")
    assert {table[f"{stem}{end}"].dims for end in ("_low", "_high")} == {table[name].dims}
    assert stem not in table or table[stem].dims == table[name].dims


def test_the_record_holds_what_everything_follows_from() -> None:
    assert schema.FISHER_RECORD["gram"].dims == ("step", "block", "sample", "sample_")
    assert {"gram", "update_product", "update_norm_squared", "dimension"} <= set(schema.FISHER_RECORD)
