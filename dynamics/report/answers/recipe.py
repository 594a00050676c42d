"""Which recipe is better?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import xarray as xr

from dynamics.relate.comparison import least_pairs, smallest_design
from dynamics.report.answers.answer import Answer, Evidence, Verdict
from dynamics.text import counted, interval, listed, number, some, with_minus

_QUESTION = "recipe"
_SHOWN = ("better", "worse", "different")
#: Comparisons and scores that the sentence names.
_NAMED = 3
_RUNS = "Pass several runs of each recipe with its label, and their scores: A=RUN A=RUN B=RUN B=RUN --scores FILE."
_SCORES = "Pass the scores of each run: --scores FILE."


def which_recipe(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Which recipe is better, and can these runs decide it?"

    It reads ``/score_comparison``, see :func:`dynamics.compare_scores`: two groups of runs at a time, by the score
    named before looking (the mean over all scores, or the only one), then by the others. A difference counts where its
    permutation test and its interval agree at 0.05, adjusted for the number of comparisons, and of other scores.

    - ``yes``: in each comparison one group is better in the score named before looking, and the other group in none.
    - ``mixed``: each is better in something, in single scores alone, or in some comparisons alone.
    - ``no``: all runs have equal scores.
    - ``undecided``: no difference is shown, and differences outside the interval are ruled out; or so few runs cannot
      show any; or which way is better is not known.
    - ``not_asked``: one run, no labels, or no scores.

    ``sure`` is 0.95 where the score named before looking decides; others are named with it only as far as their own
    adjusted test shows them. It is 0.90 where other scores alone differ: then two tests at 0.05 could have spoken.

    Args:
        tree: A result of one run, or of several.
        summary: Its summary.
    """
    if "runs" not in tree.children:
        return Answer(_QUESTION, "not_asked", "There is one run, so recipes cannot be compared.", surer=_RUNS)
    if "score_comparison" not in tree.children:
        return _without_scores(tree)
    compared = tree["score_comparison"].to_dataset().load()
    pairs = combinations(map(str, compared["group"].values), 2)
    contrasts = [_Contrast(compared.isel(comparison=number), *pair) for number, pair in enumerate(pairs)]
    verdicts: Counter[Verdict] = Counter(contrast.verdict for contrast in contrasts)
    verdict: Verdict = "mixed" if verdicts["yes"] or verdicts["mixed"] else "undecided"
    if len(verdicts) == 1:
        (verdict,) = verdicts
    sentences = [contrast.sentence() for contrast in contrasts[:_NAMED]]
    more = [f"{counted(len(contrasts) - _NAMED, 'more comparison')} in the table"] if len(contrasts) > _NAMED else []
    evidence = tuple(number for contrast in contrasts for number in contrast.evidence())
    beside = any(contrast.shown and not contrast.is_led for contrast in contrasts if contrast.leading is not None)
    sure = None if not any(contrast.decides for contrast in contrasts) else 0.90 if beside else 0.95
    surer = next((contrast.surer() for contrast in contrasts if contrast.surer()), "")
    text = "; ".join([*sentences, *more])
    text = f"No{text[2:]}" if text.startswith("no ") else text  # else it starts with a name
    return Answer(_QUESTION, verdict, f"{text}.", evidence, sure, surer)


def _without_scores(tree: xr.DataTree) -> Answer:
    """Return that there are no scores, and in which measures groups differ."""
    if "comparison" not in tree.children:
        text = "The runs are not in groups, so recipes cannot be compared."
        return Answer(_QUESTION, "not_asked", text, surer=_RUNS)
    compared = tree["comparison"].to_dataset().load()
    holds = compared["holds"].values
    names = [
        f"{compared['measure'].values[measure]} ({compared['comparison'].values[contrast]})"
        for contrast, measure in zip(*holds.nonzero(), strict=True)
    ]
    differ = f"the groups differ in {some(names, _NAMED)}" if names else "no measure is shown to differ between groups"
    text = f"No scores were given, so which recipe is better is not known; {differ}."
    return Answer(_QUESTION, "not_asked", text, (Evidence("/comparison/mean_difference"),), None, _SCORES)


