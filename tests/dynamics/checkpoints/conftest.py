"""What the tests of the reader share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dynamics.findings import Finding
from tests import runs

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def write_adapter() -> Callable[..., Path]:
    """Writes one adapter folder; see ``tests.runs``."""
    return runs.write_adapter


@pytest.fixture
def shared_data() -> Path:
    """Real adapters made by others, beside the repository; absent on most machines."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real adapters are not beside the repository (looked for {folder.name}/)")
    return folder


@pytest.fixture
def codes() -> Callable[[Iterable[Finding]], list[str]]:
    """The codes of findings, those aside that every run has."""
    return lambda findings: [finding.code for finding in findings if finding.code != "OD117"]
