"""The page of measures is that of the schema."""

from dynamics import schema
from tests.measures_page import GROUPS, PAGE, PITFALLS, described, measures_page


def test_it_is_up_to_date():
    assert PAGE.read_text() == measures_page(), "run python -m tests.measures_page"


def test_pitfalls_are_of_variables_that_exist():
    known = {f"{group}/{name}" for group in GROUPS for name in described(group)}
    assert set(PITFALLS) <= known


def test_every_measure_of_an_update_has_formula_source_and_pitfall():
    for name in schema.MEASURES:
        entry = PAGE.read_text().split(f"### `{name}`\n")[1].split("###")[0]
        assert all(f"- **{fact}**: " in entry for fact in ("Formula", "Source", "Pitfall")), name
