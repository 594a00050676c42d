"""What the parts of an update do to the loss: by arm, length, share of the norm, task and step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dynamics.intervention.findings import headline, measured_steps, value_of
from dynamics.plot.fisher_trajectory import task_label
from dynamics.plot.marks import draw_interval, legend_below
from dynamics.plot.select import chosen, group, variable_of
from dynamics.plot.style import (
    COLOURS,
    MARKERS,
    figure_of,
    panel,
    say_nothing_to_draw,
    shorten,
    step_axis,
    without_mathematics,
)
from dynamics.schema import ALL
from dynamics.text import counted, interval, number

#: Arms whose effects are compared, by position of their colour and marker.
_COMPARED = {"full": len(COLOURS) - 1, "on": 0, "off": 1}
_NAMES = {
    "full": "whole update",
    "on": "leading directions",
    "off": "the rest",
    "random": "random directions",
    "matched": "random, same norm",
    "bottom": "last directions",
    "sigma_top": "leading singular",
    "sigma_tail": "other singular",
}
#: Rows of a figure of arms; all are in the result.
_MOST_ROWS = 40
#: Points of a line, up to which each has a bar.
_FEW = 8
#: Part of the distance between two rows over which their points are spread.
_SPREAD = 0.5
#: Inches from the axes to the legend, of a figure as high as one.
_LEGEND = 0.65
_ZERO = {"color": "#444444", "linestyle": "--", "linewidth": 1.2}
_EFFECT = "Fall of the held-out loss"


def intervention(
    data: xr.DataTree | xr.Dataset,
    *,
    show: str = "arms",
    step: int | None = None,
    k: int | None = None,
    task: str = ALL,
    ax: Axes | None = None,
) -> Figure:
    """Draw what an update and its parts do to the held-out loss, with 95 % intervals over groups.

    Args:
        data: The result of one run, or its ``/intervention`` group.
        show: ``"arms"``: the effect of each arm. ``"scales"``: the effects of the whole, of the part in the leading
            directions and of the rest over their length λ. ``"norm"``: the effect attributed to that part over its
            share of the squared norm, beside the line of a part that pays for its norm. ``"tasks"``: the three effects
            on each task. ``"steps"``: the three effects of the update to each step.
        step: By default the last one with an effect. With ``"steps"`` all are drawn.
        k: Number of leading directions. By default all of them in ``"arms"`` and ``"norm"``, else the headline's.
        task: A task, or ``"all"``. With ``"tasks"`` all are drawn.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the step, k or task is not in the result, or ``show`` is none of these.

    Example: ``plot.intervention(dynamics.open_run("runs/imax"), show="scales")``
    """
    if show not in _VIEWS:
        raise ValueError(f"Expected show to be one of {', '.join(_VIEWS)}, got {show!r}.")
    effects = group(data, "intervention")
    variable_of(effects, "effect")
    rows, title = _selected(effects, show, step, k, task)
    lines = min(_MOST_ROWS, rows.sizes[show.rstrip("s")]) if show in ("arms", "tasks") else 0
    width, height = (6.6, 1.3 + 0.34 * max(lines, 4)) if lines else (5.6, 3.4)
    with panel(ax, title, _description(rows, show), width=width, height=height) as axes:
        if np.isfinite(rows.get("attributed" if show == "norm" else "effect", np.nan)).any():
            _VIEWS[show](axes, rows)
            legend_below(axes, distance=_LEGEND / height)
        else:
            say_nothing_to_draw(axes)
    return figure_of(axes)


def _selected(effects: xr.Dataset, show: str, step: int | None, k: int | None, task: str) -> tuple[xr.Dataset, str]:
    """Return what one view draws, and its title."""
    names: dict[str, str | int] = {} if show == "tasks" else {"task": task}
    at_step = chosen(effects, "effect", step=step, **names, **({} if k is None else {"k": k}))
    step = int(at_step["step"])
    if show == "steps":
        steps = measured_steps(effects) or effects["step"].values[:1].tolist()
        at = [effects.sel(step=number, k=k) if k else headline(effects, number) for number in steps]
        rows = xr.concat(
            [row.sel(task=task).reset_coords(drop=True) for row in at], xr.DataArray(steps, dims="step", name="step")
        )
        title = "effects of each update and its parts"
    elif show in ("arms", "norm"):
        rows = at_step if k is None else at_step.expand_dims("k")
        title = "effects of an update and its parts" if show == "arms" else "effect over share of the norm"
    else:
        rows = at_step if k is not None else headline(effects, step).sel(names)
        title = "effects over length" if show == "scales" else "effects by task"
    at_k = f", {counted(int(rows['k']), 'direction')}" if "k" in rows.coords and not rows["k"].ndim else ""
    of_task = "" if task == ALL or show == "tasks" else f", {shorten(task, 24)}"
    return rows, f"{title}{of_task}{at_k}{'' if show == 'steps' else f', step {step:,}'}"


def _draw_arms(axes: Axes, rows: xr.Dataset) -> None:
    """Draw a row for each arm; the points of several k beside each other in it."""
    arms = [str(arm) for arm in rows["arm"].values][:_MOST_ROWS]
    ks = rows["k"].values.tolist()
    depends = {arm: not (arm == "full" or ":" in arm) for arm in arms}
    for position, k in enumerate(ks):
        at = rows.sel(k=k, scale=1.0)
        mine = [arm for arm in arms if depends[arm]] if len(ks) > 1 else arms
        label = f"k = {k}" if len(ks) > 1 else f"k = {k}, 95 % interval"
        _points(axes, at, mine, [arms.index(arm) for arm in mine], (position, len(ks)), label, position)
    if len(ks) > 1:
        others = [arm for arm in arms if not depends[arm]]
        at = rows.isel(k=0).sel(scale=1.0)
        _points(axes, at, others, [arms.index(arm) for arm in others], (0, 1), "any k", _COMPARED["full"])
    labels = [f"{_NAMES[arm]} ({arm})" if arm in _NAMES else shorten(arm, 30) for arm in arms]
    _name_rows(axes, labels)


def _draw_tasks(axes: Axes, rows: xr.Dataset) -> None:
    """Draw a row for each task, the effects of the whole and its parts beside each other in it."""
    tasks = [str(task) for task in rows["task"].values][:_MOST_ROWS]
    arms = _compared(rows)
    for position, arm in enumerate(arms):
        at = rows.sel(arm=arm, scale=1.0)
        _points(axes, at, tasks, range(len(tasks)), (position, len(arms)), _NAMES[arm], _COMPARED[arm], dim="task")
    _name_rows(axes, [shorten(task_label(task).strip(), 30) for task in tasks])


def _points(
    axes: Axes,
    at: xr.Dataset,
    names: Sequence[str],
    rows: Sequence[int],
    beside: tuple[int, int],
    label: str,
    style: int,
    *,
    dim: str = "arm",
) -> None:
    """Draw one effect with its interval in each row."""
    position, count = beside
    y = np.asarray(rows) + _SPREAD * (position - (count - 1) / 2) / max(count, 1)
    value, low, high = (at[f"effect{end}"].sel({dim: list(names)}).values for end in ("", "_low", "_high"))
    colour = COLOURS[style % len(COLOURS)]
    axes.hlines(y, low, high, color=colour)
    axes.plot(value, y, _marker(style), color=colour, markersize=5, label=label)


def _marker(style: int) -> str:
    return "o" if style == _COMPARED["full"] else MARKERS[style % len(MARKERS)]


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Write names beside their rows, the first on top, and the effect below."""
    axes.axvline(0, **_ZERO)
    axes.set_yticks(range(len(labels)), labels)
    without_mathematics(axes.get_yticklabels())
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel(f"{_EFFECT} (nat)")


