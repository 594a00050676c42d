"""Settings for every test."""

from __future__ import annotations

import os
import random

# Tests run side by side: threads of their own would only wait for each other. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("quick", max_examples=25, deadline=None)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--seed``: what every test's random numbers start from. Tests should hold at any; CI takes the default."""
    parser.addoption("--seed", type=int, default=0, help="what each test's random numbers start from")


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers for each test, whichever tests ran before it in the same process."""
    seed = item.config.getoption("--seed")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for libraries that draw from it
    torch.manual_seed(seed)
