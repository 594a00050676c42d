"""Groups of runs (recipes) compared: difference and interval for each measure and step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import xarray as xr

from dynamics.relate import statements
from dynamics.relate.differences import (
    Difference,
    paired_difference,
    relabelled_difference,
    students_test,
    unpaired_difference,
)
from dynamics.relate.inputs import HEADLINE, as_measures, pair_labels
from dynamics.relate.matched_loss import at_loss, common_levels
from dynamics.relate.permutations import DRAWS, LEVEL, PermutationTest, false_discovery_rates
from dynamics.relate.variables import COMPARISON
from dynamics.schema import labelled

#: How differences are tested.
_PAIRED = "mean of paired differences; p is the larger of exact sign flips of pairs and Student's t test"
_UNPAIRED = "difference of means; p is the larger of permuted labels of runs (statistic Welch's t) and Welch's t test"
_DESCRIBED = "difference of means; not tested, since a group has fewer than 3 runs"
#: Groups of fewer runs are described only: of two runs a spread is hardly known, and Welch's interval too narrow.
_LEAST_RUNS = 3


def compare(
    values: xr.DataArray | xr.Dataset,
    groups: Mapping[str, Sequence[str]],
    *,
    pairs: Mapping[str, str] | None = None,
    headline: str = HEADLINE,
    loss: xr.DataArray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """Differences between groups of runs at the same steps, group by group.

    A difference is shown only if a test by relabelling and Student's (Welch's) interval agree: with few runs of unequal
    spread, relabelling alone is wrong up to three times as often as stated. Paired runs of different groups (same seed,
    same model) are subtracted first and signs are flipped; else labels are permuted. A pair's runs of one group are
    averaged. Groups of fewer than 3 runs that are not paired are described, not tested.

    Args:
        values: Measures or scores, ``(run, step, measure)``, or a dataset of variables ``(run, step)``.
        groups: Group → its runs, e.g. ``{"imax": ["imax_s1", "imax_s2"], "dmax": ["dmax_s1", "dmax_s2"]}``.
        pairs: Run → label of its pair; ``{}`` for unpaired runs. By default runs are paired by their names without the
            group's own (``s1``, ``s2``) where there are pairs enough to decide: 6 for two groups, 7 for three. Equal
            seeds are no reason to pair runs that share neither data order nor initial adapter.
        headline: The measure named before looking: the p-value of its mean over steps is adjusted for the number of
            comparisons only. Everything else is adjusted over measures (and over steps) too.
        loss: ``(run, step)``, on a common probe set: then differences are also given at equal loss, descriptively.
        draws, seed: Of random relabellings, where there are more than 10 000.

    Returns:
        Over ``comparison`` (``"imax − dmax"``), ``measure`` and ``step``: ``difference``, ``low``, ``high``,
        ``effect_size``, ``p_value``, ``p_familywise``. Over ``comparison`` and ``measure``, of each run's mean over the
        steps: ``mean_difference``, ``mean_low``, ``mean_high`` (the interval that belongs to the decision: it excludes
        0 exactly where the difference is shown), ``mean_effect_size``, ``mean_p_value``, ``mean_p_familywise``,
        ``mean_q_value``, ``holds``, ``smallest_p``, ``smallest_p_adjusted``, ``decidable``, ``n_units``, ``n_steps``,
        ``statement``. Over ``comparison``: ``method``, ``n_pairs``, ``n_first``, ``n_second``. To draw: ``value(run,
        step, measure)`` with ``group(run)``, and ``group_median(group, step, measure)``. With ``loss``:
        ``at_loss_difference``, ``_low``, ``_high`` ``(comparison, measure, loss_level)``. A step counts where every run
        of the two groups has the measure.

    Raises:
        ValueError: If there are fewer than two groups, a group has no run or one that is not there, a run is in two
            groups, or pairs do not name runs of the groups.

    >>> groups = {group: [f"{group}_s{seed}" for seed in range(4)] for group in ("imax", "dmax")}
    >>> coords = {"run": [*groups["imax"], *groups["dmax"]], "step": [10, 20]}
    >>> gini = xr.DataArray(np.arange(16.0)[::-1].reshape(8, 2), coords, ("run", "step"))
    >>> comparison = compare(xr.Dataset({"gini": gini}), groups, headline="gini")
    >>> comparison["mean_difference"].item(), comparison["n_pairs"].item(), comparison["mean_p_value"].round(3).item()
    (8.0, 0, 0.029)
    """
    given = as_measures(values, headline)
    _check(given["run"].values.tolist(), groups)
    labels = pair_labels(groups) if pairs is None else dict(pairs)
    unknown = sorted(set(labels) - {run for runs in groups.values() for run in runs})
    if unknown:
        raise ValueError(f"pairs: expected runs of the groups, got {', '.join(map(repr, unknown))}.")
    names = given["measure"].values.tolist()
    levels = np.empty(0) if loss is None else common_levels(_losses(loss, given, groups))
    contrasts = list(combinations(groups, 2))
    least = 2 if pairs is not None else _least(pairs=True, comparisons=len(contrasts))
    units = [_units(groups, *contrast, labels, least) for contrast in contrasts]
    found = [
        _compared(given, contrast, of, headline, len(contrasts), draws, seed) | _at_loss(given, of, loss, levels)
        for contrast, of in zip(contrasts, units, strict=True)
    ]
    paired_runs = {run for of in units if of.paired for run in of.runs}
    columns = {name: np.stack([part[name] for part in found]) for name in found[0]}
    columns |= _to_draw(given, groups)
    members = [run for runs in groups.values() for run in runs]
    coords = {
        "comparison": [f"{first} − {second}" for first, second in contrasts],
        "measure": names,
        "step": given["step"].values,
        "run": members,
        "group": list(groups),
        "run_group": ("run", [group for group, runs in groups.items() for _ in runs]),
        "run_pair": ("run", [labels.get(run, "") if run in paired_runs else "" for run in members]),
    }
    dataset = xr.Dataset(labelled(COMPARISON, columns), coords if loss is None else coords | {"loss_level": levels})
    place = names.index(headline)
    dataset.attrs = {
        "headline": headline,
        "level": LEVEL,
        "pairs": ("by name" if pairs is None else "as given") if paired_runs else "none",
        "runs_left_out": sorted(set(given["run"].values.tolist()) - set(members)),
        "unpaired": sorted(set(members) - paired_runs) if paired_runs else [],
        "seed": seed,
        "statements": [str(text) for text in dataset["statement"].values[:, place]]
        + [
            str(dataset["statement"].values[row, column])
            for row, column in np.argwhere(dataset["holds"].values).tolist()
            if column != place
        ],
    }
    return dataset


def _check(runs: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    if len(groups) < 2:
        raise ValueError(f"groups: expected at least two groups, got {list(groups)}.")
    members = [run for found in groups.values() for run in found]
    empty = [group for group, found in groups.items() if not len(found)]
    absent, doubled = [run for run in members if run not in runs], {run for run in members if members.count(run) > 1}
    if empty:
        raise ValueError(f"groups: expected runs in every group, got none in {', '.join(map(repr, empty))}.")
    if absent:
        raise ValueError(f"groups: {', '.join(map(repr, absent))} is not among the runs {', '.join(map(repr, runs))}.")
    if doubled:
        raise ValueError(f"groups: expected each run once, got {', '.join(map(repr, sorted(doubled)))} in two places.")


@dataclass(frozen=True)
class _Units:
    """Runs behind each unit of the two groups; paired units stand in the same order.

    Args:
        first, second: Of each group.
        paired: Whether they are paired.
        words: How they are paired, for a sentence.
    """

    first: list[list[str]]
    second: list[list[str]]
    paired: bool
    words: str

    @property
    def runs(self) -> list[str]:
        return [run for unit in [*self.first, *self.second] for run in unit]

    @property
    def smallest(self) -> int:
        return min(len(self.first), len(self.second))

    @property
    def tested(self) -> bool:
        return self.paired or self.smallest >= _LEAST_RUNS


def _units(
    groups: Mapping[str, Sequence[str]], first: str, second: str, labels: Mapping[str, str], least: int
) -> _Units:
    """Pairs where both groups have runs of at least ``least`` labels; else every run is a unit of its own."""
    sides = [{labels[run] for run in groups[group] if run in labels} for group in (first, second)]
    common = sorted(sides[0] & sides[1])
    if len(common) >= least:
        by_label = {
            group: [[run for run in groups[group] if labels.get(run) == label] for label in common]
            for group in (first, second)
        }
        words = f"{len(common)} pairs" + (" by name" if least > 2 else "")
        return _Units(by_label[first], by_label[second], True, words)
    singles = [[[run] for run in groups[group]] for group in (first, second)]
    words = f"{len(singles[0])} + {len(singles[1])} runs, unpaired"
    if common and least > 2:
        words += f" ({len(common)} pairs by name could not decide; {least} could)"
    return _Units(singles[0], singles[1], False, words)


def _least(*, pairs: bool, comparisons: int) -> int:
    """Fewest units with which ``comparisons`` times the smallest possible p reaches the level, of groups of equal size.

    A smallest p is 2/2ⁿ of n pairs, and 2/(2n over n) of n + n runs.

    >>> [_least(pairs=pairs, comparisons=count) for pairs in (True, False) for count in (1, 3)]
    [6, 7, 8, 10]
    """
    count = 1
    while comparisons * 2 / (2**count if pairs else math.comb(2 * count, count)) > LEVEL:
        count += 1
    return count if pairs else 2 * count


def _compared(
    given: xr.DataArray,
    contrast: tuple[str, str],
    units: _Units,
    headline: str,
    comparisons: int,
    draws: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Everything of one comparison, ``[measure, step]``, ``[measure]``, or one number."""
    names = given["measure"].values.tolist()
    leading = np.array([name == headline for name in names])
    first, second = (_means(given, side) for side in (units.first, units.second))
    complete = np.isfinite(np.concatenate([first, second])).all(0)
    first, second = (np.where(complete, side, np.nan) for side in (first, second))
    relabellings = {"pairs": units.paired, "draws": draws, "seed": seed}
    at_steps, steps = relabelled_difference(first, second, **relabellings)
    counted = complete.any(-1)
    means = [
        np.where(counted, np.where(complete, side, 0.0).sum(-1) / np.maximum(complete.sum(-1), 1), np.nan)
        for side in (first, second)
    ]
    overall, test = relabelled_difference(*means, level=LEVEL / comparisons, **relabellings)
    decided = _decided(overall, test, units, leading, comparisons, int(counted.sum()))
    described = np.nan if not units.tested else 1.0
    columns = {
        "difference": at_steps.difference,
        "low": at_steps.low * described,
        "high": at_steps.high * described,
        "effect_size": at_steps.effect_size,
        "p_value": np.maximum(steps.p_value, students_test(at_steps, at_steps.freedom)[0]) * described,
        "p_familywise": np.maximum(steps.p_familywise, students_test(at_steps, at_steps.freedom)[0]) * described,
        "mean_difference": overall.difference,
        "mean_error": overall.error,
        "mean_effect_size": overall.effect_size,
        **{name: column * described if column.dtype == np.float64 else column for name, column in decided.items()},
        "n_units": np.full(len(names), len(units.first) + (0 if units.paired else len(units.second)), dtype=np.int64),
        "n_steps": complete.sum(-1).astype(np.int64),
        "method": np.array(_PAIRED if units.paired else _UNPAIRED if units.tested else _DESCRIBED, dtype=str),
        "n_pairs": np.array(len(units.first) if units.paired else 0, dtype=np.int64),
        "n_first": np.array(len(units.first), dtype=np.int64),
        "n_second": np.array(len(units.second), dtype=np.int64),
    }
    columns["mean_q_value"] = false_discovery_rates(columns["mean_p_value"])
    deciding = np.minimum(1.0, comparisons * np.where(leading, columns["mean_p_value"], columns["mean_p_familywise"]))
    columns["statement"] = _statements(names, contrast, columns, deciding, leading, units, comparisons)
    return columns


