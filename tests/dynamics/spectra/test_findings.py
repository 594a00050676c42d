"""Findings about spectra: each says of how many matrices it holds, and none is said twice."""

import numpy as np
import pytest
import xarray as xr

from dynamics.spectra import findings
from dynamics.spectra.findings import base_findings, findings_of
from tests.trees import example_tree


@pytest.fixture
def update():
    return example_tree(steps=3, matrices=4)["update"].to_dataset().copy(deep=True)


def only(update, code):
    (finding,) = [finding for finding in findings_of(update) if finding.code == code]
    return finding


def test_zero_updates_are_named_by_step(update):
    update["is_zero"].loc[{"kind": "total", "step": 200}] = True
    finding = only(update, "OD202")
    assert (finding.step, finding.matrix) == (200, "")
    assert finding.message.startswith("At step 200 the update of every matrix is exactly zero")
    assert finding.evidence["matrices"] == 4


def test_one_zero_update_is_named(update):
    name = update["matrix"].values[1]
    update["is_zero"].loc[{"kind": "total", "step": 200, "matrix": name}] = True
    finding = only(update, "OD202")
    assert finding.matrix == name
    assert "1 of 4 matrices" in finding.message


@pytest.mark.parametrize(("first", "steps"), [([100], "step 100"), ([100, 300], "steps 100 and 300")])
def test_first_checkpoints_are_listed(update, first, steps):
    update["from_step"].values[:] = [-1 if step in first else step - 100 for step in (100, 200, 300)]
    assert only(update, "OD204").message == f"The first checkpoint of a training has no increment: {steps}."


def test_weights_before_the_first_checkpoint_are_not_called_one(update):
    """From a base at step 0, matrices that it does not have get no increment."""
    update["from_step"].values[:] = [0, 100, 200]
    update["count"].loc[{"kind": "increment"}] = 8
    update["count"].loc[{"step": 100, "kind": "increment", "matrix": update["matrix"].values[:2]}] = 0
    finding = only(update, "OD204")
    assert finding.evidence["matrices"] == 2
    assert finding.message == (
        "At step 100 the increment of 2 of 4 matrices is unknown, and so is that of all matrices together: the weights "
        "before it, of step 0, do not include them."
    )


@pytest.mark.parametrize(("factor", "count"), [(0.99, 0), (1.01, 1)])
def test_an_absurd_size_is_one_beyond_the_threshold(update, factor, count):
    norm = factor * findings.ABSURD * np.sqrt(256 * 128)
    update["frobenius_norm"].values[2, 0, 0] = norm
    assert [finding.code for finding in findings_of(update)].count("OD141") == count


def test_rounding_is_told_once_a_kind(update):
    update["quantisation_limited"].values[1:, 1] = True
    update["quantisation_noise_share"].values[1:, 1] = 0.5
    finding = only(update, "OD203")
    assert finding.evidence == {"kind": "increment", "cells": 8, "threshold": 0.1, "largest_share": 0.5}


def test_no_more_than_a_few_names_are_listed():
    update = example_tree(steps=1, matrices=20)["update"].to_dataset().copy(deep=True)
    update["is_zero"].loc[{"kind": "total"}] = True
    evidence = only(update, "OD202").evidence
    assert (evidence["matrices"], len(evidence["names"])) == (20, findings.NAMED)


def beside_base(lost, changed, size=0.1):
    names = [f"layers.{number}.w" for number in range(len(lost))]
    return xr.Dataset(
        {
            "relative_size": (("step", "matrix"), np.full((1, len(lost)), size)),
            "lost_in_merge": ("matrix", lost),
            "changed_share": ("matrix", changed),
        },
        coords={"matrix": names},
    )


def test_an_update_that_merging_rounds_away_is_warned_of():
    (finding,) = base_findings(beside_base([0.9, 0.1, np.nan], [0.1, 0.9, 0.5]))
    assert (finding.code, finding.matrix, finding.evidence["largest_share"]) == ("OD211", "layers.0.w", 0.9)
    assert "the update of 1 of 2 matrices" in finding.message


@pytest.mark.parametrize(("size", "but"), [(0.0, "equal those of the base: "), (1e-3, "but for rounding")])
def test_weights_that_equal_their_base_are_warned_of(size, but):
    (finding,) = base_findings(beside_base([np.nan, np.nan], [0.0, 0.0], size))
    assert finding.code == "OD212"
    assert but in finding.message


def test_one_trained_weight_is_enough():
    assert base_findings(beside_base([np.nan, np.nan], [0.0, 0.2])) == []


def test_results_of_earlier_versions_have_no_such_findings():
    assert base_findings(xr.Dataset({"relative_size": (("step", "matrix"), np.ones((1, 2)))})) == []
