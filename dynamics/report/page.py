"""The report: one HTML page that needs no other file and no network.

Text from files and definitions is escaped first and marked up afterwards.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dynamics import plot, schema
from dynamics.findings import evidence_words, grouped, location, severities
from dynamics.intervention.loss_changes import costliest_layer_sentence
from dynamics.plot.answers import answer_pictures
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
from dynamics.plot.select import RULE, standouts, title_of
from dynamics.report import sentences
from dynamics.report.answers.answer import how_sure, recipe_first, verdict_words
from dynamics.report.score_summary import did_it_forget
from dynamics.report.summary import summarise
from dynamics.text import counted, finite, number, percent, sentence_case, visible

#: A longer table makes a page that opens slowly; the whole table is in summary.json.
MOST_ROWS = 1000
#: Rows of a table and sentences of a part; all are in the result.
MOST_PAIRS, MOST_STATEMENTS = 500, 6
#: Columns of scores, and rows of the table of checkpoints.
MOST_SCORES, MOST_CHECKPOINTS = 6, 100
#: Share of reports on data without any effect that claim an association, or a difference in a measure: python -m
#: tests.benchmarks.calibration.
FALSE_REPORTS = "7 % (6 runs) to 13 % (12 runs)"
#: The same of the scores of two groups without any difference, three scores and their mean.
FALSE_SCORES = "2 % to 7 % (up to 10 % where one group is five times as variable)"
#: Variables of an update that are defined beside the measures.
_SIZES = ("frobenius_norm", "path_length", "increment_cosine", "suggested_rank")
_OF_THE_GRADIENT = ("norm_before_clip", "norm_after_clip", "singular_value", "frobenius_norm")
#: Variables of the sections on informative directions and on interventions, by group.
_OF_DIRECTIONS = {
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
        "null_optimizer",
        "gain_optimizer",
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
    "routing": ("load", "effective_experts", "largest_share", "largest_share_chance", "dead", "margin", "update_norm"),
    "loss": ("change", "predicted_first", "predicted_second", "layer_share"),
    "intervention": ("effect", "captured", "interaction", "attributed", "excess", "excess_p", "share", "efficiency"),
}


@dataclass(frozen=True)
class Relation:
    """How a group that relates runs is shown: as sentences, figures and a table.

    Args:
        caption: What the table has; the method follows it.
        names: Dimension → heading, of the two columns of names.
        columns: Heading → variable; a variable that ends with ``low`` stands for the interval.
        figures: Name → caption.
    """

    caption: str
    names: Mapping[str, str]
    columns: Mapping[str, str]
    figures: Mapping[str, str]


_SCORE_COMPARISON = Relation(
    "Scores of the first group minus those of the second",
    {"task": "score", "comparison": "groups"},
    {
        "difference": "difference",
        "first": "first_mean",
        "second": "second_mean",
        "95 % interval": "low",
        "95 % interval if normal": "normal_low",
        "effect size": "effect_size",
        "p, adjusted": "p_adjusted",
        "units, first": "n_first",
        "units, second": "n_second",
        "first is": "verdict",
    },
    {
        "score_comparison": "The score of every run, and the mean of each group. “all”: mean over tasks of the "
        "standardised scores that every run has; higher is better."
    },
)
_COMPARISON = Relation(
    "Differences of means over steps",
    {"measure": "measure", "comparison": "groups"},
    {
        "difference": "mean_difference",
        "95 % interval": "mean_low",
        "effect size": "mean_effect_size",
        "p": "mean_p_value",
        "p, adjusted": "mean_p_familywise",
        "units": "n_units",
        "significant": "holds",
    },
    {"comparison": "Every run, and the median of each group."},
)
_ASSOCIATION = Relation(
    "Associations of measures with scores",
    {"measure": "measure", "task": "task"},
    {
        "r": "coefficient",
        "95 % interval": "low",
        "p": "p_value",
        "p, adjusted": "p_familywise",
        "runs": "n_runs",
        "steps": "n_steps",
        "significant": "holds",
    },
    {
        "association": "Correlation with scores, with its sign turned where lower scores are better. Filled: "
        "significant after correction.",
        "association_scatter": "The headline measure and the scores of the first task, as given. Parallel lines only "
        "show that both change over time; that is no evidence of an association.",
        "association_grid": "Correlation of measures with tasks; in brackets if it is not significant.",
    },
)

#: Groups that relate runs, in the order of the page.
RELATIONS = {"score_comparison": _SCORE_COMPARISON, "comparison": _COMPARISON, "association": _ASSOCIATION}

# An index follows the bracket of a norm, an increment, a gradient, a singular value, a sum, or a single letter; an
# underscore within a name is none.
_INDEX = re.compile(r"(?:(?<=[‖Δσ∇ΣμḡFKL])|(?<=\b[vf]))_(?:\{([^}]*)\}|((?<=K_)[a-z]{2}|\w))")


def breakable(name: str) -> Markup:
    """Return a long dotted name that may break after its dots.

    >>> breakable("a.<b>")
    Markup('a.<wbr>&lt;b&gt;')
    """
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def explained(text: str) -> Markup:
    """Return text in which the first use of each word of the glossary has its meaning.

    >>> explained("0.1 nat, <b>")
    Markup('0.1 <abbr title="unit of entropy; e to the entropy is a number of directions">nat</abbr>, &lt;b&gt;')
    """
    used = set()

    def mark(word: re.Match[str]) -> str:
        term = word[0].lower()
        if term in used:
            return word[0]
        used.add(term)
        return f'<abbr title="{escape(GLOSSARY[term])}">{word[0]}</abbr>'

    return Markup(_TERM.sub(mark, str(escape(text))))


def inline(svg: str) -> Markup:
    """Return a figure as it stands in a page: without the fonts and the indentation that the page does not need."""
    return Markup(_INDENTED.sub("\n", _FONT.sub("", svg)))


def contents(html: str) -> list[tuple[str, str]]:
    """Return identifier and short title of each section that has one.

    >>> contents('<section id="a" data-contents="Scores">')
    [('a', 'Scores')]
    """
    return _SECTION.findall(html)


def formula(text: str) -> Markup:
    """Return a definition with its indices set as subscripts.

    >>> formula("‖Δ_{t−1}‖_F of entropy_energy")
    Markup('‖Δ<sub>t−1</sub>‖<sub>F</sub> of entropy_energy')
    >>> formula("Σ_{j≤k} K_ij², v_j of null_gradient")
    Markup('Σ<sub>j≤k</sub> K<sub>ij</sub>², v<sub>j</sub> of null_gradient')
    """
    return Markup(_INDEX.sub(lambda index: f"<sub>{index[1] or index[2]}</sub>", str(escape(text))))


#: What the words of the page mean, shown by pointing at them and in the section of definitions.
GLOSSARY = {
    "energy": "squared singular values; over all directions they add up to the squared Frobenius norm",
    "nat": "unit of entropy; e to the entropy is a number of directions",
    "chance": "a random update of the same shape and rank",
    "increment": "change since the previous step in the result",
    "participation ratio": "(Σλ)²/Σλ²: in how many directions something varies, strong ones counting most",
    "deficit": "how far the spectral entropy lies below that of a random update",
    "ρ": "dominant ratio: share of the energy in the leading direction",
}
_TERM = re.compile(rf"(?<![\w&#./-])(?:{'|'.join(GLOSSARY)})(?![\w/-])", re.IGNORECASE)
_ONE_RUN = "One run cannot show which measures go with its scores: give several runs."
_MARKS = {"yes": "✓", "no": "✕", "mixed": "◐", "undecided": "?", "not_asked": "–"}
#: Question → sections that show what its answer rests on; the first that the page has is linked.
_SECTIONS = {
    "trained": ("where",),
    "rank": ("matrices",),
    "checkpoint": ("losses", "scores"),
    "tasks": ("informative",),
    "concentration": ("informative",),
    "stable": ("moved",),
}
#: Question → what the small picture beside its answer shows.
_CAPTIONS = {
    "trained": "Norm of the updates, by role",
    "rank": "Rank used (grey: not used), by role",
    "checkpoint": "Scores or losses over steps; ring: best",
    "tasks": "Cosines of pairs of tasks",
    "concentration": "Gain over steps; 1: a fresh gradient",
    "stable": "Increment (dashed: learning rate)",
    "recipe": "Score of each run, by group",
}
_SECTION = re.compile(r'<section(?: class="[^"]*")? id="([^"]+)" data-contents="([^"]+)"')
_CONTENTS = "<!-- contents -->"
_FONT = re.compile(r" font-family: [^;\"]*;")
_INDENTED = re.compile(r"\n +")

_TEMPLATES = Environment(
    loader=PackageLoader("dynamics.report", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "number": number,
    "percent": percent,
    "place": location,
    "evidence": evidence_words,
    "breakable": breakable,
    "formula": formula,
    "sentence_case": sentence_case,
    "explained": explained,
    "verdict_words": verdict_words,
    "how_sure": how_sure,
}
_TEMPLATES.globals |= {"counted": counted, "glossary": GLOSSARY, "marks": _MARKS, "captions": _CAPTIONS}


def page(
    tree: xr.DataTree, *, figures: Mapping[str, str] | None = None, summary: Mapping[str, Any] | None = None
) -> str:
    """Return the report of a result as one HTML page: no network, no other file, readable without scripts.

    Everything that comes from files (names, findings, paths) is escaped, control characters are written out, and the
    page's content policy allows no script but its own.

    Args:
        tree: A result of one run, or of several under ``/runs``.
        figures: SVG text by name, where ``plot.figures`` have been drawn already.
        summary: Of this tree, where ``summarise`` has been called already.

    Example: ``Path("report.html").write_text(page(dynamics.open_run("runs/imax")), encoding="utf-8")``
    """
    if figures is None:
        figures = {name: plot.to_svg(figure) for name, figure in plot.figures(tree).items()}
    summary = summarise(tree) if summary is None else summary
    several = "runs" in tree.children
    related = related_sections(tree, figures)
    if several:
        runs = [
            _run(run, summary["runs"][name], _figures_of(figures, f"{name}/"), f"run{number}", name)
            for number, (name, run) in enumerate(tree["runs"].children.items())
        ]
    else:
        runs = [_run(tree, summary, figures, "run0", summary["run"])]
    for run in runs:
        run["article"] = Markup(_with_contents("run.html.j2", run=run, several=several, related=related))
    script = _TEMPLATES.get_template("sort.js.j2").render()
    of_all: dict[str, Any] = {}
    if several:
        pictures = {question: Markup(picture) for question, picture in answer_pictures(tree, summary).items()}
        section = {"recipe": "related" if related["score_comparison"] else "runs"}
        of_all = {
            "answers": [
                {**answer, "section": section.get(answer["id"], "runs")} for answer in recipe_first(summary["answers"])
            ],
            "pictures": pictures,
            "compared": sentences.what_was_compared(summary),
            "shared_findings": grouped(summary["findings"]),
            "shared_severities": severities(summary["findings"]),
        }
    html = _with_contents(
        "page.html.j2",
        runs=runs,
        several=several,
        score_columns=_score_columns(runs),
        related=related,
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        version=runs[0]["summary"]["toolkit_version"],
        **of_all,
    )
    return visible(html)


def _with_contents(template: str, **values: Any) -> str:
    """Render a template; its contents are those of its sections outside of articles."""
    html = _TEMPLATES.get_template(template).render(values)
    before, mark, after = html.partition(_CONTENTS)
    if not mark:
        return html
    links = _TEMPLATES.get_template("contents.html.j2").render(sections=contents(after.partition("<article")[0]))
    return f"{before}{links}{after}"


def _figures_of(figures: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return the figures of one of several runs, by their names without the run's."""
    return {name.removeprefix(prefix): svg for name, svg in figures.items() if name.startswith(prefix)}


