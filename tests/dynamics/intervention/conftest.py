"""Fixtures of interventions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The same estimators by another hand, slow and obvious; absent on most machines."""
    file = REPOSITORY.parent / "shared" / "reference" / "counterfactual_reference.py"
    if not file.is_file():
        pytest.skip(f"the reference is not beside the repository (looked for {file.parent.name}/{file.name})")
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
