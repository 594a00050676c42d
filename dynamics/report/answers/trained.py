"""Did it train, everywhere?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from dynamics.report.answers.answer import Answer


def did_it_train(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Did it train, everywhere?"

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    return Answer("trained", "not_asked", "This is not answered yet.")
