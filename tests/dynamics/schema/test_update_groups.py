"""What the schema says of updates, gradients, their null models and summaries."""

from __future__ import annotations

import pytest

from dynamics import schema


@pytest.mark.parametrize("name", schema.MEASURES)
def test_each_measure_has_a_formula_and_a_source(name: str) -> None:
    measure = schema.MEASURES[name]
    assert measure.definition
    assert measure.reference
    assert measure.dims == ("step", "kind", "matrix")


def test_gradients_have_the_measures_of_updates() -> None:
    for name, measure in schema.MEASURES.items():
        gradient = schema.GRADIENT[name]
        assert (gradient.dims, gradient.units) == (("step", "matrix"), measure.units)


def test_null_models_have_a_mean_and_a_band() -> None:
    for name in schema.NULL_MEASURES:
        assert {schema.NULL[f"{name}{bound}"].units for bound in ("", "_low", "_high")} == {schema.MEASURES[name].units}


def test_units_are_stated_everywhere() -> None:
    groups = (schema.UPDATE, schema.GRADIENT, schema.NULL, schema.SUMMARY, schema.PATH, schema.BASE, schema.WEIGHTS)
    assert all(variable.units and variable.long_name for group in groups for variable in group.values())
