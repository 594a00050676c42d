import re

import numpy as np
import pytest

from dynamics.fisher import fisher_measures
from dynamics.schema import FISHER, FISHER_RECORD
from probes import ProbeGram
from tests.dynamics.fisher.simulated import gradients, grams, planted, power_law, probe_gram


@pytest.fixture(scope="module")
def found():
    rows = gradients(np.random.default_rng(0), 2, 24, power_law(40))
    blocks = {"a": grams(rows[0]), "b": grams(rows[1]), "global": grams(rows[0]) + grams(rows[1])}
    return fisher_measures(ProbeGram(blocks, tasks=["x", "y", "y"] * 8, groups=np.arange(24) // 3))


def test_every_variable_says_what_it_is(found):
    assert set(found) == set(FISHER) - set(FISHER_RECORD)
    for name, variable in found.items():
        assert ("step", *variable.dims) == FISHER[name].dims
        assert variable.dtype == np.float64
        assert {"units", "long_name", "definition"} <= set(variable.attrs), name


def test_tasks_include_all_and_their_spectra_are_padded(found):
    assert found["task"].values.tolist() == ["all", "x", "y"]
    assert found["samples"].values.tolist() == [24, 8, 16]
    assert found["groups"].values.tolist() == [8, 8, 8]
    assert np.isfinite(found["eigenvalue"].sel(task="x")).sum("index").values.tolist() == [8, 8, 8]


def test_a_task_is_measured_as_if_it_were_alone(found):
    own = np.flatnonzero(np.array(["x", "y", "y"] * 8) == "x")
    gram = grams(gradients(np.random.default_rng(0), 2, 24, power_law(40))[0])[np.ix_(own, own)]
    alone = fisher_measures(probe_gram(gram, groups=np.arange(24)[own] // 3)).isel(block=0).sel(task="all")
    for name in ("spectral_entropy", "ln_participation_ratio_low", "dominant_ratio_high", "spectral_entropy_centred"):
        assert found[name].sel(block="a", task="x").item() == pytest.approx(alone[name].item(), rel=1e-10), name


def test_intervals_hold_their_number(found):
    for name in ("dominant_ratio", "spectral_entropy", "ln_participation_ratio", "participation_ratio"):
        assert (found[f"{name}_low"] < found[name]).all(), name
        assert (found[f"{name}_high"] > found[name]).all(), name


def test_entropy_is_at_least_the_log_of_the_participation_ratio(found):
    plug_in = np.log(found["participation_ratio_plug_in"])
    assert (found["spectral_entropy"] >= plug_in - 1e-12).all()


def test_block_diagonal_takes_the_parts_and_not_the_whole(found):
    values = found["eigenvalue"].sel(block=["a", "b"], task="all").values.ravel()
    share = values / values.sum()
    expected = -(share * np.log(share)).sum()
    assert found["spectral_entropy_block_diagonal"].sel(task="all").item() == pytest.approx(expected, rel=1e-10)
    assert np.isnan(fisher_measures(probe_gram(np.eye(3)))["spectral_entropy_block_diagonal"]).all()


def test_planted_spectrum():
    gram = probe_gram({"w": grams(planted(np.array([3.0, 1.0]), 6, 4))}, dimension=4)
    found = fisher_measures(gram).sel(block="w", task="all")
    assert found["eigenvalue"].values[:2] == pytest.approx([3.0, 1.0])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert found["spectral_entropy_normalised"].item() == pytest.approx(entropy / np.log(4))


def test_zero_and_broken_blocks_are_missing_and_the_others_are_not():
    broken = np.eye(6)
    broken[0, 0] = np.nan
    blocks = {"zero": np.zeros((6, 6)), "broken": broken, "fine": np.eye(6) + 1}
    found = fisher_measures(ProbeGram(blocks)).sel(task="all")
    names = ["spectral_entropy", "dominant_ratio", "ln_participation_ratio", "rarefied_spectral_entropy"]
    for name in names:
        assert np.isnan(found[name].sel(block=["zero", "broken"])).all(), name
        assert np.isfinite(found[name].sel(block="fine")).all(), name
    assert found["trace"].sel(block="zero").item() == 0
    assert np.isnan(found["trace"].sel(block="broken"))


@pytest.mark.parametrize("samples", [1, 2])
def test_one_sample_and_one_group_have_no_intervals(samples):
    found = fisher_measures(probe_gram(np.ones((samples, samples)), groups=["one"] * samples)).isel(block=0, task=0)
    assert found["spectral_entropy"].item() == 0
    assert found["dominant_ratio"].item() == 1
    for name in ("spectral_entropy_low", "dominant_ratio_low", "ln_participation_ratio", "eigenvalue_low"):
        assert np.isnan(found[name]).all(), name


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=re.escape("Expected one task for each of 3 samples")):
        fisher_measures(probe_gram(np.eye(3), tasks=["x"]))
    with pytest.raises(ValueError, match=re.escape("Expected one group for each of 3 samples")):
        fisher_measures(probe_gram(np.eye(3), groups=["x"]))


def test_the_seed_repeats_it():
    gram = probe_gram(grams(gradients(np.random.default_rng(1), 1, 12, power_law(9))[0]))
    assert fisher_measures(gram, seed=3).identical(fisher_measures(gram, seed=3))