def _run(
    tree: xr.DataTree, summary: Mapping[str, Any], figures: Mapping[str, str], identifier: str, name: str
) -> dict[str, Any]:
    """Return what the template shows of one run."""
    update = tree["update"].to_dataset().load()
    over_steps = {figure_name(variable, kind): variable for variable, kind in OVER_STEPS}
    # The column of names sorts by the order in the model, which means more than the alphabet.
    position = {matrix: index for index, matrix in enumerate(update["matrix"].values.tolist())}
    present = {"where", "matrices", "moved"}
    present |= {"losses"} if "loss" in tree.children else set()
    present |= {"scores"} if summary["scores"] else set()
    present |= {"informative"} if summary["fisher"] is not None else set()
    return {
        "id": identifier,
        "name": name,
        "summary": summary,
        "answers": [
            {**answer, "section": _section(answer["id"], identifier, present)} for answer in summary["answers"]
        ],
        "informative_directions": sentences.informative_directions(summary),
        "does_it_matter": sentences.does_it_matter(summary),
        "sentences": sentences.answers(summary),
        "which_matrices": sentences.which_matrices(summary),
        "analysed": sentences.what_was_analysed(summary),
        "forgot": did_it_forget(summary),
        "costliest_layer": costliest_layer_sentence(tree["loss"].to_dataset()) if "loss" in tree.children else "",
        "checkpoints": _checkpoint_rows(summary["checkpoints"]),
        "score_names": [score["task"] for score in summary["scores"]][:MOST_SCORES],
        "findings": grouped(summary["findings"]),
        "severities": severities(summary["findings"]),
        "figures": {key: inline(svg) for key, svg in figures.items()},
        "pictures": {question: Markup(picture) for question, picture in answer_pictures(tree, summary).items()},
        "captions": {key: _definition(update, variable) for key, variable in over_steps.items()}
        | _gradient_definitions(tree)
        | _fisher_definitions(tree),
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
        "gradients": _measured_of_gradients(tree),
        "definitions": _definitions(tree),
        "provenance": _provenance(tree),
    }