def _draw_scales(axes: Axes, rows: xr.Dataset) -> None:
    """Draw the effect of each length; nothing added changes nothing."""
    _lines(axes, rows, "scale", start=[0.0])
    axes.set_xlim(left=0)
    axes.set_xlabel("Length λ of the update or part")


def _draw_steps(axes: Axes, rows: xr.Dataset) -> None:
    _lines(axes, rows.sel(scale=1.0), "step", start=[])
    steps = rows["step"].values.tolist()
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 0.3, steps[0] + 0.3)
    step_axis(axes, steps)


def _lines(axes: Axes, rows: xr.Dataset, dim: str, start: list[float]) -> None:
    """Draw the three effects over a dimension: few points with bars beside each other, many with bands."""
    axes.axhline(0, **_ZERO)
    x, arms = rows[dim].values.astype(np.float64), _compared(rows)
    apart = 0.012 * (float(x[-1] - x[0]) or 1.0)
    for position, arm in enumerate(arms):
        style = _COMPARED[arm]
        value, low, high = (rows[f"effect{end}"].sel(arm=arm).values for end in ("", "_low", "_high"))
        if len(x) > _FEW:
            draw_interval(axes, x, (value, low, high), style, _NAMES[arm], "95 % interval")
            continue
        at = x + apart * (position - (len(arms) - 1) / 2)
        colour = COLOURS[style]
        axes.vlines(at, low, high, color=colour, alpha=0.5, linewidth=3, label="95 % interval")
        axes.plot(start + at.tolist(), start + value.tolist(), marker=_marker(style), color=colour, label=_NAMES[arm])
    axes.set_ylabel(f"{_EFFECT} (nat)")


