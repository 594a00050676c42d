from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from dynamics.checkpoints import Checkpoint, LogEntry, Trajectory
from dynamics.checkpoints.logs import log_groups
from dynamics.store import read_tree, write_tree


def trajectory(entries, owners=()):
    checkpoints = [Checkpoint(step, Path("r"), segment, {}, open=nullcontext) for step, segment in owners]
    return Trajectory(Path("r"), checkpoints, [LogEntry(*entry) for entry in entries])


def test_training_scalars_and_scores_are_told_apart():
    groups = log_groups(
        trajectory([(0, 5, "loss", 2.0), (0, 5, "grad_norm", 1.0), (0, 10, "loss", 1.5), (0, 10, "eval_acc", 0.7)])
    )
    value = groups["training"]["value"]
    assert value.dims == ("log", "metric")
    assert value.sel(metric="loss").values.tolist() == [2.0, 1.5]
    np.testing.assert_array_equal(value.sel(metric="grad_norm"), [1.0, np.nan])
    assert groups["training"]["log_step"].values.tolist() == [5, 10]
    assert groups["score"]["score"].sel(step=10, task="eval_acc") == 0.7
    assert groups["score"]["items"].isnull().all()


def test_how_long_an_evaluation_took_is_not_a_score():
    groups = log_groups(trajectory([(0, 5, "eval_runtime", 3.0), (0, 5, "eval_loss", 1.0)]))
    assert groups["score"]["task"].values.tolist() == ["eval_loss"]


HOSTILE = ["a/b", "a__b", "..", ".", "", "log_step", "value", ".zgroup", "x" * 300, "nul\0", "nul", "ä", "/", "a//b"]


@pytest.mark.parametrize("prefix", ["", "eval_"])
def test_no_metric_name_is_a_path_in_the_store(tmp_path, prefix):
    names = [prefix + name for name in HOSTILE]
    entries = [(0, 5, name, float(index)) for index, name in enumerate(names)]
    groups = log_groups(trajectory(entries))
    write_tree(xr.DataTree.from_dict({f"/{name}": group for name, group in groups.items()}), tmp_path / "x.zarr")
    assert {path.name for path in tmp_path.iterdir()} == {"x.zarr"}
    tree = read_tree(tmp_path / "x.zarr")
    values = tree["score"]["score"] if prefix else tree["training"]["value"]
    assert values.values.ravel().tolist() == [float(index) for index in range(len(names))]
    read = values["task" if prefix else "metric"].values.tolist()
    assert read == [name.replace("\0", "\\x00") for name in names]


def test_each_variable_has_units_and_a_name():
    for group in log_groups(trajectory([(0, 5, "loss", 3.0), (0, 5, "eval_loss", 1.0)])).values():
        assert all({"units", "long_name"} <= set(variable.attrs) for variable in group.variables.values())


def test_of_two_trainings_the_one_whose_checkpoint_it_is_has_the_score():
    entries = [(0, 10, "eval_acc", 0.1), (1, 10, "eval_acc", 0.9), (0, 20, "eval_acc", 0.2)]
    score = log_groups(trajectory(entries, owners=[(10, 1), (20, 0)]))["score"]
    assert score["score"].sel(task="eval_acc").values.tolist() == [0.9, 0.2]
    assert score["segment"].values.tolist() == [1, 0]


@pytest.mark.parametrize("entries", [[], [(0, 1, "eval_runtime", 1.0)]])
def test_no_log_no_groups(entries):
    assert log_groups(trajectory(entries)) == {}