def _decided(
    overall: Difference, test: PermutationTest, units: _Units, leading: np.ndarray, comparisons: int, measures: int
) -> dict[str, np.ndarray]:
    """p-values, the interval that belongs to them, and whether the difference is shown, ``[measure]``.

    Of groups of unequal spread neither relabelling nor Welch's degrees of freedom are right far out in the tail. So
    adjusted p-values of unpaired groups are at least Student's with those of the smaller group, times the measures.
    """
    level = LEVEL / comparisons
    p_alone, critical_alone = students_test(overall, overall.freedom, level)
    if units.paired:
        p_together, critical_together = p_alone, critical_alone
    else:
        together = max(measures, 1)
        fewest = np.full_like(overall.freedom, units.smallest - 1.0)
        p_together, critical_together = students_test(overall, fewest, level / together)
        p_together = np.minimum(1.0, together * p_together)
    reach = overall.error * np.where(
        leading,
        np.maximum(test.critical, critical_alone),
        np.maximum(test.critical_familywise, critical_together),
    )
    p_value, p_familywise = np.maximum(test.p_value, p_alone), np.maximum(test.p_familywise, p_together)
    smallest = np.minimum(1.0, comparisons * np.where(leading, test.smallest_p, test.smallest_familywise))
    decidable = np.asarray(smallest <= LEVEL) & units.tested
    return {
        "mean_low": np.where(decidable, overall.difference - reach, np.nan),
        "mean_high": np.where(decidable, overall.difference + reach, np.nan),
        "mean_p_value": p_value,
        "mean_p_familywise": p_familywise,
        "smallest_p": test.smallest_p,
        "smallest_p_adjusted": smallest,
        "decidable": decidable,
        "holds": decidable & np.asarray(np.where(leading, p_value, p_familywise) <= level),
    }


