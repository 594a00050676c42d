"""Which checkpoint to keep, and did it forget?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from dynamics.report.answers.answer import Answer


def which_checkpoint(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Which checkpoint to keep, and did it forget?"

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    return Answer("checkpoint", "not_asked", "This is not answered yet.")
