"""The figures of the Fisher, where it was measured: what goes to ``figures/`` and into the report."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from dynamics.plot.concentration import concentration
from dynamics.plot.fisher_spectrum import fisher_spectrum
from dynamics.plot.fisher_trajectory import fisher_trajectory
from dynamics.plot.gain_trajectory import gain_trajectory
from dynamics.plot.rarefaction import rarefaction
from dynamics.plot.select import group
from dynamics.plot.selection import tasks_of
from dynamics.plot.task_matrix import task_matrix
from dynamics.schema import ALL, FISHER_GROUPS, GLOBAL

#: What is drawn over the steps; tasks only where their numbers of samples do not matter.
FISHER_OVER_STEPS = ("ln_participation_ratio", "spectral_entropy", "dominant_ratio")
#: Matrices of tasks.
BETWEEN_TASKS = ("cosine", "overlap", "transfer")


def fisher_figures(tree: xr.DataTree) -> dict[str, Figure]:
    """Every figure of all trainable parameters together that has something to show, by its name; none without a Fisher.

    Args:
        tree: A result of one run.
    """
    if not set(FISHER_GROUPS) <= set(tree.children):
        return {}
    fisher, shares, tasks = (group(tree, name) for name in FISHER_GROUPS)
    if GLOBAL not in fisher["block"].values:
        return {}
    drawn: dict[str, Figure] = {}
    for variable in FISHER_OVER_STEPS:
        if _has_values(fisher, variable):
            several = tasks_of(fisher) if variable.startswith("ln_") else []
            drawn[f"fisher_{variable}"] = fisher_trajectory(tree, variable=variable, tasks=[ALL, *several])
    if _has_values(fisher, "eigenvalue"):
        drawn["fisher_spectrum"] = fisher_spectrum(tree)
    if _has_values(fisher, "rarefied_spectral_entropy"):
        drawn["rarefaction"] = rarefaction(tree)
    if _has_values(shares, "captured"):
        drawn["concentration"] = concentration(tree)
    if _has_values(shares, "gain"):
        drawn["concentration_gain"] = concentration(tree, show="gain")
        if shares.sizes["step"] > 1:
            drawn["concentration_gain_over_steps"] = gain_trajectory(tree)
    if tasks_of(tasks):
        between = tasks.drop_sel(task=ALL, task_=ALL)
        drawn |= {
            f"tasks_{name}": task_matrix(tree, variable=name) for name in BETWEEN_TASKS if _has_values(between, name)
        }
    return drawn


def _has_values(dataset: xr.Dataset, variable: str) -> bool:
    return bool(np.isfinite(dataset[variable].sel(block=GLOBAL).values).any())
