"""How much rank an update used: a ``rank_pattern`` for the next training."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

#: Share of an update's energy that the suggested rank holds.
ENERGY = 0.99


def rank_pattern(update: xr.Dataset) -> dict[str, int]:
    """Suggested ranks as ``peft.LoraConfig(rank_pattern=...)`` takes them: matrix to rank.

    Matrices that ``rank_pattern`` cannot name one by one (single experts, one of several adapters) and those
    without a suggestion (zero or unreadable throughout) are left out. PEFT takes a key for every module whose name
    ends in it, so a name that another one ends in is anchored by ``^``. A different rank changes α/r: keep the
    scale by an ``alpha_pattern`` of scale·rank.

    Args:
        update: The ``/update`` group of a result.
    """
    suggested: Mapping[str, float] = dict(
        zip(update["matrix"].values.tolist(), update["suggested_rank"].values.tolist(), strict=True)
    )
    endings = {name.split(".", start)[start] for name in suggested for start in range(1, name.count(".") + 1)}
    return {
        f"^{name}" if name in endings else name: int(rank)
        for name, rank in suggested.items()
        if rank == rank and not name.endswith("]") and "@" not in name  # NaN is not itself
    }