def _means(given: xr.DataArray, units: Sequence[Sequence[str]]) -> np.ndarray:
    """Mean over each unit's runs, ``[unit, measure, step]``."""
    rows = [given.sel(run=list(runs)).transpose("run", "measure", "step").values.mean(0) for runs in units]
    return np.stack(rows)


def _losses(loss: xr.DataArray, given: xr.DataArray, groups: Mapping[str, Sequence[str]]) -> np.ndarray:
    if set(loss.dims) != {"run", "step"}:
        raise ValueError(f"loss: expected the dimensions ('run', 'step'), got {loss.dims}.")
    members = [run for runs in groups.values() for run in runs]
    return loss.transpose("run", "step").reindex(run=members, step=given["step"]).values.astype(np.float64)


def _at_loss(
    given: xr.DataArray, units: _Units, loss: xr.DataArray | None, levels: np.ndarray
) -> dict[str, np.ndarray]:
    """Differences and intervals at equal loss, ``[measure, loss_level]``; no tests."""
    if loss is None:
        return {}
    moved = {
        run: at_loss(given.sel(run=run).values, _losses(loss, given, {"": [run]})[0], levels).T for run in units.runs
    }
    sides = [
        np.stack([np.mean([moved[run] for run in unit], axis=0) for unit in side])
        for side in (units.first, units.second)
    ]
    found = (paired_difference if units.paired else unpaired_difference)(*sides)
    return {
        "at_loss_difference": found.difference,
        "at_loss_low": found.low,
        "at_loss_high": found.high,
    }


