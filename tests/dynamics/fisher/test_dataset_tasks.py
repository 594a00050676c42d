import re

import numpy as np
import pytest

from dynamics.fisher import task_structure
from dynamics.schema import TASKS
from tests.dynamics.fisher.simulated import gradients, grams, probe_gram

MEANS = np.zeros((3, 12))
MEANS[0, 0] = MEANS[1, 0] = 1.0
MEANS[2, 0] = -1.0


@pytest.fixture(scope="module")
def gram():
    rng = np.random.default_rng(0)
    return grams(np.concatenate([gradients(rng, 1, 12, np.full(12, 0.05), mean) for mean in MEANS], axis=1))[0]


TASK = np.repeat(["x", "y", "z"], 12)


def of_tasks(gram, tasks=TASK, **more):
    return task_structure(probe_gram(gram, tasks=tasks, **more))


@pytest.fixture(scope="module")
def found(gram):
    return of_tasks({"w": gram, "global": 2 * gram}, losses=np.full(36, 2.0), space="factor")


def test_every_variable_says_what_it_is(found):
    assert set(found) == set(TASKS)
    for name, variable in found.items():
        assert ("step", *variable.dims) == TASKS[name].dims
        assert {"units", "long_name", "definition"} <= set(variable.attrs), name


def test_friends_and_foes(found):
    cosine = found["cosine"].sel(block="w")
    assert cosine.sel(task="x", task_="y") > 0.9
    assert cosine.sel(task="x", task_="z") < -0.9
    assert found["conflict_rate"].values == pytest.approx(2 / 3)
    assert (found["decided_pairs"] == 3).all()


def test_all_is_how_a_task_stands_to_the_pooled_gradient(gram):
    friends = of_tasks(gram[:24, :24], TASK[:24]).isel(block=0)
    assert friends["task"].values.tolist() == friends["task_"].values.tolist() == ["all", "x", "y"]
    assert friends["cosine"].sel(task="all", task_="y") > 0.9
    assert np.isfinite(friends["noise_scale"].sel(task="all"))


def test_a_pooled_gradient_that_cancels_is_not_resolved(found):
    assert found["unresolved"].sel(task="all").all()
    assert np.isnan(found["noise_scale"].sel(task="all")).all()
    assert np.isfinite(found["noise_scale"].sel(task="y")).all()


def test_transfer_divides_by_the_other_tasks_loss_and_needs_factor_space(gram, found):
    transfer = found["transfer"].sel(block="w", task="x", task_="z").item()
    assert transfer == pytest.approx(gram[:12, 24:].mean() / 2, rel=0.02)
    for given in ({"space": "tangent", "losses": np.ones(36)}, {"space": "factor"}):
        assert np.isnan(of_tasks(gram, **given)["transfer"]).all()


def test_only_named_blocks_are_permuted(found):
    assert np.isnan(found["divergence_p_value"].sel(block="w"))
    assert 0 < found["divergence_p_value"].sel(block="global") <= 1
    assert found["divergence"].sel(block="w").item() == pytest.approx(found["divergence"].sel(block="global").item())


def test_one_task_has_nothing_to_share(gram):
    found = of_tasks(gram, ["x"] * 36).isel(block=0)
    assert found["divergence"].item() == found["divergence_largest"].item() == 0
    for name in ("divergence_p_value", "sharing", "conflict_rate"):
        assert np.isnan(found[name]), name


def test_as_many_tasks_as_samples_leave_nothing_resolved():
    found = of_tasks(np.eye(3), ["x", "y", "z"]).isel(block=0)
    assert found["unresolved"].sel(task=["x", "y"]).all()
    assert np.isnan(found["cosine"].sel(task="x")).all()
    assert found["divergence"].item() == pytest.approx(np.log(3))


def test_zero_and_broken_blocks_are_missing():
    found = of_tasks({"zero": np.zeros((4, 4)), "broken": np.full((4, 4), np.nan)}, ["x", "x", "y", "y"])
    for name in ("cosine", "overlap", "noise_scale", "divergence", "purity_gap", "sharing"):
        assert np.isnan(found[name]).all(), name
    assert found["unresolved"].all()


def test_losses_that_do_not_fit_are_refused(gram):
    with pytest.raises(ValueError, match=re.escape("Expected one loss for each of 36 samples, got shape (2,).")):
        of_tasks(gram, losses=np.ones(2), space="factor")


def test_tasks_are_needed():
    with pytest.raises(ValueError, match=re.escape("Expected a Gram with the task of each sample, got none.")):
        task_structure(probe_gram(np.eye(3)))
