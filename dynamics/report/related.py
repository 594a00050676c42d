"""What the page says of associations with scores and of groups of runs: sentences first, then figures, then tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from markupsafe import Markup

from dynamics.text import finite

#: Rows of a table and sentences of a part that the page shows; all are in the result.
MOST_PAIRS, MOST_STATEMENTS = 500, 6
#: Of reports on data without any effect, how many state something somewhere: python -m tests.benchmarks.calibration.
FALSE_REPORTS = "7 % (6 runs) to 13 % (12 runs)"
#: Heading → variable, of the columns after the two names; ``"low"`` stands for the interval.
_ASSOCIATION = {
    "r": "coefficient",
    "95 % interval": "low",
    "p": "p_value",
    "p, adjusted": "p_familywise",
    "runs": "n_runs",
    "steps": "n_steps",
    "shown": "holds",
}
_OF_ASSOCIATIONS = {
    "association": "Correlation with scores, turned so that higher is better. Filled: shown.",
    "association_scatter": "The headline measure against the first task's score, as given. Parallel lines only show "
    "that both change over time; that is no evidence of an association.",
    "association_grid": "Correlation of measures with tasks; in brackets what is not shown.",
}
_COMPARISON = {
    "difference": "mean_difference",
    "95 % interval": "mean_low",
    "effect size": "mean_effect_size",
    "p": "mean_p_value",
    "p, adjusted": "mean_p_familywise",
    "units": "n_units",
    "shown": "holds",
}


def related_sections(tree: xr.DataTree, figures: Mapping[str, str]) -> dict[str, Any]:
    """Both parts for the template; ``None`` for one that the result does not have.

    Args:
        tree: A result, of one run or of several.
        figures: SVG text by name.
    """
    parts: dict[str, Any] = {"comparison": None, "association": None, "headline": "", "false_reports": FALSE_REPORTS}
    if "association" in tree.children:
        group = tree["association"].to_dataset().load()
        words = f"Associations of measures with scores: {group.attrs['method']}."
        names = {"measure": "measure", "task": "task"}
        drawn = _drawn(figures, _OF_ASSOCIATIONS)
        parts["association"] = _part("association", group, names, _ASSOCIATION, words, drawn)
    if "comparison" in tree.children:
        group = tree["comparison"].to_dataset().load()
        words = f"Differences of means over steps: {'; '.join(sorted(set(group['method'].values.tolist())))}."
        names = {"measure": "measure", "comparison": "groups"}
        drawn = _drawn(figures, {"comparison": "Every run, and the median of each group."})
        parts["comparison"] = _part("comparison", group, names, _COMPARISON, words, drawn)
    for part in (parts["association"], parts["comparison"]):
        parts["headline"] = part["headline"] if part else parts["headline"]
    return parts


def _part(
    name: str,
    group: xr.Dataset,
    names: Mapping[str, str],
    columns: Mapping[str, str],
    words: str,
    figures: Sequence[tuple[Markup, str]],
) -> dict[str, Any]:
    """One part: its sentences, figures and table.

    Args:
        name: Of the group.
        group: What was related.
        names: Dimension → heading, of the two columns of names.
        columns: Heading → variable.
        words: The table's caption.
        figures: Drawings with captions.
    """
    said = [str(text) for text in group.attrs["statements"]]
    rows = list(_rows(group, list(names), columns))
    count = int(np.prod([group.sizes[dim] for dim in names]))
    if count > len(rows):
        words += f" {len(rows)} of {count:,} (shown, of the headline measure, or largest); all are in analysis.zarr."
    return {
        "id": name,
        "headline": str(group.attrs["headline"]),
        "statements": said[:MOST_STATEMENTS],
        "more": max(0, len(said) - MOST_STATEMENTS),
        "figures": figures,
        "words": words,
        "headings": [*names.values(), *columns],
        "rows": rows,
    }


def _rows(group: xr.Dataset, dims: Sequence[str], columns: Mapping[str, str]) -> Iterator[list[Any]]:
    """A row for each pair of names; of too many those that are shown, then the headline's, then the largest."""
    variables = [*columns.values(), *(name.replace("low", "high") for name in columns.values() if name.endswith("low"))]
    tables = {name: group[name].transpose(*dims).values.ravel() for name in variables}
    labels = [group[dim].values.tolist() for dim in dims]
    places = np.arange(len(tables["holds"]))
    if len(places) > MOST_PAIRS:
        measure = np.array(labels[0])[places // len(labels[1])]
        size = np.nan_to_num(np.abs(tables[next(iter(columns.values()))]), nan=-1.0)
        first = np.lexsort((-size, measure != str(group.attrs["headline"]), ~tables["holds"].astype(bool)))
        places = np.sort(first[:MOST_PAIRS])
    for place in places.tolist():
        cells = [_cell(name, {key: table[place] for key, table in tables.items()}) for name in columns.values()]
        yield [labels[0][place // len(labels[1])], labels[1][place % len(labels[1])], *cells]


def _cell(name: str, row: Mapping[str, Any]) -> Any:
    if name == "holds":
        return "yes" if row[name] else "no"
    if name.startswith("n_"):
        return int(row[name])
    if not name.endswith("low"):
        return finite(row[name])
    ends = float(row[name]), float(row[name.replace("low", "high")])
    return f"{ends[0]:.3g} to {ends[1]:.3g}".replace("-", "−") if np.isfinite(ends).all() else "–"


def _drawn(figures: Mapping[str, str], captions: Mapping[str, str]) -> list[tuple[Markup, str]]:
    return [(Markup(figures[name]), caption) for name, caption in captions.items() if name in figures]