def _to_draw(given: xr.DataArray, groups: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    rows = [given.sel(run=list(runs)).values for runs in groups.values()]
    medians = [xr.DataArray(values).median("dim_0", skipna=True).values for values in rows]
    return {"value": np.concatenate(rows), "group_median": np.stack(medians)}


def _correction(measures: int, comparisons: int) -> str:
    parts = [f"{count} {what}" for count, what in ((measures, "measures"), (comparisons, "comparisons")) if count > 1]
    return f" (adjusted for {' and '.join(parts)})" if parts else ""


def _statements(
    names: Sequence[str],
    contrast: tuple[str, str],
    columns: Mapping[str, np.ndarray],
    deciding: np.ndarray,
    leading: np.ndarray,
    units: _Units,
    comparisons: int,
) -> np.ndarray:
    least = _least(pairs=units.paired, comparisons=comparisons)
    could = f"{least} pairs" if units.paired else f"{least // 2} + {least // 2} runs"
    if int(columns["n_units"][0]) >= least:  # it is the measures beside it, or the data, that stand in the way
        could = "more pairs" if units.paired else "more runs"
    return np.array(
        [
            statements.difference_statement(
                name,
                contrast,
                difference=float(columns["mean_difference"][place]),
                error=float(columns["mean_error"][place]),
                low=float(columns["mean_low"][place]),
                high=float(columns["mean_high"][place]),
                effect_size=float(columns["mean_effect_size"][place]),
                p=float(deciding[place]),
                correction=_correction(1 if leading[place] else len(names), comparisons),
                smallest_p=float(columns["smallest_p_adjusted"][place]),
                tested=units.tested,
                units=units.words,
                count=int(columns["n_units"][place]),
                least=could,
                steps=int(columns["n_steps"][place]),
            )
            for place, name in enumerate(names)
        ],
        dtype=str,
    )