def _section(question: str, identifier: str, present: Collection[str]) -> str:
    """Return the identifier of the section that shows what an answer rests on, ``""`` where the page has none."""
    names = [name for name in _SECTIONS.get(question, ()) if name in present]
    return f"{identifier}-{names[0]}" if names else ""


def _checkpoint_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of a table of checkpoints; of too many the best ones, and others evenly spread."""
    spacing = -(-len(rows) // MOST_CHECKPOINTS)
    return [row for place, row in enumerate(reversed(rows)) if place % spacing == 0 or row["best"]][::-1]


def _score_columns(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the scores that most runs have, for the overview."""
    count = Counter(score["task"] for run in runs for score in run["summary"]["scores"])
    return [task for task, _ in count.most_common(MOST_SCORES)]


def _definition(update: xr.Dataset, variable: str) -> str:
    return str(update[variable].attrs.get("definition", ""))


def _measured_of_gradients(tree: xr.DataTree) -> str:
    """Return the most that was measured of gradients: ``"spectra"``, ``"norms"`` or ``"nothing"``."""
    if "gradient" not in tree.children:
        return "nothing"
    gradient = tree["gradient"].to_dataset()
    if has_values(gradient["effective_rank_energy"]):
        return "spectra"
    return "norms" if has_values(gradient["norm_before_clip"]) else "nothing"


