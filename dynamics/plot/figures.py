"""The set of figures of a result: those of ``figures/`` and of the report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from dynamics.plot.association import association
from dynamics.plot.association_grid import association_grid
from dynamics.plot.comparison import comparison
from dynamics.plot.concentration import concentration
from dynamics.plot.expert_load import expert_load
from dynamics.plot.expert_updates import expert_updates
from dynamics.plot.fisher_spectrum import fisher_spectrum
from dynamics.plot.fisher_trajectory import fisher_trajectory
from dynamics.plot.gain_trajectory import gain_trajectory
from dynamics.plot.gradient import NORM, gradient
from dynamics.plot.heatmap import heatmap
from dynamics.plot.intervention import intervention
from dynamics.plot.losses import losses
from dynamics.plot.noise_scale import noise_scale
from dynamics.plot.rarefaction import rarefaction
from dynamics.plot.routing import OF_ROUTING, routing
from dynamics.plot.score_comparison import score_comparison
from dynamics.plot.score_scatter import score_scatter
from dynamics.plot.score_trajectory import scores
from dynamics.plot.select import group, has_group, standouts, tasks_of
from dynamics.plot.sharpness import sharpness
from dynamics.plot.spectrum import spectra_of_standouts
from dynamics.plot.task_matrix import task_matrix
from dynamics.plot.training_log import logged_number, training_log
from dynamics.plot.trajectory import trajectory
from dynamics.schema import ALL, FISHER_GROUPS, GLOBAL

#: Draws one figure.
Draw = Callable[[], Figure]

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
#: Variables of the figures of gradients.
OF_GRADIENTS = (NORM, "effective_rank_energy", "dominant_ratio")
#: Variables of the heatmaps, of the total update.
HEATMAPS = ("frobenius_norm", "effective_rank_energy")
#: Variables of the Fisher over the steps; tasks are drawn only in the first, which hardly depends on their sample size.
FISHER_OVER_STEPS = ("ln_participation_ratio", "spectral_entropy", "dominant_ratio")
#: Variables of the matrices of tasks.
BETWEEN_TASKS = ("cosine", "overlap", "transfer")


def figures(tree: xr.DataTree) -> dict[str, Figure]:
    """Draw every figure that has something to show, by a name that can be a file's.

    Args:
        tree: A result; of several runs the names are ``<run>/<figure>``.

    Example: ``plot.figures(dynamics.open_run("runs/imax"))["spectra"].savefig("spectra.png")``
    """
    return {name: draw() for name, draw in drawings(tree).items()}


def drawings(tree: xr.DataTree) -> dict[str, Draw]:
    """Return what draws each figure that has something to show, so that one may fail without the others.

    Args:
        tree: A result; of several runs the names are ``<run>/<figure>``.

    Returns:
        Name of a figure → a function without arguments that draws it.

    Example: ``plot.drawings(dynamics.open_run("runs/imax"))["spectra"]()``
    """
    if "runs" not in tree.children:
        return _of_a_run(tree)
    of_runs = {
        f"{run}/{name}": draw
        for run, result in tree["runs"].children.items()
        for name, draw in drawings(result).items()
    }
    return _of_relations(tree) | of_runs


def _of_a_run(tree: xr.DataTree) -> dict[str, Draw]:
    summary, update = group(tree, "summary"), group(tree, "update")
    # Without increments every path has length 0, which is no news.
    moved = has_values(summary["frobenius_norm_quantile"], "increment")
    draws: dict[str, Draw] = {
        figure_name(variable, kind): partial(trajectory, tree, variable=variable, kind=kind or "total")
        for variable, kind in OVER_STEPS
        if has_values(summary[f"{variable}_quantile"], kind) and (moved or variable != "path_length")
    }
    draws |= _of_gradients(tree) | fisher_drawings(tree) | _of_interventions(tree) | _of_relations(tree)
    draws |= _of_routing(tree)
    if has_group(tree, "training") and has_values(logged_number(group(tree, "training"), "loss")):
        draws["training_loss"] = partial(training_log, tree, variable="loss")
    if has_group(tree, "score") and has_values(group(tree, "score")["score"]):
        draws["scores"] = partial(scores, tree)
    draws |= {
        f"heatmap_{variable}": partial(heatmap, tree, variable=variable)
        for variable in HEATMAPS
        if has_values(update[variable], "total")
    }
    if standouts(update):
        draws["spectra"] = partial(spectra_of_standouts, tree)
    return draws


def _of_gradients(tree: xr.DataTree) -> dict[str, Draw]:
    if not has_group(tree, "summary_gradient"):
        return {}
    summary = group(tree, "summary_gradient")
    stored = {name: "norm_before_clip" if name == NORM else name for name in OF_GRADIENTS}
    draws: dict[str, Draw] = {
        gradient_name(name): partial(gradient, tree, variable=name)
        for name, variable in stored.items()
        if has_values(summary[f"{variable}_quantile"])
    }
    if has_values(group(tree, "gradient").get("noise_to_signal")):
        draws["noise_scale"] = partial(noise_scale, tree)
    return draws


def fisher_drawings(tree: xr.DataTree) -> dict[str, Draw]:
    """Return what draws each figure of all trainable parameters together; nothing without a Fisher.

    Args:
        tree: A result of one run.
    """
    if not set(FISHER_GROUPS) <= set(tree.children) or GLOBAL not in group(tree, "fisher")["block"].values:
        return {}
    fisher, shares, tasks = (group(tree, name).sel(block=GLOBAL) for name in FISHER_GROUPS)
    draws: dict[str, Draw] = {}
    for variable in FISHER_OVER_STEPS:
        if has_values(fisher[variable]):
            separate = tasks_of(fisher) if variable == FISHER_OVER_STEPS[0] else []
            draws[f"fisher_{variable}"] = partial(fisher_trajectory, tree, variable=variable, tasks=[ALL, *separate])
    if has_values(fisher["eigenvalue"]):
        draws["fisher_spectrum"] = partial(fisher_spectrum, tree)
    if has_values(fisher["rarefied_spectral_entropy"]):
        draws["rarefaction"] = partial(rarefaction, tree)
    if has_values(shares["captured"]):
        draws["concentration"] = partial(concentration, tree)
    if has_values(shares["gain"]):
        draws["concentration_gain"] = partial(concentration, tree, show="gain")
        if shares.sizes["step"] > 1:
            draws["concentration_gain_over_steps"] = partial(gain_trajectory, tree)
    if tasks_of(tasks):
        pairs = tasks.drop_sel(task=ALL, task_=ALL)
        draws |= {
            f"tasks_{name}": partial(task_matrix, tree, variable=name)
            for name in BETWEEN_TASKS
            if has_values(pairs[name])
        }
    return draws


def _of_routing(tree: xr.DataTree) -> dict[str, Draw]:
    """Return the figures of experts, where routing was recorded."""
    if not has_group(tree, "routing") or not has_values(group(tree, "routing")["load"]):
        return {}
    table = group(tree, "routing")
    draws: dict[str, Draw] = {"expert_load": partial(expert_load, tree)}
    if bool((table["load"].notnull() & table["update_norm"].notnull()).any()):
        draws["expert_updates"] = partial(expert_updates, tree)
    return draws | {f"routing_{name}": partial(routing, tree, variable=name) for name in OF_ROUTING}


def _of_interventions(tree: xr.DataTree) -> dict[str, Draw]:
    """Return the figures of what updates and their parts do; those of parts only where ``on`` and ``off`` were run."""
    draws: dict[str, Draw] = {}
    if has_group(tree, "loss") and has_values(group(tree, "loss")["change"].isel(step=slice(1, None))):
        draws["losses"] = partial(losses, tree)
    if has_group(tree, "sharpness") and has_values(group(tree, "sharpness")["critical_sharpness"]):
        draws["sharpness"] = partial(sharpness, tree)
    if not has_group(tree, "intervention") or not has_values(group(tree, "intervention")["effect"]):
        return draws
    effects = group(tree, "intervention")
    has_parts = has_values(effects.get("attributed"))
    shown = {"arms": True, "scales": has_parts, "norm": has_parts}
    shown |= {"tasks": bool(tasks_of(effects)), "steps": effects.sizes["step"] > 1}
    draws |= {f"intervention_{show}": partial(intervention, tree, show=show) for show in shown if shown[show]}
    return draws


def _of_relations(tree: xr.DataTree) -> dict[str, Draw]:
    """Return the figures of runs beside scores and beside one another."""
    draws: dict[str, Draw] = {}
    # Correlations within one run describe and decide nothing: they are in the result, and not drawn.
    if has_group(tree, "association") and tree["association"].attrs["question"] != "one_run":
        draws = {"association": partial(association, tree), "association_scatter": partial(score_scatter, tree)}
        if tree["association"].sizes["task"] > 1:
            draws["association_grid"] = partial(association_grid, tree)
    if has_group(tree, "score_comparison"):
        draws["score_comparison"] = partial(score_comparison, tree)
    if has_group(tree, "comparison"):
        draws["comparison"] = partial(comparison, tree)
    return draws


def gradient_name(variable: str) -> str:
    """Return the name of a figure of gradients.

    >>> gradient_name("norm")
    'gradient_norm'
    """
    return f"gradient_{variable}"


def figure_name(variable: str, kind: str) -> str:
    """Return the name of a figure over the steps.

    >>> figure_name("stable_rank", "total"), figure_name("path_length", "")
    ('stable_rank_total', 'path_length')
    """
    return f"{variable}_{kind}" if kind else variable


def has_values(array: xr.DataArray | None, kind: str = "") -> bool:
    """Return whether there is a finite number to draw."""
    if array is None:
        return False
    return bool(np.isfinite((array.sel(kind=kind) if kind else array).values).any())
