"""Small pictures beside the answers: SVG of a few hundred bytes, coloured by the page's style sheet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import xarray as xr

from dynamics.plot.select import group, has_group
from dynamics.plot.style import shorten
from dynamics.plot.training_log import logged_number
from dynamics.schema import GLOBAL
from dynamics.text import number

_WIDTH, _HEIGHT = 220.0, 56.0
#: Room for what is written left and right of the drawing, and above and below it.
_SIDE, _EDGE = 34.0, 6.0
#: Roles, pairs of tasks, lines and their points that a picture of this size can show.
_MOST_ROLES, _MOST_PAIRS, _MOST_LINES, _MOST_POINTS = 24, 8, 4, 200


def answer_pictures(tree: xr.DataTree, summary: Mapping[str, Any]) -> dict[str, str]:
    """Draw what the answers rest on, for each question for which the result has it.

    The elements have classes and no colours: ``line``, ``dot``, ``range``, ``rule``, ``track``, ``bar``, ``best``,
    ``bad``; a second series has ``second``, one of retained tasks ``retained``.

    Args:
        tree: A result of one run, or of several.
        summary: Its summary, see ``summarise``.

    Returns:
        Identifier of a question → an ``<svg>`` element with words for readers who cannot see it.
    """
    draw = {"recipe": _scores_of_groups} if "runs" in tree.children else _OF_A_RUN
    pictures = {question: picture(tree, summary) for question, picture in draw.items()}
    return {question: picture for question, picture in pictures.items() if picture}


def _norms_by_role(tree: xr.DataTree, summary: Mapping[str, Any]) -> str:
    """Draw the range of norms of each role on a logarithmic scale; updates of zero are marked below it."""
    by_role = _by_role(summary, "frobenius_norm")
    moved = [norm for norms in by_role.values() for norm in norms if norm > 0]
    if not moved:
        return ""
    scale = _Scale(np.log(moved), _HEIGHT - 14, _EDGE)
    marks = []
    for (role, norms), x in zip(by_role.items(), _middles(len(by_role)), strict=True):
        present, zero = [norm for norm in norms if norm > 0], sum(norm == 0 for norm in norms)
        inner = ""
        words = f"{role}: "
        if present:
            low, middle, high = (scale(np.log(norm)) for norm in (min(present), np.median(present), max(present)))
            inner += _line(x, low, x, high, "range") + _dot(x, middle)
            words += f"{number(min(present))} to {number(max(present))}"
        if zero:
            inner += _dot(x, _HEIGHT - 5, "dot bad")
            words += f"{', ' if present else ''}{zero:,} exactly zero"
        marks.append(_titled(inner, words))
    ends = _ends(scale, {np.log(norm): number(norm) for norm in (min(moved), max(moved))})
    still = sum(norm == 0 for norms in by_role.values() for norm in norms)
    words = f"Frobenius norm of the updates by role, from {number(min(moved))} to {number(max(moved))}"
    return _svg([*marks, ends], f"{words}{f'; {still:,} are exactly zero' if still else ''}")


def _rank_by_role(tree: xr.DataTree, summary: Mapping[str, Any]) -> str:
    """Draw the adapter rank of each role as a track, and the median rank that holds the energy as a bar in it."""
    adapters, needed = _by_role(summary, "adapter_rank"), _by_role(summary, "suggested_rank")
    ranks = {role: max(adapters[role]) for role in adapters.keys() & needed.keys() if max(adapters[role]) > 0}
    if not ranks:
        return ""
    roles = [role for role in adapters if role in ranks]
    scale = _Scale([0, *ranks.values()], _HEIGHT - _EDGE, _EDGE)
    marks, titles = [], []
    for role, x in zip(roles, _middles(len(roles)), strict=True):
        used = float(np.median(needed[role]))
        titles.append(f"{role}: {used:g} of {ranks[role]:g}")
        bars = _line(x, scale(0.0), x, scale(ranks[role]), "track") + _line(x, scale(0.0), x, scale(used), "bar")
        marks.append(_titled(bars, titles[-1]))
    energy = f"{100 * summary['suggested_rank_energy']:.0f} %"
    ends = _ends(scale, {0.0: "0", float(max(ranks.values())): number(max(ranks.values()))})
    return _svg(
        [*marks, ends], f"Rank that holds {energy} of the energy against the adapter's rank: {'; '.join(titles)}"
    )


def _scores_over_steps(tree: xr.DataTree, summary: Mapping[str, Any]) -> str:
    """Draw the change of each task's loss since the start, or else the first score, its best ringed."""
    if has_group(tree, "loss"):
        losses = group(tree, "loss")
        change = losses["change"].transpose("task", "step")
        names = [str(name) for name in losses["task"].values][:_MOST_LINES]
        kept = dict(zip(map(str, losses["task"].values), losses["retained"].values.astype(bool), strict=True))
        series = {name: _Series(losses["step"].values, change.sel(task=name).values) for name in names}
        classes = ["line retained" if kept[name] else "line" for name in names]
        return _over_steps(series, "Change of the loss since the start", classes, rule=0.0)
    for score in sorted(summary["scores"], key=lambda score: score["best"] is None)[:1]:
        rows = [row for row in summary["checkpoints"] if score["task"] in row["scores"]]
        series = {score["task"]: _Series([row["step"] for row in rows], [row["scores"][score["task"]] for row in rows])}
        return _over_steps(series, "Score", ["line"], best=score["best"])
    return ""