def _gradient_definitions(tree: xr.DataTree) -> dict[str, str]:
    """Return definitions for the figures of gradients; those of the norms are in the table of definitions."""
    if "gradient" not in tree.children:
        return {}
    gradient = tree["gradient"].to_dataset()
    return {gradient_name(name): _definition(gradient, name) for name in OF_GRADIENTS if name != NORM}


def _fisher_definitions(tree: xr.DataTree) -> dict[str, str]:
    """Return definitions for the figures of the Fisher."""
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
        "title": sentence_case(title_of(variable, "total")),
        "scale": Markup(scale),
        "panels": [(label, Markup(svg)) for label, svg in panels],
    }


def _definitions(tree: xr.DataTree) -> list[dict[str, str]]:
    """Return the table of definitions; a gradient's measures are those of an update and not defined again."""
    tables: dict[str, tuple[xr.Dataset, Sequence[str]]] = {
        "": (tree["update"].to_dataset(), (*_SIZES, *schema.MEASURES))
    }
    if "gradient" in tree.children:
        tables["gradient/"] = (tree["gradient"].to_dataset(), _OF_THE_GRADIENT)
    for name, variables in _OF_DIRECTIONS.items():
        if name in tree.children:
            dataset = tree[name].to_dataset()
            tables[f"{name}/"] = dataset, [variable for variable in variables if variable in dataset]
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


