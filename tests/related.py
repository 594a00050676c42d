"""Runs in two groups with scores of two tasks: what the plots and the page of relations are tested with."""

from functools import cache

import numpy as np
import xarray as xr

from dynamics.relate.run_measures import relate_runs
from dynamics.relate.score_files import ScoreRow
from tests.trees import example_tree

RUNS = [f"{group}_s{seed}" for group in ("imax", "$dmax") for seed in range(1, 5)]


@cache
def related_groups() -> dict[str, xr.Dataset]:
    """Return ``association`` and ``comparison`` of eight runs; not to be changed."""
    trees = {run: example_tree(run=run, steps=4, matrices=3) for run in RUNS}
    rng = np.random.default_rng(0)
    for tree in trees.values():
        for measure in ("participation_ratio", "stable_rank"):
            tree["summary"][f"{measure}_quantile"] *= rng.uniform(0.8, 1.2, (4, 2, 3))
    rows = [
        ScoreRow(run, step, task, float(rng.uniform()))
        for run in RUNS
        for step in (100, 200, 300, 400)
        for task in ("vqa/accuracy", "$x$/f1")
    ]
    return dict(relate_runs(trees, rows, labels={run: run[:-3] for run in RUNS}).groups)


@cache
def many_tasks() -> xr.Dataset:
    """Return the association of two runs with 300 tasks; not to be changed."""
    trees = {run: example_tree(run=run, steps=4, matrices=3) for run in RUNS[:2]}
    rng = np.random.default_rng(0)
    rows = [
        ScoreRow(run, step, f"task{number}/accuracy", float(rng.uniform()))
        for run in trees
        for step in (100, 200, 300, 400)
        for number in range(300)
    ]
    return relate_runs(trees, rows).groups["association"]


def texts(figure):
    """Return what is written in a figure's first axes."""
    axes = figure.axes[0]
    return [text.get_text() for text in [*axes.get_yticklabels(), *axes.get_xticklabels(), *axes.texts, axes.title]]
