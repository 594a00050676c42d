"""Adapters, files of other libraries, and records of the first format give the numbers that they gave before.

The numbers were made by ``python -m tests.goldens keep``; run it again, by code that is believed, where one is meant to
change, and say in the commit which and why. All of them, of more inputs and to the last bit, are compared by
``python -m tests.goldens compare``.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.golden_differences import Dump, Intended, differences, judged, renamed
from tests.golden_inputs import DATA, MAKERS
from tests.goldens import INTENDED, KEPT, results

#: Other machines and libraries round differently.
RTOL = 1e-9
#: Null models of a training's first increments are of factors that nearly depend on each other: their smallest singular
#: values, and so their condition numbers, are rounding.
NULLS, NULLS_RTOL, ROUNDING = re.compile("/null|_null"), 1e-6, re.compile("condition_number.*_low")


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    with tarfile.open(DATA / "results.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", KEPT)
def test_numbers_are_those_that_were_frozen(name: str, frozen: Path, tmp_path: Path) -> None:
    MAKERS[name](tmp_path / name)
    compared = []
    for variant, new in results(name, tmp_path, KEPT[name]):
        case = f"{name}/{variant}"
        old = renamed(case, Dump.read(frozen / name / variant), INTENDED, set())
        found = [each for each in differences(old, new, RTOL) if not NULLS.search(each.path)]
        found += [
            each
            for each in differences(old, new, NULLS_RTOL)
            if NULLS.search(each.path) and not (ROUNDING.search(each.path) and each.kind == "values")
        ]
        assert judged(case, found, INTENDED, set()) == [], case
        compared.append(variant)
    assert sorted(compared) == sorted(path.stem for path in (frozen / name).glob("*.npz"))


def made(value: float = 1.0, dimension: str = "step", code: str = "OD202", **changes: object) -> Dump:
    finding = {"of": "/", "code": code, "severity": "note", "file": "", "matrix": "q", "step": 2, "evidence": {"n": 3}}
    arrays = {f"/path/{dimension}": np.arange(2), "/path/length": np.array([value, np.nan])}
    return Dump(arrays, {key: [dimension] for key in arrays}, [{**finding, **changes}], {"summary.json:last_step": 2})


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (made(), []),
        (made(value=np.nextafter(1.0, 2.0)), [("/path/length", "values")]),
        (made(value=np.nan), [("/path/length", "values")]),
        (made(code="OD203"), [("OD202", "missing"), ("OD203", "added")]),
        (made(evidence={"n": 4}), [("OD202", "evidence")]),
        (
            made(dimension="point"),
            [("/path/length", "dims"), ("/path/point", "added"), ("/path/step", "missing")],
        ),
    ],
)
def test_what_differs_is_told(new: Dump, expected: list[tuple[str, str]]) -> None:
    assert [(difference.path, difference.kind) for difference in differences(made(), new)] == expected


def test_a_tolerance_is_that_of_the_largest_number() -> None:
    assert differences(made(), made(value=1 + 1e-10), rtol=1e-9) == []
    assert differences(made(), made(value=1 + 1e-8), rtol=1e-9) != []


def test_a_name_that_was_meant_to_change_is_compared_under_the_new_one() -> None:
    entry = Intended("*", "*/path/step", "renamed", "It is a point of the path.", now="point")
    used: set[Intended] = set()
    old = renamed("input/run", made(), [entry], used)
    assert (differences(old, made(dimension="point")), used) == ([], {entry})
    assert [each.kind for each in differences(old, made(value=2.0, dimension="point"))] == ["values"]


def test_what_was_meant_to_change_is_passed_over_and_nothing_else() -> None:
    entry = Intended("input/*", "OD203", "added", "It was not seen before.")
    found = differences(made(), made(code="OD203"))
    assert [each.path for each in judged("input/run", found, [entry], set())] == ["OD202"]
    assert judged("other/run", found, [entry], set()) == found
