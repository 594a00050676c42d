"""The mean over tasks, and scores placed on runs and steps."""

import numpy as np
import xarray as xr

from dynamics.relate.score_tables import better


def scores(values, tasks, directions):
    coords = {"run": ["a", "b"], "step": [1, 2, 3], "task": tasks, "direction": ("task", directions)}
    return xr.DataArray(values, coords, ("run", "step", "task"))


def standard(values):
    return (values - values.mean()) / values.std()


def test_a_task_counts_once_however_many_scores_it_has():
    values = np.random.default_rng(0).standard_normal((2, 3, 4))
    tasks = ["eval_loss", "eval_ppl", "eval_accuracy", "vqa/accuracy"]
    mean = better(scores(values, tasks, [-1, -1, 1, 1])).sel(task="all").values
    of_evaluation = -standard(values[..., 0]) - standard(values[..., 1]) + standard(values[..., 2])
    np.testing.assert_allclose(mean, (standard(of_evaluation) + standard(values[..., 3])) / 2)


def test_the_mean_is_missing_where_a_score_is_and_unknown_directions_are_left_out():
    values = np.random.default_rng(1).standard_normal((2, 3, 3))
    values[0, 1, 0] = np.nan
    mean = better(scores(values, ["qa/acc", "vqa/acc", "oddity"], [1, 1, 0])).sel(task="all").values
    kept = values[..., 0][np.isfinite(values[..., 0])]
    first = (values[..., 0] - kept.mean()) / kept.std()
    expected = (first + standard(values[..., 1])) / 2
    assert np.isnan(mean[0, 1])
    np.testing.assert_allclose(mean[1], expected[1])
