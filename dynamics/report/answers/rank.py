"""Is the rank right?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from dynamics.report.answers.answer import Answer


def is_the_rank_right(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Is the rank right?"

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    return Answer("rank", "not_asked", "This is not answered yet.")
