"""Losses of records and checkpoints are joined over steps, as long as they are of the same samples."""

from __future__ import annotations

import re

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.store.loss_records import joined_losses, unmeasured_losses, with_probed_losses
from dynamics.store.records import TABLES, joined_scores
from tests.dynamics.intervention.test_loss_changes import MATRICES, record


def step(number: int, loss: float = 1.0, **changes) -> xr.Dataset:
    """The record of one step, as a recorder writes it."""
    one = record(np.full((1, 4), loss), np.zeros(4), steps=[number], **changes)
    return one.drop_vars(["recorded", "reason"]).assign_attrs(reason=f"reason {number}", scaled_reason="")


def test_steps_are_joined_with_their_reasons():
    whole = joined_losses([step(1), step(5, 2.0)])
    assert whole is not None
    assert whole["step"].values.tolist() == [1, 5]
    assert whole["reason"].values.tolist() == ["reason 1", "reason 5"]
    assert whole["recorded"].all()
    assert whole["sample_loss"].values[:, 0].tolist() == [1, 2]
    assert whole["retained"].values.tolist() == [False, True]
    assert whole.attrs["of_matrices"] == len(MATRICES)


def test_predictions_that_a_step_lacks_are_missing():
    first = np.ones((1, 4, 2))
    whole = joined_losses([step(1, matrices=()), step(2, first_order=first)])
    assert whole is not None
    assert whole["matrix"].values.tolist() == list(MATRICES)
    assert np.isnan(whole["first_order"].values[0]).all()
    assert (whole["first_order"].values[1] == 1).all()


def test_other_samples_are_left_out():
    other = step(1).assign_coords(sample_id=("sample", list("abcd")))
    whole = joined_losses([other, step(2)])
    assert whole is not None
    assert whole["step"].values.tolist() == [2]
    assert with_probed_losses(whole, joined_losses([other])) is whole


def test_matrices_may_be_chosen():
    whole = joined_losses([step(1, first_order=np.ones((1, 4, 2)))], re.compile("layers.2"))
    assert whole is not None
    assert whole["matrix"].values.tolist() == ["model.layers.2.q_proj", "model.layers.2.v_proj"]
    assert whole.attrs["of_matrices"] == 4


def test_nothing_is_nothing():
    assert joined_losses([]) is None
    assert with_probed_losses(None, None) is None
    assert unmeasured_losses(xr.DataTree()) is None


def test_records_win_and_checkpoints_add_steps_and_scales():
    recorded = joined_losses([step(1), step(3)])
    probed = joined_losses([step(number, 9.0).assign_coords(recorded=("step", [False])) for number in (1, 2, 3)])
    assert recorded is not None
    assert probed is not None
    scaled = xr.DataArray(np.ones((1, 4)), {"scale": [0.5]}, ("scale", "sample"))
    whole = with_probed_losses(recorded, probed.assign(scaled_loss=scaled).assign_attrs(scaled_step=3))
    assert whole is not None
    assert whole["sample_loss"].values[:, 0].tolist() == [1, 9, 1]
    assert whole["recorded"].values.tolist() == [True, False, True]
    assert whole["scaled_loss"].values.tolist() == [[1] * 4]
    assert whole.attrs["scaled_step"] == 3


def test_a_record_is_checked():
    good = step(3)
    assert schema.check_record({"loss": good}, TABLES) == {}
    bad = {
        "a start after the step": good.assign_coords(start_step=("step", [4])),
        "flags that are numbers": good.assign_coords(retained=("task", [0.0, 1.0])),
        "no labels": good.drop_vars("sample_group"),
        "infinity": good.assign(sample_loss=(("step", "sample"), np.full((1, 4), np.inf))),
        "two tasks of one name": good.assign_coords(task=["new", "new"]),
    }
    problems = {name: schema.check_record({"loss": one}, TABLES).get("loss", "") for name, one in bad.items()}
    assert problems == {
        "a start after the step": "starts at a later step",
        "flags that are numbers": "holds no truth values in 'retained'",
        "no labels": "lacks 'sample_group' with the dimensions ('sample',)",
        "infinity": "has a number in 'sample_loss' that is not from -1e+100 to 1e+100",
        "two tasks of one name": "has two tasks of one name",
    }


def test_scores_keep_what_is_retained():
    def scored(number: int, tasks: list[str], retained: list[bool]) -> xr.Dataset:
        arrays = {name: (("step", "task"), np.ones((1, len(tasks)))) for name in (*schema.SCORE, "direction")}
        return xr.Dataset(arrays, {"step": [number], "task": tasks, "retained": ("task", retained)})

    whole = joined_scores([scored(1, ["a"], [True]), scored(2, ["a", "b"], [True, False])])
    assert whole is not None
    assert whole["retained"].values.tolist() == [True, False]
    assert whole["retained"].dims == ("task",)
    without = joined_scores([scored(1, ["a"], [True]).drop_vars("retained")])
    assert without is not None
    assert "retained" not in without
