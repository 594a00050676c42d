"""What the schema says of scores, associations and comparisons."""

from __future__ import annotations

import pytest

from dynamics import schema


@pytest.mark.parametrize("group", [schema.ASSOCIATION, schema.COMPARISON], ids=["association", "comparison"])
def test_p_values_have_no_unit_and_a_definition(group: dict[str, schema.Variable]) -> None:
    names = [name for name in group if name.startswith(("p_", "q_"))]
    assert "p_value" in names
    assert all(group[name].units == "1" and group[name].definition for name in names)


@pytest.mark.parametrize("group", [schema.ASSOCIATION, schema.COMPARISON], ids=["association", "comparison"])
def test_intervals_have_two_ends(group: dict[str, schema.Variable]) -> None:
    assert group["low"].dims == group["high"].dims


def test_scores_say_how_many_items_they_rest_on() -> None:
    assert set(schema.SCORE) == {"score", "items", "standard_error"}
    assert {variable.dims for variable in schema.SCORE.values()} == {("step", "task")}