def _cosines(tree: xr.DataTree, summary: Mapping[str, Any]) -> str:
    """Draw the cosine of each pair of tasks with its interval, from −1 to 1."""
    pairs = [] if summary["fisher"] is None else summary["fisher"]["pairs"]
    pairs = [pair for pair in pairs if pair["cosine"]["value"] is not None][:_MOST_PAIRS]
    if not pairs:
        return ""
    scale = _Scale([-1.0, 1.0], _SIDE, _WIDTH - _SIDE)
    marks, titles = [_line(scale(0.0), 2.0, scale(0.0), _HEIGHT - 2, "rule")], []
    for pair, y in zip(pairs, _middles(len(pairs), 4.0, _HEIGHT - 4), strict=True):
        cosine, low, high = pair["cosine"]["value"], pair["cosine"]["low"], pair["cosine"]["high"]
        interval, range_ = "", ""
        if low is not None and high is not None:
            interval = f" ({number(low)} to {number(high)})"
            range_ = _line(scale(max(low, -1.0)), y, scale(min(high, 1.0)), y, "range")
        titles.append(f"{' and '.join(pair['tasks'])} {number(cosine)}{interval}")
        marks.append(_titled(range_ + _dot(scale(cosine), y), titles[-1]))
    marks += [_text(scale(end) + side, _HEIGHT / 2 + 3, words, anchor) for end, side, words, anchor in _COSINE_ENDS]
    return _svg(marks, f"Cosine of the mean gradients: {'; '.join(titles)}")


_COSINE_ENDS = ((-1.0, -4.0, "−1", "end"), (1.0, 4.0, "1", "start"))


def _gains(tree: xr.DataTree, summary: Mapping[str, Any]) -> str:
    """Draw the gain over a fresh gradient at each step with its interval, beside 1."""
    row = ((summary["fisher"] or {}).get("concentration") or {}).get("at_k")
    if row is None or row["gain"]["value"] is None:
        return ""
    gains = group(tree, "concentration").sel(block=GLOBAL, k=row["k"])
    gain, low, high = (gains[name].values for name in ("gain", "gain_low", "gain_high"))
    drawn = np.isfinite(gain) & (gain > 0)
    steps, middle = gains["step"].values[drawn], gain[drawn]
    # An interval may reach far: it is cut off where it would squeeze the gains together.
    floor, top = min(middle.min(), 1.0) / 4, max(middle.max(), 1.0) * 4
    low, high = (np.clip(np.where(np.isfinite(end[drawn]), end[drawn], middle), floor, top) for end in (low, high))
    scale = _Scale(np.log([low.min(), high.max(), 1.0]), _HEIGHT - _EDGE, _EDGE)
    across = _Scale(steps, _SIDE + 4, _WIDTH - _SIDE - 4)
    marks = [_line(_SIDE, scale(0.0), _WIDTH - _SIDE, scale(0.0), "rule"), _text(_SIDE - 4, scale(0.0) + 3, "1", "end")]
    for step, value, bottom, end in zip(steps, middle, low, high, strict=True):
        interval = _line(across(step), scale(np.log(bottom)), across(step), scale(np.log(end)), "range")
        marks.append(interval + _dot(across(step), scale(np.log(value))))
    marks.append(_text(_WIDTH - _SIDE + 4, scale(np.log(middle[-1])) + 3, number(middle[-1], 2), "start"))
    return _svg(marks, f"Gain over a fresh gradient; {_Series(steps, middle).ends()}; as a fresh gradient: 1")


