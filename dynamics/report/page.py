"""The report: one HTML page that needs nothing but itself.

Text of files and definitions as HTML: escaped first, then marked up.

What the page says of associations with scores and of groups of runs: sentences first, then figures, then tables.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dynamics import plot, schema
from dynamics.findings import evidence_words, grouped, location, severities
from dynamics.plot.figures import (
    BETWEEN_TASKS,
    FISHER_OVER_STEPS,
    HEATMAPS,
    OF_GRADIENTS,
    OVER_STEPS,
    figure_name,
    gradient_name,
    has_values,
)
from dynamics.plot.gradient import NORM
from dynamics.plot.hover_heatmap import fits_a_page
from dynamics.plot.select import RULE, standouts
from dynamics.report import sentences as words
from dynamics.report.sentences import informative_directions
from dynamics.report.summary import summarise
from dynamics.text import finite, visible

# An index after a bracket of a norm, after an increment, a gradient, a singular value, a sum, or a letter that stands
# alone; not the underscore of a name.
_INDEX = re.compile(r"(?:(?<=[‖Δσ∇ΣμḡFKL])|(?<=\b[vf]))_(?:\{([^}]*)\}|((?<=K_)[a-z]{2}|\w))")


def breakable(name: str) -> Markup:
    """A long dotted name that may break after its dots.

    >>> breakable("a.<b>")
    Markup('a.<wbr>&lt;b&gt;')
    """
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def formula(text: str) -> Markup:
    """A definition with its indices set low.

    >>> formula("‖Δ_{t−1}‖_F of entropy_energy")
    Markup('‖Δ<sub>t−1</sub>‖<sub>F</sub> of entropy_energy')
    >>> formula("Σ_{j≤k} K_ij², v_j of null_gradient")
    Markup('Σ<sub>j≤k</sub> K<sub>ij</sub>², v<sub>j</sub> of null_gradient')
    """
    return Markup(_INDEX.sub(lambda index: f"<sub>{index[1] or index[2]}</sub>", str(escape(text))))


#: A longer table makes a page that is slow to open; the whole one is in summary.json.
MOST_ROWS = 1000
#: Variables that the page shows beside the measures.
_SIZES = ("frobenius_norm", "path_length", "increment_cosine", "suggested_rank")
_OF_THE_GRADIENT = ("norm_before_clip", "norm_after_clip", "singular_value", "frobenius_norm")
#: What the section on informative directions says and draws, by group.
_OF_THE_FISHER = {
    "fisher": (
        "eigenvalue",
        "spectral_entropy",
        "dominant_ratio",
        "dominant_ratio_low",
        "participation_ratio",
        "ln_participation_ratio",
        "ln_participation_ratio_low",
        "participation_ratio_directional",
        "effective_groups",
        "rarefied_spectral_entropy",
    ),
    "concentration": (
        "captured",
        "null_isotropic",
        "captured_split",
        "null_gradient",
        "gain",
        "gain_low",
        "gain_centred",
        "rayleigh_ratio",
        "share_outside_space",
    ),
    "tasks": (
        "cosine",
        "unresolved",
        "overlap",
        "transfer",
        "divergence",
        "divergence_largest",
        "divergence_normalised",
        "divergence_null_high",
    ),
}

_TEMPLATES = Environment(
    loader=PackageLoader("dynamics.report", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "number": words.number,
    "percent": words.percent,
    "place": location,
    "evidence": evidence_words,
    "breakable": breakable,
    "formula": formula,
}
_TEMPLATES.globals |= {"counted": words.counted}


def page(tree: xr.DataTree, *, figures: Mapping[str, str] | None = None) -> str:
    """The report of a result as one HTML page: no network, no other file, readable without scripts.

    Everything that comes from files (names, findings, paths) is escaped, control characters are written out, and the
    page's own policy allows no script but its own.

    Args:
        tree: A result of one run, or of several under ``/runs``.
        figures: SVG text by name, where ``plot.figures`` have been drawn already.

    Example: ``Path("report.html").write_text(page(dynamics.open_run("runs/imax")), encoding="utf-8")``
    """
    if figures is None:
        figures = {name: plot.to_svg(figure) for name, figure in plot.figures(tree).items()}
    several = "runs" in tree.children
    trees = dict(tree["runs"].children) if several else {"": tree}
    runs = []
    for number, (name, run) in enumerate(trees.items()):
        prefix = f"{name}/" if several else ""
        own = {key.removeprefix(prefix): svg for key, svg in figures.items() if key.startswith(prefix)}
        runs.append(_run(str(name), run, own, number))
    script = _TEMPLATES.get_template("sort.js.j2").render()
    html = _TEMPLATES.get_template("page.html.j2").render(
        runs=runs,
        several=several,
        related=related_sections(tree, figures),
        refused=grouped(json.loads(tree.attrs.get("findings", "[]"))) if several else [],
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        version=runs[0]["summary"]["toolkit_version"],
    )
    return visible(html)


def _run(name: str, tree: xr.DataTree, figures: Mapping[str, str], number: int) -> dict[str, Any]:
    """What the template says of one run."""
    update = tree["update"].to_dataset().load()
    summary = summarise(tree)
    over_steps = {figure_name(variable, kind): variable for variable, kind in OVER_STEPS}
    # Rows in model order give the name's column something better to sort by than letters.
    position = {name: index for index, name in enumerate(update["matrix"].values.tolist())}
    return {
        "id": f"run{number}",
        "name": name or summary["run"],
        "summary": summary,
        "informative_directions": informative_directions(summary),
        "answers": words.answers(summary),
        "which_matrices": words.which_matrices(summary),
        "analysed": words.what_was_analysed(summary),
        "findings": grouped(summary["findings"]),
        "severities": severities(summary["findings"]),
        "figures": {key: Markup(svg) for key, svg in figures.items()},
        "captions": {key: _definition(update, variable) for key, variable in over_steps.items()}
        | _of_gradients(tree)
        | _of_the_fisher(tree),
        "has_increments": any(len(segment["steps"]) > 1 for segment in summary["segments"])
        or has_values(update["frobenius_norm"], "increment"),
        "fits": fits_a_page(update),
        "heatmaps": [
            _heatmap(update, variable)
            for variable in HEATMAPS
            if fits_a_page(update) and has_values(update[variable], "total")
        ],
        "rule": RULE,
        "standouts": standouts(update),
        "rows": [{**row, "position": position[row["name"]]} for row in summary["table"][:MOST_ROWS]],
        "gradients": _what_of_gradients(tree),
        "definitions": _definitions(tree),
        "provenance": _provenance(tree),
    }


def _definition(update: xr.Dataset, variable: str) -> str:
    return str(update[variable].attrs.get("definition", ""))


def _what_of_gradients(tree: xr.DataTree) -> str:
    """``"spectra"``, ``"norms"`` or ``"nothing"``: the most that was measured of them."""
    if "gradient" not in tree.children:
        return "nothing"
    gradient = tree["gradient"].to_dataset()
    if has_values(gradient["effective_rank_energy"]):
        return "spectra"
    return "norms" if has_values(gradient["norm_before_clip"]) else "nothing"


def _of_gradients(tree: xr.DataTree) -> dict[str, str]:
    """Definitions for the figures of gradients; those of the norms are in the table of definitions."""
    if "gradient" not in tree.children:
        return {}
    gradient = tree["gradient"].to_dataset()
    return {gradient_name(name): _definition(gradient, name) for name in OF_GRADIENTS if name != NORM}


def _of_the_fisher(tree: xr.DataTree) -> dict[str, str]:
    """Definitions for the figures of the Fisher."""
    if not set(schema.FISHER_GROUPS) <= set(tree.children):
        return {}
    fisher, tasks = tree["fisher"].to_dataset(), tree["tasks"].to_dataset()
    return {
        **{f"fisher_{name}": _definition(fisher, name) for name in FISHER_OVER_STEPS},
        **{f"tasks_{name}": _definition(tasks, name) for name in BETWEEN_TASKS},
    }


def _heatmap(update: xr.Dataset, variable: str) -> dict[str, Any]:
    scale, panels = plot.hover_heatmap(update, variable=variable)
    return {
        "title": f"{update[variable].attrs['long_name']}, total",
        "scale": Markup(scale),
        "panels": [(label, Markup(svg)) for label, svg in panels],
    }


def _definitions(tree: xr.DataTree) -> list[dict[str, str]]:
    """The table of definitions: of an update, and of a gradient what is not measured as of an update."""
    tables: dict[str, tuple[xr.Dataset, tuple[str, ...]]] = {
        "": (tree["update"].to_dataset(), (*_SIZES, *schema.MEASURES))
    }
    if "gradient" in tree.children:
        tables["gradient/"] = (tree["gradient"].to_dataset(), _OF_THE_GRADIENT)
    for name, shown in _OF_THE_FISHER.items():
        if name in tree.children:
            tables[f"{name}/"] = (tree[name].to_dataset(), shown)
    keys = ("long_name", "units", "definition", "reference")
    return [
        {"name": f"{prefix}{name}", **{key: str(dataset[name].attrs.get(key, "")) for key in keys}}
        for prefix, (dataset, names) in tables.items()
        for name in names
        if name in dataset  # a result of an older version may lack some
    ]


def _provenance(tree: xr.DataTree) -> dict[str, Any]:
    attributes = tree.attrs
    return {
        "created": attributes["created"],
        "toolkit_version": attributes["toolkit_version"],
        "git_commit": attributes["git_commit"],
        "seed": attributes["seed"],
        "libraries": json.loads(attributes["library_versions"]),
        "configuration": json.loads(attributes["configuration"]),
        "inputs": json.loads(attributes["inputs"]),
    }


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
