"""Groups of runs (recipes), two at a time: difference and interval for each measure and step."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import xarray as xr

from dynamics.relate.association import HEADLINE, as_measures
from dynamics.relate.differences import (
    Difference,
    relabelled_difference,
    students_test,
)
from dynamics.relate.permutations import DRAWS, LEVEL, PermutationTest, false_discovery_rates
from dynamics.relate.statements import ComparisonContext, difference_statement
from dynamics.schema import COMPARISON, label_arrays

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
    draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """Compare groups of runs at the same steps, two groups at a time.

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
        draws: Number of random relabellings, where there are more than 10 000 in all.
        seed: Of the random relabellings.

    Returns:
        Over ``comparison`` (``"imax − dmax"``), ``measure`` and ``step``: ``difference``, ``low``, ``high``,
        ``effect_size``, ``p_value``, ``p_familywise``. Over ``comparison`` and ``measure``, of each run's mean over the
        steps: ``mean_difference``, ``mean_low``, ``mean_high`` (the interval that belongs to the decision: it excludes
        0 exactly where the difference is shown), ``mean_effect_size``, ``mean_p_value``, ``mean_p_familywise``,
        ``mean_q_value``, ``holds``, ``smallest_p``, ``smallest_p_adjusted``, ``decidable``, ``n_units``, ``n_steps``,
        ``statement``. Over ``comparison``: ``method``, ``n_pairs``, ``n_first``, ``n_second``. To draw: ``value(run,
        step, measure)`` with ``run_group(run)``, and ``group_median(group, step, measure)``. A step counts where every
        run of the two groups has the measure.

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
    measures = as_measures(values, headline)
    check_groups(measures["run"].values.tolist(), groups)
    labels = pair_labels(groups) if pairs is None else dict(pairs)
    members = [run for runs in groups.values() for run in runs]
    unknown = sorted(set(labels) - set(members))
    if unknown:
        raise ValueError(f"pairs: expected runs of the groups, got {', '.join(map(repr, unknown))}.")
    contrasts = list(combinations(groups, 2))
    least = 2 if pairs is not None else least_pairs(len(contrasts))
    units = [units_of(groups, *contrast, labels, least) for contrast in contrasts]
    parts = [
        _compared(measures, contrast, side, headline, len(contrasts), draws, seed)
        for contrast, side in zip(contrasts, units, strict=True)
    ]
    columns = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    columns |= _to_draw(measures, groups)
    paired_runs = {run for side in units if side.paired for run in side.runs}
    coords = {
        "comparison": [f"{first} − {second}" for first, second in contrasts],
        "measure": measures["measure"].values.tolist(),
        "step": measures["step"].values,
        "run": members,
        "group": list(groups),
        "run_group": ("run", [group for group, runs in groups.items() for _ in runs]),
        "run_pair": ("run", [labels.get(run, "") if run in paired_runs else "" for run in members]),
    }
    dataset = xr.Dataset(label_arrays(COMPARISON, columns), coords)
    leading = coords["measure"].index(headline)
    others = np.argwhere(columns["holds"] & (np.arange(len(coords["measure"])) != leading))
    dataset.attrs = {
        "headline": headline,
        "level": LEVEL,
        "pairs": ("by name" if pairs is None else "as given") if paired_runs else "none",
        "runs_left_out": sorted(set(measures["run"].values.tolist()) - set(members)),
        "unpaired": sorted(set(members) - paired_runs) if paired_runs else [],
        "seed": seed,
        "statements": [*columns["statement"][:, leading].tolist(), *columns["statement"][tuple(others.T)].tolist()],
    }
    return dataset