def _increments(tree: xr.DataTree, summary: Mapping[str, Any]) -> str:
    """Draw the size of the increments and the learning rate over steps, each over its own largest value."""
    rows = [row for row in summary["checkpoints"] if row["increment"] is not None]
    if len(rows) < 2:
        return ""
    series = {"increment": _Series([row["step"] for row in rows], [row["increment"] for row in rows])}
    if has_group(tree, "training"):
        log = group(tree, "training")
        if (rate := logged_number(log, "learning_rate")) is not None:
            series["learning rate"] = _Series(log["log_step"].values, rate.values)
    series = {name: one for name, one in series.items() if one.values.size}
    words = "; ".join(f"{name} {one.ends()}" for name, one in series.items())
    shares = {name: one.over_largest() for name, one in series.items()}
    marks = _lines(shares, ["line", "line second"], rule=0.0, ends={})
    return _svg(marks, f"Over steps: {words}")


def _scores_of_groups(tree: xr.DataTree, summary: Mapping[str, Any]) -> str:
    """Draw the first compared score of every run, group by group, with the mean of each group."""
    if not has_group(tree, "score_comparison"):
        return ""
    compared = tree["score_comparison"].to_dataset().isel(task=0).load()
    names = [str(name) for name in compared["group"].values][:_MOST_PAIRS]
    values, owners = compared["score"].values, compared["run_group"].values
    finite = values[np.isfinite(values)]
    if not finite.size:
        return ""
    scale = _Scale(finite, _HEIGHT - _EDGE - 10, _EDGE)
    marks, titles = [], []
    for name, x in zip(names, _middles(len(names)), strict=True):
        mean = float(compared["group_mean"].sel(group=name))
        dots = "".join(_dot(x, scale(value)) for value in values[(owners == name) & np.isfinite(values)])
        bar = _line(x - 12, scale(mean), x + 12, scale(mean), "range") if np.isfinite(mean) else ""
        titles.append(f"{name} {number(mean)}")
        marks.append(
            _titled(dots + bar, f"{name}: mean {number(mean)}") + _text(x, _HEIGHT - 2, shorten(name, 12), "middle")
        )
    ends = _ends(scale, {end: number(end) for end in (float(finite.min()), float(finite.max()))})
    return _svg([*marks, ends], f"{compared['task'].item()} of every run; means: {'; '.join(titles)}")


#: Question → what draws its picture from the result of one run.
_OF_A_RUN = {
    "trained": _norms_by_role,
    "rank": _rank_by_role,
    "checkpoint": _scores_over_steps,
    "tasks": _cosines,
    "concentration": _gains,
    "stable": _increments,
}


class _Series:
    """Finite numbers over steps, in the order of the steps."""

    def __init__(self, steps: Any, values: Any) -> None:
        steps, values = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
        order = np.argsort(steps, kind="stable")
        order = order[np.isfinite(values[order])]
        self.steps, self.values = steps[order], values[order]

    def over_largest(self) -> _Series:
        """Return every value over the largest."""
        return _Series(self.steps, self.values / (self.values.max() or 1.0))

    def thinned(self) -> list[tuple[float, float]]:
        """Return steps and values of so many points as a small picture can show."""
        spots = np.unique(np.linspace(0, self.steps.size - 1, min(self.steps.size, _MOST_POINTS)).round().astype(int))
        return list(zip(self.steps[spots].tolist(), self.values[spots].tolist(), strict=True))

    def ends(self) -> str:
        """Return the first and the last value in words."""
        first, last = (f"{number(float(self.values[end]))} at step {int(self.steps[end]):,}" for end in (0, -1))
        return first if self.steps.size == 1 else f"{first} and {last}"