def _draw_norm(axes: Axes, rows: xr.Dataset) -> None:
    """Draw the effect attributed to the part at each k, and what would pay for the share of its norm."""
    share = rows["captured"].values
    whole = float(rows["effect"].sel(arm="full", scale=1.0).values.ravel()[0])
    value, low, high = (rows[f"attributed{end}"].values for end in ("", "_low", "_high"))
    reach = min(1.02, 1.3 * float(np.nanmax(share)))
    axes.axhline(0, **_ZERO)
    axes.axline((0, 0), slope=whole, color="#444444", linewidth=1.2, label="pays for its norm")
    axes.vlines(share, low, high, color=COLOURS[0])
    axes.plot(share, value, "o", color=COLOURS[0], markersize=7, label="leading directions, 95 % interval")
    alone = rows["effect"].sel(arm="on", scale=1.0).values
    axes.plot(share, alone, "s", color=COLOURS[0], markerfacecolor="white", markersize=4, label="the same, alone")
    for at, top, k in zip(share, high, rows["k"].values.tolist(), strict=True):
        axes.annotate(f"k = {k}", (at, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xlim(0, reach)
    axes.margins(y=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda part, _: f"{100 * part:g} %"))
    axes.set_xlabel("Share of the update's squared norm")
    axes.set_ylabel("Attributed fall of the loss (nat)")


def _compared(rows: xr.Dataset) -> list[str]:
    return [arm for arm in _COMPARED if arm in rows["arm"]]


def _description(rows: xr.Dataset, show: str) -> str:
    at = rows.isel({dim: -1 for dim in ("k", "step") if dim in rows.dims})
    at = at.sel(task=ALL) if "task" in at.dims else at
    sentences = [
        f"{_NAMES[arm]} {number(effect.value)} ({interval(effect.low, effect.high, _signed)})"
        for arm in _compared(rows)
        if np.isfinite((effect := value_of(at, "effect", arm=arm, scale=1.0)).value)
    ]
    kind = "Points with intervals" if show in ("arms", "tasks", "norm") else "Lines with intervals"
    return f"{kind}. Fall of the loss: {'; '.join(sentences) or 'no value'}."


def _signed(value: float) -> str:
    return number(value)


_VIEWS: Mapping[str, Callable[[Axes, xr.Dataset], None]] = {
    "arms": _draw_arms,
    "scales": _draw_scales,
    "norm": _draw_norm,
    "tasks": _draw_tasks,
    "steps": _draw_steps,
}