def check_groups(runs: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse groups that cannot be compared.

    Raises:
        ValueError: If there are fewer than two, one is empty or has a run that is not there, or a run is in two.
    """
    if len(groups) < 2:
        raise ValueError(f"groups: expected at least two groups, got {list(groups)}.")
    members = [run for names in groups.values() for run in names]
    empty = [group for group, names in groups.items() if not len(names)]
    absent, doubled = [run for run in members if run not in runs], {run for run in members if members.count(run) > 1}
    if empty:
        raise ValueError(f"groups: expected runs in every group, got none in {', '.join(map(repr, empty))}.")
    if absent:
        raise ValueError(f"groups: {', '.join(map(repr, absent))} is not among the runs {', '.join(map(repr, runs))}.")
    if doubled:
        raise ValueError(f"groups: expected each run once, got {', '.join(map(repr, sorted(doubled)))} in two places.")


@dataclass(frozen=True)
class Units:
    """Runs behind each unit of the two groups; paired units stand in the same order.

    Args:
        first, second: Of each group.
        paired: Whether they are paired.
        pairing: How they are paired, or why not, for a sentence.
    """

    first: list[list[str]]
    second: list[list[str]]
    paired: bool
    pairing: str

    def __str__(self) -> str:
        return f"{len(self.first)} pairs" if self.paired else f"{len(self.first)} + {len(self.second)} runs"

    def __len__(self) -> int:
        return len(self.first) + (0 if self.paired else len(self.second))

    @property
    def runs(self) -> list[str]:
        return [run for unit in [*self.first, *self.second] for run in unit]

    @property
    def smallest(self) -> int:
        return min(len(self.first), len(self.second))

    @property
    def tested(self) -> bool:
        return self.paired or self.smallest >= _LEAST_RUNS

    def could(self, comparisons: int) -> str:
        """Return the smallest design that can decide one of so many comparisons; ``""`` if this one can."""
        if self.paired:
            least = least_pairs(comparisons)
            return f"{least} pairs" if len(self) < least else ""
        sizes = len(self.first), len(self.second)
        design = smallest_design(*sizes, comparisons)
        return f"{design[0]} + {design[1]} runs" if design != sizes else ""


def units_of(
    groups: Mapping[str, Sequence[str]], first: str, second: str, labels: Mapping[str, str], least: int
) -> Units:
    """Return pairs where both groups have runs of at least ``least`` labels; else every run is a unit of its own."""
    sides = [{labels[run] for run in groups[group] if run in labels} for group in (first, second)]
    common = sorted(sides[0] & sides[1])
    if len(common) >= least:
        paired = [
            [[run for run in groups[group] if labels.get(run) == label] for label in common]
            for group in (first, second)
        ]
        return Units(*paired, paired=True, pairing=" by name" if least > 2 else "")
    singles = [[[run] for run in groups[group]] for group in (first, second)]
    unmatched = f" (names match {len(common)} pairs; {least} are needed)" if common and least > 2 else ""
    return Units(*singles, paired=False, pairing=f", unpaired{unmatched}")


def least_pairs(comparisons: int) -> int:
    """Return the fewest pairs that can decide one of so many comparisons: ``comparisons`` times 2/2ⁿ is at most 0.05.

    >>> least_pairs(1), least_pairs(3)
    (6, 7)
    """
    count = 1
    while comparisons * 2 / 2**count > LEVEL:
        count += 1
    return count


def smallest_design(first: int, second: int, comparisons: int = 1) -> tuple[int, int]:
    """Return the sizes of two unpaired groups that can decide a comparison, with the fewest runs added to those given.

    Groups have at least 3 runs, and ``comparisons`` times the share of the relabellings that are as extreme as the most
    extreme one is at most 0.05: two (a split and its mirror image) where groups are of equal size, else one. Of designs
    of equal cost, the more balanced.

    >>> smallest_design(3, 3), smallest_design(2, 2), smallest_design(4, 4, comparisons=3)
    ((3, 4), (3, 4), (4, 5))
    """
    least = max(first, _LEAST_RUNS), max(second, _LEAST_RUNS)
    added = 0
    while True:
        designs = [(least[0] + more, least[1] + added - more) for more in range(added + 1)]
        for sizes in sorted(designs, key=lambda sizes: abs(sizes[0] - sizes[1])):
            extreme = 2 if sizes[0] == sizes[1] else 1
            if comparisons * extreme / math.comb(sum(sizes), sizes[0]) <= LEVEL:
                return sizes
        added += 1


def _compared(
    measures: xr.DataArray,
    contrast: tuple[str, str],
    units: Units,
    headline: str,
    comparisons: int,
    draws: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Return everything of one comparison, ``[measure, step]``, ``[measure]``, or one number."""
    names = measures["measure"].values.tolist()
    leading = np.array([name == headline for name in names])
    first, second = (_means(measures, side) for side in (units.first, units.second))
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
    decision = decided(overall, test, units, leading, comparisons, int(counted.sum()))
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
        **{name: column * described if column.dtype == np.float64 else column for name, column in decision.items()},
        "n_units": np.full(len(names), len(units), dtype=np.int64),
        "n_steps": complete.sum(-1).astype(np.int64),
        "method": np.array(_PAIRED if units.paired else _UNPAIRED if units.tested else _DESCRIBED, dtype=str),
        "n_pairs": np.array(len(units.first) if units.paired else 0, dtype=np.int64),
        "n_first": np.array(len(units.first), dtype=np.int64),
        "n_second": np.array(len(units.second), dtype=np.int64),
    }
    columns["mean_q_value"] = false_discovery_rates(columns["mean_p_value"])
    deciding = np.minimum(1.0, comparisons * np.where(leading, columns["mean_p_value"], columns["mean_p_familywise"]))
    numbers = {name: column.tolist() for name, column in columns.items() if column.shape == (len(names),)}
    numbers |= {"measure": names, "leading": leading.tolist(), "p_value": deciding.tolist()}
    context = _context(contrast, units, len(names), comparisons)
    rows = [dict(zip(numbers, row, strict=True)) for row in zip(*numbers.values(), strict=True)]
    columns["statement"] = np.array([difference_statement(row, context) for row in rows], dtype=str)
    return columns


