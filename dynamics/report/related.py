"""What the page says of associations with scores and of groups of runs: sentences first, then figures, then tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import xarray as xr
from markupsafe import Markup

from dynamics.report.plain import number

_ASSOCIATION = ("measure", "task", "r", "95 % interval", "p", "p, adjusted", "runs", "steps", "shown")
_OF_ASSOCIATIONS = {
    "association": "Correlation with each task's score, turned so that higher is better. Filled: shown.",
    "association_scatter": "The headline measure against the first task's score, as given. Lines that run alike are "
    "time, not association.",
    "association_grid": "All measures and tasks; in brackets what is not shown.",
}
_COMPARISON = ("measure", "groups", "difference", "95 % interval", "effect size", "p", "p, adjusted", "units", "shown")


def related_sections(tree: xr.DataTree, figures: Mapping[str, str]) -> dict[str, Any]:
    """Both parts for the template; ``None`` for one that the result does not have.

    Args:
        tree: A result, of one run or of several.
        figures: SVG text by name.
    """
    found = {"comparison": _comparison(tree, figures), "association": _association(tree, figures), "headline": ""}
    for name in ("association", "comparison"):
        if name in tree.children:
            found["headline"] = str(tree[name].attrs["headline"])
    return found


def _association(tree: xr.DataTree, figures: Mapping[str, str]) -> dict[str, Any] | None:
    if "association" not in tree.children:
        return None
    group = tree["association"].to_dataset().load()
    rows = []
    for measure in group["measure"].values.tolist():
        for task in group["task"].values.tolist():
            here = group.sel(measure=measure, task=task)
            rows.append(
                [
                    str(measure),
                    str(task),
                    number(here["coefficient"]),
                    _interval(here["low"], here["high"]),
                    number(here["p_value"]),
                    number(here["p_familywise"]),
                    int(here["n_runs"]),
                    int(here["n_steps"]),
                    "yes" if bool(here["holds"]) else "no",
                ]
            )
    return {
        "id": "association",
        "statements": [str(text) for text in group.attrs["statements"]],
        "figures": _drawn(figures, _OF_ASSOCIATIONS),
        "words": f"Associations of measures with scores: {group.attrs['method']}.",
        "headings": _ASSOCIATION,
        "rows": rows,
    }


def _comparison(tree: xr.DataTree, figures: Mapping[str, str]) -> dict[str, Any] | None:
    if "comparison" not in tree.children:
        return None
    group = tree["comparison"].to_dataset().load()
    rows = []
    for contrast in group["comparison"].values.tolist():
        for measure in group["measure"].values.tolist():
            here = group.sel(comparison=contrast, measure=measure)
            rows.append(
                [
                    str(measure),
                    str(contrast),
                    number(here["mean_difference"]),
                    _interval(here["mean_low"], here["mean_high"]),
                    number(here["mean_effect_size"]),
                    number(here["mean_p_value"]),
                    number(here["mean_p_familywise"]),
                    int(here["n_units"]),
                    "yes" if bool(here["holds"]) else "no",
                ]
            )
    methods = sorted({str(method) for method in group["method"].values})
    return {
        "id": "comparison",
        "statements": [str(text) for text in group.attrs["statements"]],
        "figures": _drawn(figures, {"comparison": "Every run, and the median of each group."}),
        "words": f"Differences of means over steps: {'; '.join(methods)}.",
        "headings": _COMPARISON,
        "rows": rows,
    }


def _drawn(figures: Mapping[str, str], captions: Mapping[str, str]) -> list[tuple[Markup, str]]:
    return [(Markup(figures[name]), caption) for name, caption in captions.items() if name in figures]


def _interval(low: xr.DataArray, high: xr.DataArray) -> str:
    ends = [float(low), float(high)]
    return f"{ends[0]:.3g} to {ends[1]:.3g}".replace("-", "−") if all(map(math.isfinite, ends)) else "–"
