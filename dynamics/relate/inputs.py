"""What ``associate`` and ``compare`` accept, brought to one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from dynamics.relate.directions import directions_of

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
