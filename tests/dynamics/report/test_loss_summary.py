"""The summary has a row for each task, and the page a table, a figure and a sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

from dynamics.intervention.loss_changes import loss_changes
from dynamics.report.loss_summary import loss_summary
from dynamics.report.page import page
from dynamics.report.summary import summarise
from tests.dynamics.intervention.test_loss_changes import record, resolved
from tests.trees import example_tree


def tree_of(losses: xr.Dataset | None) -> xr.DataTree:
    tree = example_tree([100, 200], 2)
    if losses is not None:
        tree["loss"] = xr.DataTree(losses)
    return tree


def test_a_row_for_each_task():
    rows = loss_summary(tree_of(loss_changes(resolved(curvature=np.array([[0.2, np.nan]])))))
    assert [(row["task"], row["retained"], row["step"], row["start_step"]) for row in rows] == [
        ("new", False, 7, 0),
        ("old", True, 7, 0),
    ]
    new, old = rows
    assert (new["change"], new["predicted_first"], new["predicted_second"]) == pytest.approx((-1, -1, -0.9))
    assert new["low"] < -1 < new["high"] < 0
    assert old["predicted_second"] is None
    assert (old["worst_layer"], old["worst_layer_first_order"]) == ("2", pytest.approx(0.4))
    assert (new["worst_layer"], new["worst_layer_first_order"]) == ("", pytest.approx(-0.1))


@pytest.mark.parametrize("losses", [None, loss_changes(record(np.ones((1, 4)), np.full(4, np.nan)))])
def test_nothing_without_a_change(losses):
    assert loss_summary(tree_of(losses)) == []


def test_without_predictions_there_is_no_layer():
    rows = loss_summary(tree_of(loss_changes(record(np.ones((1, 4)), np.zeros(4), matrices=()))))
    assert [(row["worst_layer"], row["predicted_first"]) for row in rows] == [(None, None)] * 2


def test_the_summary_is_strict_json_and_the_page_has_a_section():
    tree = tree_of(loss_changes(resolved()).assign_coords(task=["<i>new</i>", "old"]))
    summary = summarise(tree)
    assert json.loads(json.dumps(summary, allow_nan=False))["losses"] == summary["losses"]
    html = page(tree)
    assert "<h2>What did it gain and forget?</h2>" in html
    assert "&lt;i&gt;new&lt;/i&gt;" in html
    assert "<i>new</i>" not in html
    assert "Layer 2 costs the most retained loss for its gain: 100 % of the rise of old" in html
    assert "loss/predicted_second" in html


def test_the_page_has_no_section_without_losses():
    assert "What did it gain and forget?" not in page(tree_of(None), figures={})
