"""What ``associate`` and ``compare`` accept, brought to one form.

What the names of runs say: which are repeats of one another, and which belong together in pairs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import xarray as xr

from dynamics.relate.score_tables import directions_of

#: The measure that is named before looking. The logarithm of the participation ratio is a lower bound of the
#: spectral entropy, of the Fisher it has a nearly unbiased estimate, and its differences are ratios.
HEADLINE = "ln_participation_ratio"


def as_measures(measures: xr.DataArray | xr.Dataset, headline: str) -> xr.DataArray:
    """``(run, step, measure)`` in float64; of a dataset every variable of ``(run, step)`` is a measure.

    ``ln_participation_ratio`` is made from ``participation_ratio`` where only that is there and it is the headline.

    Raises:
        ValueError: If dimensions are missing, or the headline measure is not there.
    """
    if isinstance(measures, xr.Dataset):
        fitting = {name: array for name, array in measures.data_vars.items() if set(array.dims) == {"run", "step"}}
        if not fitting:
            raise ValueError(
                f"measures: expected variables of (run, step), got {sorted(map(str, measures.data_vars))} "
                f"of {dict(measures.sizes)}. Choose a matrix, a kind, or take a mean first."
            )
        measures = xr.Dataset(fitting).to_dataarray("measure")
    values = _grid(measures, "measure", "measures")
    names = values["measure"].values.tolist()
    if headline == HEADLINE and HEADLINE not in names and "participation_ratio" in names:
        ratio = values.sel(measure=["participation_ratio"])
        positive = ratio.where(ratio > 0)
        logarithm = positive.copy(data=np.log(positive.values)).assign_coords(measure=[HEADLINE])
        values = xr.concat([logarithm, values], dim="measure").transpose("run", "step", "measure")
        names = values["measure"].values.tolist()
    if headline not in names:
        raise ValueError(f"headline: expected one of the measures {', '.join(map(repr, names))}, got {headline!r}.")
    return values


def as_scores(scores: xr.DataArray | xr.Dataset, directions: Mapping[str, str] | None) -> xr.DataArray:
    """``(run, step, task)`` in float64 with the coordinate ``direction(task)``.

    Raises:
        ValueError: If dimensions are missing, or a direction is neither ``"higher"`` nor ``"lower"``.
    """
    values = _grid(scores["score"] if isinstance(scores, xr.Dataset) else scores, "task", "scores")
    tasks = values["task"].values.tolist()
    known = dict(zip(tasks, values["direction"].values.tolist(), strict=True)) if "direction" in values.coords else {}
    stated = {task: sign > 0 for task, sign in known.items() if sign}
    asked = {task: word for task, word in (directions or {}).items() if task in tasks}
    direction = directions_of(tasks, asked, stated)
    return values.assign_coords(direction=("task", np.array([direction[task] for task in tasks], dtype=np.int64)))


def _grid(values: xr.DataArray, last: str, what: str) -> xr.DataArray:
    expected = ("run", "step", last)
    if set(values.dims) != set(expected):
        raise ValueError(f"{what}: expected the dimensions {expected}, got {values.dims}.")
    lacking = [dim for dim in expected if dim not in values.indexes]
    if lacking:
        raise ValueError(f"{what}: expected a coordinate for each dimension, got none for {', '.join(lacking)}.")
    doubled = [dim for dim in expected if not values.indexes[dim].is_unique]
    if doubled:
        raise ValueError(f"{what}: expected each {doubled[0]} once, got some of them twice.")
    return values.transpose(*expected).astype(np.float64)


def cluster_codes(runs: Sequence[str], clusters: Mapping[str, str] | None) -> np.ndarray:
    """Number of each run's cluster, each run its own without ``clusters``.

    Raises:
        ValueError: If a run has no cluster.

    >>> cluster_codes(["a", "b", "c"], {"a": "qwen", "b": "qwen", "c": "llama"}).tolist()
    [0, 0, 1]
    """
    if clusters is None:
        return np.arange(len(runs))
    lacking = [run for run in runs if run not in clusters]
    if lacking:
        raise ValueError(f"clusters: expected a cluster for every run, got none for {', '.join(map(repr, lacking))}.")
    number = {name: code for code, name in enumerate(dict.fromkeys(clusters[run] for run in runs))}
    return np.array([number[clusters[run]] for run in runs])


#: A number at the end, as repeats are told apart: run_3, run-s3, run.seed42.
_SEED = re.compile(r"[-_.]?(?:s|seed|rep|run|r|v)?[-_.]?\d+$", re.IGNORECASE)


def without_seed(run: str) -> str:
    """A run's name without the number at its end that tells repeats apart.

    >>> without_seed("imax_seed42"), without_seed("llama-dmax")
    ('imax', 'llama-dmax')
    """
    return _SEED.sub("", run) or run


def look_like_repeats(runs: Iterable[str]) -> dict[str, list[str]]:
    """Sets of runs that seem to differ by a seed only, where there are several such sets.

    One set of all runs is what repeats are for, and is not returned.

    >>> look_like_repeats(["imax_s1", "imax_s2", "dmax_s1", "dmax_s2"])
    {'imax': ['imax_s1', 'imax_s2'], 'dmax': ['dmax_s1', 'dmax_s2']}
    >>> look_like_repeats(["run_1", "run_2"])
    {}
    """
    sets = defaultdict(list)
    for run in runs:
        sets[without_seed(run)].append(run)
    repeated = {stem: found for stem, found in sets.items() if len(found) > 1}
    return repeated if len(sets) > 1 else {}


def pair_labels(groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Label of each run by which runs of different groups belong together: its name without the group's own.

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
    owners = defaultdict(list)
    for group, runs in groups.items():
        for run in runs:
            owners[labels[run]].append(group)
    if any(len(set(found)) < len(found) for found in owners.values()):
        return {}
    return {run: label for run, label in labels.items() if label and len(owners[label]) > 1}


def _label(run: str, group: str) -> str:
    parts = [part for part in re.split(r"[-_./]+", run) if part]
    own = [part for part in re.split(r"[-_./]+", group.lower()) if part]
    return "_".join(part for part in parts if part.lower() not in own) if set(own) & {p.lower() for p in parts} else ""
