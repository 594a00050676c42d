"""Do the tasks share directions, or fight?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from dynamics.report.answers.answer import Answer


def do_tasks_fight(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Do the tasks share directions, or fight?"

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    return Answer("tasks", "not_asked", "This is not answered yet.")
