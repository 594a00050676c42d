"""Findings about spectra: each says of how many matrices it holds, and none is said twice."""

import numpy as np
import pytest

from dynamics.spectra import findings
from dynamics.spectra.findings import findings_of
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


def test_an_unused_rank_is_one_of_which_half_holds_the_energy(update):
    update["suggested_rank"].values[:] = update["adapter_rank"].values
    assert "OD206" not in [finding.code for finding in findings_of(update)]
    update["suggested_rank"].values[0] = update["adapter_rank"].values[0] // 2
    assert "1 of 4 matrices" in only(update, "OD206").message
