"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dynamics import plot, schema
from dynamics.plot.fisher_figures import BETWEEN_TASKS, FISHER_OVER_STEPS
from dynamics.plot.figures import HEATMAPS, OF_GRADIENTS, OVER_STEPS, figure_name, gradient_name, has_values
from dynamics.plot.gradient import NORM
from dynamics.plot.hover_heatmap import fits_a_page
from dynamics.plot.standouts import RULE, standouts
from dynamics.report import sentences as words
from dynamics.report.fisher_words import informative_directions
from dynamics.report.grouped import evidence_words, grouped, place, severities
from dynamics.report.markup import breakable, formula
from dynamics.report.related import related_sections
from dynamics.report.summary import summarise
from dynamics.text import visible

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
    "place": place,
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
