from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from dynamics.checkpoints import Checkpoint, LogEntry, Trajectory
from dynamics.checkpoints.logs import log_groups


def trajectory(entries, owners=()):
    checkpoints = [Checkpoint(step, Path("r"), segment, {}, open=nullcontext) for step, segment in owners]
    return Trajectory(Path("r"), checkpoints, [LogEntry(*entry) for entry in entries])


def test_training_scalars_and_scores_are_told_apart():
    groups = log_groups(
        trajectory([(0, 5, "loss", 2.0), (0, 5, "grad_norm", 1.0), (0, 10, "loss", 1.5), (0, 10, "eval_acc", 0.7)])
    )
    assert groups["training"]["loss"].values.tolist() == [2.0, 1.5]
    np.testing.assert_array_equal(groups["training"]["grad_norm"], [1.0, np.nan])
    assert groups["training"]["log_step"].values.tolist() == [5, 10]
    assert groups["score"]["score"].sel(step=10, task="eval_acc") == 0.7
    assert groups["score"]["items"].isnull().all()


def test_how_long_an_evaluation_took_is_not_a_score():
    groups = log_groups(trajectory([(0, 5, "eval_runtime", 3.0), (0, 5, "eval_loss", 1.0)]))
    assert groups["score"]["task"].values.tolist() == ["eval_loss"]


def test_metric_names_with_slashes_do_not_become_groups():
    groups = log_groups(trajectory([(0, 5, "train/mem", 3.0)]))
    assert groups["training"]["train__mem"].attrs["long_name"] == "train/mem"


def test_of_two_trainings_the_one_whose_checkpoint_it_is_has_the_score():
    entries = [(0, 10, "eval_acc", 0.1), (1, 10, "eval_acc", 0.9), (0, 20, "eval_acc", 0.2)]
    score = log_groups(trajectory(entries, owners=[(10, 1), (20, 0)]))["score"]
    assert score["score"].sel(task="eval_acc").values.tolist() == [0.9, 0.2]
    assert score["segment"].values.tolist() == [1, 0]


@pytest.mark.parametrize("entries", [[], [(0, 1, "eval_runtime", 1.0)]])
def test_no_log_no_groups(entries):
    assert log_groups(trajectory(entries)) == {}
