"""The set of figures of a result: what goes to ``figures/`` and into the report.

The figures of the Fisher, where it was measured: what goes to ``figures/`` and into the report.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from dynamics.plot.association import association
from dynamics.plot.association_grid import association_grid
from dynamics.plot.comparison import comparison
from dynamics.plot.concentration import concentration
from dynamics.plot.fisher_spectrum import fisher_spectrum
from dynamics.plot.fisher_trajectory import fisher_trajectory
from dynamics.plot.gain_trajectory import gain_trajectory
from dynamics.plot.gradient import NORM, gradient
from dynamics.plot.heatmap import heatmap
from dynamics.plot.rarefaction import rarefaction
from dynamics.plot.score_scatter import score_scatter
from dynamics.plot.select import group, has_group, standouts, tasks_of
from dynamics.plot.spectrum import spectra_of_standouts
from dynamics.plot.task_matrix import task_matrix
from dynamics.plot.training_log import logged_number, training_log
from dynamics.plot.trajectory import trajectory
from dynamics.schema import ALL, FISHER_GROUPS, GLOBAL

#: Variable and kind of each figure over the steps.
OVER_STEPS = (
    ("frobenius_norm", "total"),
    ("frobenius_norm", "increment"),
    ("path_length", ""),
    ("increment_cosine", ""),
    ("effective_rank_energy", "total"),
    ("effective_rank_energy", "increment"),
    ("stable_rank", "total"),
    ("entropy_deficit", "total"),
)
#: What is drawn of gradients, where they were captured.
OF_GRADIENTS = (NORM, "effective_rank_energy", "dominant_ratio")
#: Variables of the heatmaps, of the total update.
HEATMAPS = ("frobenius_norm", "effective_rank_energy")


def figures(tree: xr.DataTree) -> dict[str, Figure]:
    """Every figure that has something to show, by a name that can be a file's.

    Args:
        tree: A result; of several runs the names are ``<run>/<figure>``.
    """
    if "runs" in tree.children:
        return _related(tree) | {
            f"{run}/{name}": figure
            for run, each in tree["runs"].children.items()
            for name, figure in figures(each).items()
        }
    summary, update = group(tree, "summary"), group(tree, "update")
    # Without increments a path has length 0, which is no news.
    moved = has_values(summary["frobenius_norm_quantile"], "increment")
    drawn = {
        figure_name(variable, kind): trajectory(tree, variable=variable, kind=kind or "total")
        for variable, kind in OVER_STEPS
        if has_values(summary[f"{variable}_quantile"], kind) and (moved or variable != "path_length")
    }
    if has_group(tree, "summary_gradient"):
        drawn |= _gradients(tree)
    drawn |= fisher_figures(tree) | _related(tree)
    if "training" in tree.children and has_values(logged_number(group(tree, "training"), "loss")):
        drawn["training_loss"] = training_log(tree, variable="loss")
    for variable in HEATMAPS:
        if has_values(update[variable], "total"):
            drawn[f"heatmap_{variable}"] = heatmap(tree, variable=variable)
    if standouts(update):
        drawn["spectra"] = spectra_of_standouts(tree)
    return drawn


def _related(tree: xr.DataTree) -> dict[str, Figure]:
    """What relates runs to scores and to each other."""
    drawn: dict[str, Figure] = {}
    if has_group(tree, "association"):
        drawn = {"association": association(tree), "association_scatter": score_scatter(tree)}
        if tree["association"].sizes["task"] > 1:
            drawn["association_grid"] = association_grid(tree)
    return drawn | ({"comparison": comparison(tree)} if has_group(tree, "comparison") else {})


def _gradients(tree: xr.DataTree) -> dict[str, Figure]:
    summary = group(tree, "summary_gradient")
    known = {name: "norm_before_clip" if name == NORM else name for name in OF_GRADIENTS}
    return {
        gradient_name(name): gradient(tree, variable=name)
        for name, variable in known.items()
        if has_values(summary[f"{variable}_quantile"])
    }


def gradient_name(variable: str) -> str:
    """The name of a figure of gradients.

    >>> gradient_name("norm")
    'gradient_norm'
    """
    return f"gradient_{variable}"


def figure_name(variable: str, kind: str) -> str:
    """The name of a figure over the steps.

    >>> figure_name("stable_rank", "total"), figure_name("path_length", "")
    ('stable_rank_total', 'path_length')
    """
    return f"{variable}_{kind}" if kind else variable


def has_values(array: xr.DataArray | None, kind: str = "") -> bool:
    """Whether there is a finite number to draw."""
    if array is None:
        return False
    return bool(np.isfinite((array.sel(kind=kind) if kind else array).values).any())


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
