"""How measures go with scores: a coefficient for each measure and task, with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import legend_below
from dynamics.plot.select import related, variable_of
from dynamics.plot.style import COLOURS, canvas, describe, figure_of, say_nothing_to_draw, shorten, without_mathematics
from dynamics.schema import ALL

_LONGEST = 34
#: Inches: a taller figure takes hundreds of megabytes and cannot be read.
_TALLEST = 30.0


def association(
    data: xr.DataTree | xr.Dataset, *, tasks: Sequence[str] | None = None, ax: Axes | None = None
) -> Figure:
    """Correlation of each measure with each task's score, with 95 % intervals; right of 0: better scores.

    Filled where the association is shown: the headline measure by its own p-value, all others adjusted over measures
    and tasks. Hollow marks say nothing either way.

    Args:
        data: A result with ``/association``, or that group.
        tasks: Which; by default four: the mean of all tasks, those with something shown, then the first.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no association, or no such task.

    Example: ``plot.association(dynamics.open_run("comparison"), tasks=["vqa/accuracy"])``
    """
    found = related(data, "association")
    known = [str(task) for task in variable_of(found, "coefficient")["task"].values]
    chosen = list(tasks) if tasks is not None else most_telling(found, 4)
    if unknown := [task for task in chosen if task not in known]:
        raise ValueError(f"Expected tasks of the association, got {unknown[0]!r}. There are: {', '.join(known)}.")
    here = found.sel(task=chosen)
    measures = [str(measure) for measure in here["measure"].values]
    headline = str(found.attrs.get("headline", ""))
    measures.sort(key=lambda measure: measure != headline)
    with canvas(ax, height=min(_TALLEST, 1.4 + 0.24 * len(measures) * max(1, len(chosen) / 2))) as axes:
        if np.isfinite(here["coefficient"].values).any():
            _draw(axes, here, measures, chosen)
            labels = [
                f"{shorten(measure, _LONGEST)}{' (headline)' if measure == headline else ''}" for measure in measures
            ]
            axes.set_yticks(range(len(measures)), labels)
            without_mathematics(axes.get_yticklabels())
            axes.set_ylim(len(measures) - 0.5, -0.5)
            axes.set_xlim(-1.05, 1.05)
            axes.set_xlabel("correlation with the score")
            legend_below(axes)
            without_mathematics(axes.get_legend().get_texts())  # type: ignore[union-attr]
        else:
            say_nothing_to_draw(axes, "no associations: see the findings")
        runs = int(here["n_runs"].max())
        part = f"; {len(chosen)} of {len(known)} tasks" if len(chosen) < len(known) else ""
        axes.set_title(f"association with scores, {runs} run{'s' if runs != 1 else ''}{part}")
    figure = figure_of(axes)
    if ax is None:
        describe(figure, "association of measures with scores", _words(found))
    return figure


def most_telling(association: xr.Dataset, count: int) -> list[str]:
    """Tasks to draw where there are many: the mean of all, those with something shown, then the first."""
    holds = np.asarray(association["holds"].transpose("task", "measure").values, dtype=bool)
    shown = {str(task): bool(row.any()) for task, row in zip(association["task"].values, holds, strict=True)}
    chosen = sorted(shown, key=lambda task: (task != ALL, not shown[task]))[:count]
    return [task for task in shown if task in chosen]


def _draw(axes: Axes, here: xr.Dataset, measures: Sequence[str], tasks: Sequence[str]) -> None:
    axes.axvline(0, color="#444444", linestyle="--", linewidth=1.2)
    for number, task in enumerate(tasks):
        rows = here.sel(task=task, measure=list(measures))
        places = np.arange(len(measures)) + 0.6 * (number - (len(tasks) - 1) / 2) / max(len(tasks), 1)
        colour = COLOURS[number % len(COLOURS)]
        value, low, high = (rows[name].values for name in ("coefficient", "low", "high"))
        shown = rows["holds"].values.astype(bool)
        label = "mean of all tasks" if task == ALL else shorten(task, _LONGEST)
        axes.hlines(places, low, high, color=colour)
        axes.plot(value, places, "o", color=colour, markerfacecolor="white", markersize=6, label=label)
        if shown.any():
            axes.plot(value[shown], places[shown], "o", color=colour, markersize=6)
    if here["holds"].values.any():
        axes.plot([], [], "o", color="#444444", markersize=6, label="filled: shown")


def _words(found: xr.Dataset) -> str:
    statements = [str(text) for text in found.attrs.get("statements", [])]
    return f"Points with intervals. {statements[0]}" if statements else "Points with intervals."