class _Scale:
    """A linear map from the range of the data to pixels; a range of one value stands in the middle."""

    def __init__(self, values: Any, start: float, end: float) -> None:
        self._low, self._high = float(np.min(values)), float(np.max(values))
        self._start, self._end = start, end

    def __call__(self, value: Any) -> float:
        share = 0.5 if self._high == self._low else (float(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)


def _by_role(summary: Mapping[str, Any], column: str) -> dict[str, list[float]]:
    """Return the known numbers of each role's matrices, the roles by name."""
    by_role: dict[str, list[float]] = {}
    for row in summary["table"]:
        if row[column] is not None:
            by_role.setdefault(row["role"], []).append(float(row[column]))
    return dict(sorted(by_role.items())[:_MOST_ROLES])


def _over_steps(
    series: Mapping[str, _Series],
    title: str,
    classes: Sequence[str],
    *,
    rule: float | None = None,
    best: Mapping[str, Any] | None = None,
) -> str:
    """Draw a line for each series over steps, with the largest and the smallest value beside it."""
    series = {name: one for name, one in series.items() if one.values.size}
    if not series:
        return ""
    values = np.concatenate([one.values for one in series.values()])
    values = values if rule is None else np.append(values, rule)
    ends = {float(end): number(float(end)) for end in (values.min(), values.max())}
    titles = "; ".join(f"{name} {one.ends()}" for name, one in series.items())
    ringed = "" if best is None else f"; best at step {best['step']:,}"
    marks = _lines(series, classes, rule=rule, best=best, ends=ends)
    return _svg(marks, f"{title} over steps: {titles}{ringed}")


def _lines(
    series: Mapping[str, _Series],
    classes: Sequence[str],
    *,
    rule: float | None,
    best: Mapping[str, Any] | None = None,
    ends: Mapping[float, str],
) -> list[str]:
    """Return a line for each series that has values, all on one scale that reaches the rule."""
    reach = [one.values for one in series.values()] + ([] if rule is None else [np.array([rule])])
    down = _Scale(np.concatenate(reach), _HEIGHT - _EDGE, _EDGE)
    across = _Scale(np.concatenate([one.steps for one in series.values()]), _SIDE, _WIDTH - _SIDE)
    marks = [] if rule is None else [_line(_SIDE, down(rule), _WIDTH - _SIDE, down(rule), "rule")]
    for (name, one), kind in zip(series.items(), classes, strict=False):
        spots = [(across(step), down(value)) for step, value in one.thinned()]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        lone = _dot(*spots[0]) if len(spots) == 1 else ""
        marks.append(_titled(f'<polyline class="{kind}" points="{points}"/>{lone}', name))
    if best is not None:
        marks.append(_dot(across(best["step"]), down(best["score"]), "best", 4.0))
    return [*marks, _ends(down, ends)]


def _middles(count: int, start: float = _SIDE, end: float = _WIDTH - _SIDE) -> list[float]:
    """Return the middles of so many equal parts, by default of the width."""
    return [start + (part + 0.5) * (end - start) / count for part in range(count)]


def _ends(scale: _Scale, words: Mapping[float, str]) -> str:
    """Write numbers left of the drawing, at their height."""
    return "".join(_text(_SIDE - 4, scale(value) + 3, text, "end") for value, text in words.items())


def _titled(marks: str, words: str) -> str:
    return f"<g>{marks}<title>{escape(words)}</title></g>"


def _line(x: float, y: float, to_x: float, to_y: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def _dot(x: float, y: float, kind: str = "dot", radius: float = 2.5) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(marks: Iterable[str], words: str) -> str:
    size = f'width="{_WIDTH:g}" height="{_HEIGHT:g}" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}"'
    return f'<svg class="picture" role="img" aria-label={quoteattr(words)} {size}>{"".join(marks)}</svg>'
