"""Adapters, files of other libraries, and records of the first format keep their numbers.

``python -m tests.goldens keep`` writes the expected numbers. Run it again with trusted code where a number is meant to
change, and give the reason in the commit. ``python -m tests.goldens compare`` compares more inputs, bit for bit.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.golden_differences import Dump, Intended, differences, renamed, unintended
from tests.golden_inputs import DATA, MAKERS, unpack
from tests.goldens import INTENDED, KEPT, results

#: Other machines and libraries round differently.
RTOL = 1e-9
#: Factors of a training's first increments are nearly dependent. The smallest singular values of their null models, and
#: so the condition numbers, are rounding errors.
NULLS, NULLS_RTOL, ROUNDING = re.compile("/null|_null"), 1e-6, re.compile("condition_number.*_low")


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    unpack(DATA / "results.tar.xz", folder)
    return folder


@pytest.mark.parametrize("name", KEPT)
def test_numbers_equal_the_frozen_ones(name: str, frozen: Path, tmp_path: Path) -> None:
    MAKERS[name](tmp_path / name)
    compared = []
    for variant, new in results(name, tmp_path, KEPT[name]):
        case = f"{name}/{variant}"
        old = renamed(case, Dump.read(frozen / name / variant), INTENDED, set())
        changes = [change for change in differences(old, new, RTOL) if not NULLS.search(change.path)]
        changes += [
            change
            for change in differences(old, new, NULLS_RTOL)
            if NULLS.search(change.path) and not (ROUNDING.search(change.path) and change.kind == "values")
        ]
        assert unintended(case, changes, INTENDED, set()) == [], case
        compared.append(variant)
    assert sorted(compared) == sorted(path.stem for path in (frozen / name).glob("*.npz"))


def example(value: float = 1.0, dimension: str = "step", code: str = "OD202", **changes: object) -> Dump:
    finding = {"of": "/", "code": code, "severity": "note", "file": "", "matrix": "q", "step": 2, "evidence": {"n": 3}}
    arrays = {f"/path/{dimension}": np.arange(2), "/path/length": np.array([value, np.nan])}
    return Dump(arrays, {key: [dimension] for key in arrays}, [{**finding, **changes}], {"summary.json:last_step": 2})


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (example(), []),
        (example(value=np.nextafter(1.0, 2.0)), [("/path/length", "values")]),
        (example(value=np.nan), [("/path/length", "values")]),
        (example(code="OD203"), [("OD202", "missing"), ("OD203", "added")]),
        (example(evidence={"n": 4}), [("OD202", "evidence")]),
        (
            example(dimension="point"),
            [("/path/length", "dims"), ("/path/point", "added"), ("/path/step", "missing")],
        ),
    ],
)
def test_each_kind_of_difference_is_reported(new: Dump, expected: list[tuple[str, str]]) -> None:
    assert [(difference.path, difference.kind) for difference in differences(example(), new)] == expected


def test_the_tolerance_is_relative_to_the_largest_value() -> None:
    assert differences(example(), example(value=1 + 1e-10), rtol=1e-9) == []
    assert differences(example(), example(value=1 + 1e-8), rtol=1e-9) != []


def test_a_renamed_variable_is_compared_under_its_new_name() -> None:
    entry = Intended("*", "*/path/step", "renamed", "A path has points.", now="point")
    used: set[Intended] = set()
    old = renamed("input/run", example(), [entry], used)
    assert (differences(old, example(dimension="point")), used) == ([], {entry})
    assert [change.kind for change in differences(old, example(value=2.0, dimension="point"))] == ["values"]


def test_only_intended_differences_pass() -> None:
    entry = Intended("input/*", "OD203", "added", "The check is new.")
    changes = differences(example(), example(code="OD203"))
    assert [change.path for change in unintended("input/run", changes, [entry], set())] == ["OD202"]
    assert unintended("other/run", changes, [entry], set()) == changes
