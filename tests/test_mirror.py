"""Tests mirror the product: each file has a test file of its name, and each test file a file that it tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path.relative_to(ROOT)
    for package in ("dynamics", "probes")
    for path in (ROOT / package).rglob("*.py")
    if not path.name.startswith("_")
)
TESTS = sorted(
    path.relative_to(ROOT / "tests")
    for package in ("dynamics", "probes")
    for path in (ROOT / "tests" / package).rglob("test_*.py")
)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_each_file_has_a_test_file(source: Path) -> None:
    folder = ROOT / "tests" / source.parent
    names = [path.name for path in folder.glob(f"test_{source.stem}*.py")]
    assert any(name == f"test_{source.stem}.py" or name.startswith(f"test_{source.stem}_") for name in names), (
        f"Expected tests/{source.parent}/test_{source.stem}.py, or test_{source.stem}_….py."
    )


@pytest.mark.parametrize("test", TESTS, ids=str)
def test_each_test_file_is_called_after_a_file(test: Path) -> None:
    stems = {path.stem for path in SOURCES if path.parent == test.parent}
    subject = test.stem.removeprefix("test_")
    assert any(subject == stem or subject.startswith(f"{stem}_") for stem in stems), (
        f"Expected tests/{test} to be called test_FILE.py or test_FILE_….py for a FILE in {test.parent}/."
    )
