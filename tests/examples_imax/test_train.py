"""Units are trained from one base, rerun to the same numbers, and go on to the three stages."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr

pytest.importorskip("peft")

import dynamics
from examples.imax import stages
from examples.imax.data import arm
from examples.imax.model import new_model
from examples.imax.summary import MEAN, add_mean_score, cluster_rows, pseudo_rows, row, score_rows, stage_rows
from examples.imax.tasks import TASKS
from examples.imax.train import Size, unit
from tests.records import records_of

TINY = Size(images=10, batch=15, captures=1, probes=7, scored=7, own=20)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A base that was taught nothing, a unit that goes on from it, and a strategy that goes on from that."""
    out = tmp_path_factory.mktemp("study")
    model = new_model(width=32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # a new model says one word for ever
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(out / "base")
    unit("dmax-plain", 0, out / "base", out / "dmax-plain-0", TINY)
    stages.unit("three-stage", 0, out / "base", out / "dmax-plain-0", out / "three-stage-0", TINY)
    return out


def test_a_unit_reruns_to_the_same_numbers(study, tmp_path):
    again = unit("dmax-plain", 0, study / "base", tmp_path / "again", TINY)
    before = json.loads((study / "dmax-plain-0" / "scores.json").read_text())
    for key in ("scores", "own_fisher", "card"):
        assert json.dumps(again[key]) == json.dumps(before[key])  # NaN is NaN
    one, other = (records_of(run).records for run in (study / "dmax-plain-0", tmp_path / "again"))
    assert list(one) == list(other) == TINY.captured(TINY.steps)
    for step, groups in one.items():
        xr.testing.assert_identical(groups["fisher"], other[step]["fisher"])


def test_a_row_holds_the_last_step_of_a_recorded_unit(study):
    tree = dynamics.open_run(study / "dmax-plain-0")
    found, fisher = row(study, "dmax-plain", 0, tree), tree["fisher"].to_dataset()
    add_mean_score([found])
    assert fisher["evaluated_at_step"].values.tolist() == [0, TINY.steps - 1]
    assert found["step"] == TINY.steps
    last = fisher["spectral_entropy"].isel(step=-1).sel(block="global", task="all").item()
    assert found["spectral_entropy"] == pytest.approx(last)
    assert found[MEAN] == 0  # of one unit


def test_scores_are_as_the_analysis_reads_them(study):
    rows = score_rows(study, [("dmax-plain", 0)])
    assert [each["task"] for each in rows] == list(TASKS)
    assert {each["step"] for each in rows} == {TINY.steps}


def test_the_own_fisher_counts_images(study):
    counted = {each["counted"]: each for each in cluster_rows(study, [("dmax-plain", 0)])}
    entries = sorted(arm("dmax-plain", TINY.images, 0).entries, key=lambda entry: entry.image)[: TINY.own]
    assert counted["by_entries"]["independent"] == TINY.own
    assert counted["by_images"]["independent"] == len({entry.image for entry in entries})
    assert counted["by_entries"]["spectral_entropy"] == counted["by_images"]["spectral_entropy"]


def test_half_of_each_tasks_answers_are_kept(study):
    rows = pseudo_rows(study, [0])
    assert [each["task"] for each in rows] == list(TASKS)
    assert all(each["kept"] <= round(stages.KEPT * each["asked"]) for each in rows)
    assert sum(each["kept"] for each in rows) > 0
    assert [each["strategy"] for each in stage_rows(study, ["three-stage"], [0])] == ["dmax-plain", "three-stage"]


def test_nothing_that_is_asked_presupposes_a_finding():
    data = arm("dmax-plain", 10, 0)
    lungs, zones = np.array([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]), np.array([0, 2])
    asked = [
        {question for task in TASKS for question, _ in stages.open_questions(task, data, image, lungs, zones)}
        for image in range(len(data.truth))
    ]
    assert all(each == asked[0] for each in asked)
    assert len(asked[0]) == 18


def test_an_unknown_strategy_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^Expected one of three-stage, dmax-long, got 'four-stage'\.$"):
        stages.unit("four-stage", 0, tmp_path, tmp_path, tmp_path)


def test_the_own_fishers_entropy_of_16_is_missing_where_there_are_fewer_images(study):
    assert np.isnan(cluster_rows(study, [("dmax-plain", 0)])[1]["spectral_entropy_of_16"])
