"""Adapters, files of other libraries, and records of the first format give the numbers that they gave before.

The numbers were made by ``python -m tests.goldens keep``; run it again, by code that is believed, where one is meant to
change, and say in the commit which and why. All of them, of more inputs and to the last bit, are compared by
``python -m tests.goldens compare``.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.golden_differences import Dump, differences, judged, renamed
from tests.golden_inputs import DATA, MAKERS
from tests.goldens import INTENDED, KEPT, results

#: Other machines and libraries round differently.
RTOL = 1e-9


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
        assert judged(case, differences(old, new, RTOL), INTENDED, set()) == [], case
        compared.append(variant)
    assert sorted(compared) == sorted(path.stem for path in (frozen / name).glob("*.npz"))