class _Contrast:
    """Two groups compared in every score."""

    def __init__(self, compared: xr.Dataset, first: str, second: str) -> None:
        self.first, self.second = first, second
        groups = compared.sizes["group"]
        self.comparisons = groups * (groups - 1) // 2
        self.of_all = int(compared.attrs["scores_in_all"])
        headline = str(compared.attrs["headline"])
        rows = [
            {"task": str(task), **{name: row[name].item() for name in row.data_vars if not row[name].dims}}
            | {"direction": int(row["direction"])}
            for task in compared["task"].values
            for row in [compared.sel(task=task)]
        ]
        rows = [row for row in rows if row["verdict"] != "not_comparable"]
        self.leading = next((row for row in rows if row["task"] == headline), None)
        self.others = [row for row in rows if row is not self.leading]

    @property
    def is_led(self) -> bool:
        """Whether the score named before looking differs."""
        return self.leading is not None and self.leading["verdict"] in _SHOWN

    @property
    def shown(self) -> list[dict[str, Any]]:
        rows = [self.leading, *self.others] if self.leading is not None else self.others
        return [row for row in rows if row["verdict"] in _SHOWN]

    @property
    def decides(self) -> bool:
        """Whether a difference could have been shown."""
        rows = self.others if self.leading is None else [self.leading, *self.others]
        return any(row["verdict"] in (*_SHOWN, "not_shown") for row in rows)

    @property
    def verdict(self) -> Verdict:
        verdicts = {row["verdict"] for row in self.shown}
        if len(verdicts & {"better", "worse"}) == 2:
            return "mixed"
        if verdicts & {"better", "worse"}:
            return "yes" if self.leading is None or self.leading["verdict"] in ("better", "worse") else "mixed"
        if verdicts:
            return "undecided"
        rows = [self.leading, *self.others] if self.leading is not None else self.others
        return "no" if rows and all(row["verdict"] == "equal" for row in rows) else "undecided"

    def sentence(self) -> str:
        named = [self.leading] if self.leading is not None else []
        named += [row for row in self.others if row["verdict"] in _SHOWN][:_NAMED]
        named = named or self.others[:1]
        if not named:
            return f"{self.first} and {self.second} have no score in common"
        rest = Counter(row["verdict"] for row in self.others if not any(row is other for other in named))
        words = [self._about(row) for row in named]
        if rest:
            counts = [f"{rest[verdict]:,} {text}" for verdict, text in _REST.items() if rest[verdict]]
            words.append(f"of {counted(rest.total(), 'other score')}, {listed(counts)}")
        return "; ".join(words)

    def _about(self, row: Mapping[str, Any]) -> str:
        """Return one score's result in words."""
        first, second, difference = self.first, self.second, row["difference"]
        of_all = row is self.leading and self.of_all > 0
        task = f"the mean over {self.of_all} scores" if of_all else row["task"]
        unit = " standard deviations" if of_all else ""
        ahead, behind = (first, second) if difference * (row["direction"] or 1) >= 0 else (second, first)
        by = f"by {_quantity(abs(difference))}{unit}"
        better = "better" if row["direction"] else "higher"
        if row["verdict"] in _SHOWN:
            ends = (row["low"], row["high"]) if difference >= 0 else (-row["high"], -row["low"])
            return f"{ahead} is {better} than {behind} in {task} {by} ({interval(*ends, _quantity)})"
        if row["verdict"] == "not_shown":
            ends = interval(row["low"], row["high"], _quantity)
            return f"no difference between {first} and {second} is shown in {task} ({first} − {second}: {ends})"
        if row["verdict"] == "equal":
            return f"{first} and {second} are equal in {task}"
        design = self._design(row)
        could = f" (smallest design that can: {design})" if design else ""
        observed = f"observed: {ahead} {better} {by}" if difference else "observed: no difference"
        return (
            f"{_units(row)} cannot decide whether {first} or {second} is better in {task}{could}; {observed}"
            if row["direction"]
            else f"{_units(row)} cannot decide whether {first} and {second} differ in {task}{could}; {observed}"
        )

    def _design(self, row: Mapping[str, Any]) -> str:
        """Return the smallest design that could decide a score; ``""`` where another number of runs does not help."""
        if row["n_pairs"]:
            pairs = least_pairs(self.comparisons)
            return f"{pairs} pairs" if pairs > row["n_pairs"] else ""
        sizes = int(row["n_first"]), int(row["n_second"])
        design = smallest_design(*sizes, self.comparisons)
        return f"{design[0]} + {design[1]} runs" if design != sizes else ""

    def evidence(self) -> list[Evidence]:
        rows = [self.leading] if self.leading is not None else []
        rows += [row for row in self.shown if row is not self.leading]
        return [
            Evidence("/score_comparison/difference", *(float(row[name]) for name in ("difference", "low", "high")))
            for row in rows or self.others[:1]
        ]

    def surer(self) -> str:
        """Return what would decide it."""
        rows = [self.leading] if self.leading is not None else self.others[:1]
        if self.verdict == "undecided" and rows and rows[0]["verdict"] == "undecided":
            design = self._design(rows[0])
            return (
                f"Train more runs: {design} can decide it, where groups do not overlap."
                if design
                else "Train more runs."
            )
        if self.shown and self.verdict == "undecided":
            return "Say which way is better: --higher TASK or --lower TASK."
        return "More runs narrow the interval." if self.verdict in ("undecided", "mixed") and self.decides else ""


#: Scores that are only counted, by their verdict.
_REST = {
    "better": "differ too",
    "worse": "differ too, the other way",
    "different": "differ",
    "not_shown": "show no difference",
    "equal": "are equal",
    "undecided": "cannot be decided",
}


def _units(row: Mapping[str, Any]) -> str:
    return f"{row['n_pairs']} pairs" if row["n_pairs"] else f"{row['n_first']} + {row['n_second']} runs"


def _quantity(value: float) -> str:
    return with_minus(number(value))
