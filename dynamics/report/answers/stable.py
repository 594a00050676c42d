"""Is training stable, is it still moving, may it stop?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from dynamics.report.answers.answer import Answer


def may_training_stop(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Is training stable, is it still moving, may I stop?"

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    return Answer("stable", "not_asked", "This is not answered yet.")
