"""Did updates follow informative directions, and does it matter?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from dynamics.report.answers.answer import Answer


def did_updates_concentrate(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Did updates follow informative directions more than chance, and does it matter?"

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    return Answer("concentration", "not_asked", "This is not answered yet.")