def _context(contrast: tuple[str, str], units: Units, measures: int, comparisons: int) -> ComparisonContext:
    """Return what holds for the sentences of all measures."""
    could = units.could(comparisons)  # "": it is the measures beside it, or the data, that stand in the way
    return ComparisonContext(*contrast, str(units), units.pairing, units.tested, could, measures, comparisons)


def decided(
    overall: Difference, test: PermutationTest, units: Units, leading: np.ndarray, comparisons: int, measures: int
) -> dict[str, np.ndarray]:
    """Return p-values, the interval that belongs to them, and whether the difference is shown, ``[measure]``.

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


def _means(measures: xr.DataArray, units: Sequence[Sequence[str]]) -> np.ndarray:
    """Return means over each unit's runs, ``[unit, measure, step]``."""
    rows = [measures.sel(run=list(runs)).transpose("run", "measure", "step").values.mean(0) for runs in units]
    return np.stack(rows)


def _to_draw(measures: xr.DataArray, groups: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Return every run's values, group by group, and each group's medians."""
    rows = [measures.sel(run=list(runs)).values for runs in groups.values()]
    medians = [xr.DataArray(values).median("dim_0", skipna=True).values for values in rows]
    return {"value": np.concatenate(rows), "group_median": np.stack(medians)}


def pair_labels(groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return a label for each run that its partners in other groups have, too: its name without the group's own.

    Args:
        groups: Group → its runs.

    Returns:
        Run → label, only for labels that occur in at least two groups; empty where names say nothing, or where one
        group has two runs of a label.

    >>> pair_labels({"imax": ["imax_s1", "imax_s2"], "dmax": ["dmax_s1", "dmax_s2"]})
    {'imax_s1': 's1', 'imax_s2': 's2', 'dmax_s1': 's1', 'dmax_s2': 's2'}
    >>> pair_labels({"imax": ["a"], "dmax": ["b"]})
    {}
    """
    labels = {run: _label(run, group) for group, runs in groups.items() for run in runs}
    members = defaultdict(list)
    for group, runs in groups.items():
        for run in runs:
            members[labels[run]].append(group)
    if any(len(set(names)) < len(names) for names in members.values()):
        return {}
    return {run: label for run, label in labels.items() if label and len(members[label]) > 1}


def _label(run: str, group: str) -> str:
    parts = [part for part in re.split(r"[-_./]+", run) if part]
    words = {part for part in re.split(r"[-_./]+", group.lower()) if part}
    kept = [part for part in parts if part.lower() not in words]
    return "_".join(kept) if len(kept) < len(parts) else ""
