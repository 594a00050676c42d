"""Which recipe is better?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from dynamics.report.answers.answer import Answer


def which_recipe(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Which recipe is better, and can these runs decide it?"

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    return Answer("recipe", "not_asked", "This is not answered yet.")
