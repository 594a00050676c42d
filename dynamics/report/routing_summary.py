"""What the summary says of ``/routing``: how even loads are at the last step, and who was trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from dynamics.routing.dataset import at_step
from dynamics.text import counted, finite, integer, number, percent


def routing_summary(tree: xr.DataTree) -> dict[str, Any] | None:
    """Return the routing of the last step that has one.

    Args:
        tree: A result of one run.

    Returns:
        ``None`` without routing, else, with missing numbers as ``None``:

        - ``step``; ``layers``: a row each with ``layer``, ``routing`` (``"top-k"`` or ``"soft"``), ``experts``,
          ``tokens``, ``effective_experts``, ``largest_share`` and ``largest_share_chance``, ``largest_expert``,
          ``dead`` and ``dead_chance``, ``margin``, ``load_update_correlation``;
        - ``sentence``.
    """
    if "routing" not in tree.children:
        return None
    last = at_step(tree["routing"].to_dataset().load(), None)
    rows = [_row(last.isel(layer=row)) for row in range(last.sizes["layer"])]
    return {"step": int(last["step"]), "layers": rows, "sentence": _sentence(rows)}


def _row(layer: xr.Dataset) -> dict[str, Any]:
    load = layer["load"].values
    return {
        "layer": str(layer["layer"].item()),
        "routing": str(layer["routing"].item()),
        "experts": int(layer["experts"]),
        "largest_expert": int(np.nanargmax(load)) if np.isfinite(load).any() else None,
        **{name: integer(layer[name]) for name in ("tokens", "dead")},
        **{
            name: finite(layer[name])
            for name in (
                "effective_experts",
                "largest_share",
                "largest_share_chance",
                "dead_chance",
                "margin",
                "load_update_correlation",
            )
        },
    }


def _sentence(rows: list[dict[str, Any]]) -> str:
    """Return loads and who was trained in words."""
    loaded = [row for row in rows if row["largest_share"] is not None]
    if not loaded:
        return "No router was called at the last step with routing."
    shares = [row["effective_experts"] / row["experts"] for row in loaded]
    worst = max(loaded, key=lambda row: row["largest_share"] * row["experts"])
    dead = sum(row["dead"] or 0 for row in loaded)
    experts = sum(row["experts"] for row in loaded)
    text = (
        f"Tokens are spread as if over {percent(float(np.median(shares)), 0)} of the experts of a layer (median of "
        f"{counted(len(loaded), 'layer')}). The largest load is that of expert {worst['largest_expert']} of "
        f"{worst['layer']}: {percent(worst['largest_share'])} of its layer's, "
        f"{number(worst['largest_share'] * worst['experts'], 2)} times a uniform load. "
        f"{f'{dead:,} of {experts:,} experts got no token' if dead else f'All {experts:,} experts got tokens'}."
    )
    correlations = [row["load_update_correlation"] for row in loaded if row["load_update_correlation"] is not None]
    if correlations:
        middle = number(float(np.median(correlations)), 2)
        text += (
            f" Rank correlation of load and increment over the experts of a layer: {middle} (median over layers; near "
            "1, experts with more tokens moved more)."
        )
    return text