def related_sections(tree: xr.DataTree, figures: Mapping[str, str]) -> dict[str, Any]:
    """Return what the template shows of groups and of scores; ``None`` for a group that the result does not have.

    Args:
        tree: A result, of one run or of several.
        figures: SVG text by name.
    """
    parts = {
        name: _part(name, tree[name].to_dataset().load(), relation, figures) if name in tree.children else None
        for name, relation in RELATIONS.items()
    }
    of_measures = (parts["comparison"], parts["association"])
    headline = next((part["headline"] for part in of_measures if part), "")
    alone = "association" in tree.children and tree["association"].attrs["question"] == "one_run"
    return {
        **parts,
        "one_run": _ONE_RUN if alone else "",
        "headline": headline,
        "false_reports": FALSE_REPORTS,
        "false_scores": FALSE_SCORES,
    }


def _part(name: str, group: xr.Dataset, relation: Relation, figures: Mapping[str, str]) -> dict[str, Any]:
    """Return the sentences, figures and table of one group."""
    statements = [str(statement) for statement in group.attrs["statements"]]
    methods = [group.attrs["method"]] if "method" in group.attrs else np.unique(group["method"].values).tolist()
    caption = f"{relation.caption}: {'; '.join(methods)}."
    rows = list(_rows(group, relation))
    pairs = int(np.prod([group.sizes[dim] for dim in relation.names]))
    if pairs > len(rows):
        caption += (
            f" {len(rows):,} of {pairs:,} rows: the significant ones, those of the headline measure, then the largest. "
            "All are in analysis.zarr."
        )
    first = str(group.attrs["headline"])
    return {
        "id": name,
        "named_first": f"Named before looking: {first}; other scores are adjusted for their number." if first else "",
        "headline": first,
        "statements": statements[:MOST_STATEMENTS],
        "more": max(0, len(statements) - MOST_STATEMENTS),
        "figures": [(inline(figures[key]), text) for key, text in relation.figures.items() if key in figures],
        "caption": caption,
        "headings": [*relation.names.values(), *relation.columns],
        "rows": rows,
    }


def _rows(group: xr.Dataset, relation: Relation) -> Iterator[list[Any]]:
    """Yield a row for each pair of names; of too many the significant, then the headline's, then the largest."""
    dims, columns = list(relation.names), list(relation.columns.values())
    ends = [_high_end(name) for name in columns if name.endswith("low")]
    values = {name: group[name].transpose(*dims).values.ravel() for name in {*columns, *ends, "holds"}}
    labels = [group[dim].values.tolist() for dim in dims]
    pairs = np.arange(len(values["holds"]))
    if len(pairs) > MOST_PAIRS:
        measure = np.array(labels[0])[pairs // len(labels[1])]
        size = np.nan_to_num(np.abs(values[columns[0]]), nan=-1.0)
        order = np.lexsort((-size, measure != str(group.attrs["headline"]), ~values["holds"].astype(bool)))
        pairs = np.sort(order[:MOST_PAIRS])
    for pair in pairs.tolist():
        first, second = divmod(pair, len(labels[1]))
        row = {name: array[pair] for name, array in values.items()}
        yield [labels[0][first], labels[1][second], *(_cell(name, row) for name in columns)]


def _cell(name: str, row: Mapping[str, Any]) -> Any:
    if name == "holds":
        return "yes" if row[name] else "no"
    if name == "verdict":
        return str(row[name]).replace("not_shown", "not significantly different").replace("_", " ")
    if name.startswith("n_"):
        return int(row[name])
    if not name.endswith("low"):
        return finite(row[name])
    low, high = float(row[name]), float(row[_high_end(name)])
    return f"{number(low)} to {number(high)}" if np.isfinite((low, high)).all() else "–"


def _high_end(name: str) -> str:
    return f"{name.removesuffix('low')}high"
