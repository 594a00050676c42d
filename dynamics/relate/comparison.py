"""Groups of runs (recipes) compared: difference and interval for each measure and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import xarray as xr

from dynamics.described import labelled
from dynamics.relate import statements
from dynamics.relate.differences import paired_difference, unpaired_difference
from dynamics.relate.families import false_discovery_rates
from dynamics.relate.inputs import HEADLINE, as_measures
from dynamics.relate.matched_loss import at_loss, common_levels
from dynamics.relate.permutations import DRAWS, permutation_test
from dynamics.relate.power import LEVEL, units_needed
from dynamics.relate.run_names import pair_labels
from dynamics.relate.variables import COMPARISON

#: How differences are tested.
_PAIRED = "mean of paired differences; exact sign flips of pairs, statistic t"
_UNPAIRED = "difference of means; labels of runs permuted, statistic Welch's t"


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

    Where runs of different groups belong together (same seed, same model), their difference is taken first and signs
    are flipped; else labels are permuted. A pair's runs of one group are averaged.

    Args:
        values: Measures or scores, ``(run, step, measure)``, or a dataset of variables ``(run, step)``.
        groups: Group → its runs, e.g. ``{"imax": ["imax_s1", "imax_s2"], "dmax": ["dmax_s1", "dmax_s2"]}``.
        pairs: Run → label of its pair; by default from names without the group's own (``s1``, ``s2``); ``{}`` for
            unpaired runs.
        headline: The measure named before looking: the p-value of its mean over steps stands as it is. Everything else
            is adjusted over measures (and over steps).
        loss: ``(run, step)``, on a common probe set: then differences are also given at equal loss, descriptively.
        draws, seed: Of random relabellings, where there are more than 10 000.

    Returns:
        Over ``comparison`` (``"imax − dmax"``), ``measure`` and ``step``: ``difference``, ``low``, ``high``,
        ``effect_size``, ``p_value``, ``p_familywise``. Over ``comparison`` and ``measure``, of each run's mean over the
        steps: ``mean_difference``, ``mean_low``, ``mean_high``, ``mean_effect_size``, ``mean_p_value``,
        ``mean_p_familywise``, ``mean_q_value``, ``holds``, ``smallest_p``, ``decidable``, ``n_units``, ``n_steps``,
        ``units_needed``, ``statement``. Over ``comparison``: ``method``, ``n_pairs``, ``n_first``, ``n_second``. To
        draw: ``value(run, step, measure)`` with ``group(run)``, and ``group_median(group, step, measure)``. With
        ``loss``: ``at_loss_difference``, ``_low``, ``_high`` ``(comparison, measure, loss_level)``. A step counts where
        every run of the two groups has the measure.

    Raises:
        ValueError: If there are fewer than two groups, a group has no run or one that is not there, a run is in two
            groups, or pairs do not name runs of the groups.

    >>> coords = {"run": ["imax_s1", "imax_s2", "dmax_s1", "dmax_s2"], "step": [10, 20]}
    >>> gini = xr.DataArray([[0.5, 0.6], [0.6, 0.7], [0.4, 0.5], [0.4, 0.6]], coords, ("run", "step"))
    >>> groups = {"imax": ["imax_s1", "imax_s2"], "dmax": ["dmax_s1", "dmax_s2"]}
    >>> found = compare(xr.Dataset({"gini": gini}), groups, headline="gini")
    >>> found["mean_difference"].round(3).item(), found["n_pairs"].item()
    (0.125, 2)
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
    found = [
        _compared(given, contrast, _units(groups, *contrast, labels), headline, len(contrasts), draws, seed)
        | _at_loss(given, _units(groups, *contrast, labels), loss, levels)
        for contrast in contrasts
    ]
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
        "run_pair": ("run", [labels.get(run, "") for run in members]),
    }
    dataset = xr.Dataset(labelled(COMPARISON, columns), coords if loss is None else coords | {"loss_level": levels})
    place = names.index(headline)
    dataset.attrs = {
        "headline": headline,
        "level": LEVEL,
        "pairs": "by name" if pairs is None and labels else "as given" if labels else "none",
        "runs_left_out": sorted(set(given["run"].values.tolist()) - set(members)),
        "unpaired": sorted(run for run in members if labels and run not in labels),
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
    """Runs behind each unit of the two groups; paired units stand in the same order."""

    first: list[list[str]]
    second: list[list[str]]
    paired: bool

    @property
    def runs(self) -> list[str]:
        return [run for unit in [*self.first, *self.second] for run in unit]


def _units(groups: Mapping[str, Sequence[str]], first: str, second: str, labels: Mapping[str, str]) -> _Units:
    """Pairs where both groups have runs of at least two labels; else every run is a unit of its own."""
    sides = [{labels[run] for run in groups[group] if run in labels} for group in (first, second)]
    common = sorted(sides[0] & sides[1])
    if len(common) < 2:
        return _Units([[run] for run in groups[first]], [[run] for run in groups[second]], False)
    by_label = {
        group: [[run for run in groups[group] if labels.get(run) == label] for label in common]
        for group in (first, second)
    }
    return _Units(by_label[first], by_label[second], True)


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
    first, second = (_means(given, side) for side in (units.first, units.second))
    complete = np.isfinite(np.concatenate([first, second])).all(0)
    first, second = (np.where(complete, side, np.nan) for side in (first, second))
    difference = paired_difference if units.paired else unpaired_difference
    at_steps = difference(first, second, draws=draws, seed=seed)
    steps = permutation_test(np.where(complete, at_steps.statistics, np.nan))
    known = complete.any(-1)
    means = [
        np.where(known, np.where(complete, side, 0.0).sum(-1) / np.maximum(complete.sum(-1), 1), np.nan)
        for side in (first, second)
    ]
    overall = difference(*means, draws=draws, seed=seed)
    test = permutation_test(np.where(known, overall.statistics, np.nan))
    count = len(units.first) if units.paired else len(units.first) + len(units.second)
    least = _least(units)
    needed = units_needed(overall.difference, overall.error, np.full(len(names), count), least)
    decidable = np.asarray(test.smallest_p <= LEVEL)
    leading = np.array([name == headline for name in names])
    deciding = np.minimum(1.0, comparisons * np.where(leading, test.p_value, test.p_familywise))
    columns = {
        "difference": at_steps.difference,
        "low": at_steps.low,
        "high": at_steps.high,
        "effect_size": at_steps.effect_size,
        "p_value": steps.p_value,
        "p_familywise": steps.p_familywise,
        "mean_difference": overall.difference,
        "mean_low": overall.low,
        "mean_high": overall.high,
        "mean_effect_size": overall.effect_size,
        "mean_p_value": test.p_value,
        "mean_p_familywise": test.p_familywise,
        "mean_q_value": false_discovery_rates(test.p_value),
        "smallest_p": test.smallest_p,
        "decidable": decidable,
        "holds": np.asarray(deciding <= LEVEL) & decidable,
        "n_units": np.full(len(names), count, dtype=np.int64),
        "n_steps": complete.sum(-1).astype(np.int64),
        "units_needed": needed,
        "method": np.array(_PAIRED if units.paired else _UNPAIRED, dtype=str),
        "n_pairs": np.array(len(units.first) if units.paired else 0, dtype=np.int64),
        "n_first": np.array(len(units.first), dtype=np.int64),
        "n_second": np.array(len(units.second), dtype=np.int64),
    }
    corrections = [_correction(1 if own else len(names), comparisons) for own in leading.tolist()]
    columns["statement"] = _statements(names, contrast, columns, deciding, corrections, units, least)
    return columns


def _means(given: xr.DataArray, units: Sequence[Sequence[str]]) -> np.ndarray:
    """Mean over each unit's runs, ``[unit, measure, step]``."""
    rows = [given.sel(run=list(runs)).transpose("run", "measure", "step").values.mean(0) for runs in units]
    return np.stack(rows)


def _least(units: _Units) -> int:
    """Fewest units with which 0.05 can be reached: six pairs (2/2⁶); of two groups 4 + 4 (2/70, in all)."""
    return 6 if units.paired else 8


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
    corrections: Sequence[str],
    units: _Units,
    least: int,
) -> np.ndarray:
    return np.array(
        [
            statements.difference_statement(
                name,
                contrast,
                difference=float(columns["mean_difference"][place]),
                low=float(columns["mean_low"][place]),
                high=float(columns["mean_high"][place]),
                effect_size=float(columns["mean_effect_size"][place]),
                p=float(deciding[place]),
                correction=corrections[place],
                smallest_p=float(columns["smallest_p"][place]),
                units=int(columns["n_units"][place]),
                unit="pairs" if units.paired else "runs",
                steps=int(columns["n_steps"][place]),
                least=least,
                needed=float(columns["units_needed"][place]),
            )
            for place, name in enumerate(names)
        ],
        dtype=str,
    )
