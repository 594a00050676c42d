"""Numbers as JSON has them: it knows neither NaN nor infinity."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> float | None:
    """A finite number as it is, else ``None``.

    >>> number(2), number(math.nan), number(math.inf)
    (2.0, None, None)
    """
    found = float(value)
    return found if math.isfinite(found) else None


def whole(value: Any) -> int | None:
    """A finite number without its fraction, else ``None``.

    >>> whole(2.0), whole(math.nan)
    (2, None)
    """
    found = number(value)
    return None if found is None else int(found)
