"""Which matrices stand out, by a rule that is said beside them."""

from __future__ import annotations

import numpy as np
import xarray as xr

#: How many matrices each rule names.
NAMED_BY_RULE = 3

RULE = (
    f"At the last step: the {NAMED_BY_RULE} matrices whose update has the largest Frobenius norm, and the "
    f"{NAMED_BY_RULE} whose spectral entropy lies furthest below the random-LoRA null of their shape (in nat)."
)


def standouts(update: xr.Dataset) -> dict[str, str]:
    """Matrices that stand out at the last step, with the reason.

    The rule is ``RULE``: it ranks, it does not test. In any run some matrix is largest.

    Args:
        update: The ``/update`` group of a result.

    Returns:
        Matrix name to reason, e.g. ``"largest update (1 of 20)"``; empty where nothing moved.
    """
    last = update.isel(step=-1).sel(kind="total")
    reasons: dict[str, list[str]] = {}
    for variable, words in (("frobenius_norm", "update size"), ("entropy_deficit", "entropy deficit")):
        values = last[variable].values
        known = np.flatnonzero(np.isfinite(values) & (last["frobenius_norm"].values > 0))
        for place, position in enumerate(known[np.argsort(-values[known], kind="stable")][:NAMED_BY_RULE], start=1):
            reasons.setdefault(str(last["matrix"].values[position]), []).append(f"{words}: {place} of {len(known)}")
    return {name: "; ".join(each) for name, each in reasons.items()}
