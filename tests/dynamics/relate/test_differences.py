"""Differences of groups beside scipy and every relabelling written out, and what few, constant or missing runs give."""

from itertools import combinations, product

import numpy as np
import pytest
import xarray as xr
from scipy import stats
from scipy.special import gamma

from dynamics.relate import compare
from dynamics.relate.differences import relabelled_difference

STEPS = (10, 20, 30)
MEASURES = ("m", "n")


def grouped(first, second, **options):
    """Compare two groups of runs: values ``[run, step, measure]``, paired by their place where asked for."""
    runs = [f"a{number}" for number in range(len(first))], [f"b{number}" for number in range(len(second))]
    values = np.concatenate([first, second]).astype(float)
    coords = {"run": [*runs[0], *runs[1]], "step": list(STEPS), "measure": list(MEASURES)}
    array = xr.DataArray(values, coords, ("run", "step", "measure"))
    paired = options.pop("paired")
    pairs = {run: run[1:] for run in array["run"].values.tolist()} if paired else {}
    found = compare(array, {"a": runs[0], "b": runs[1]}, pairs=pairs, headline="m", **options)
    return found.isel(comparison=0)


def draws(seed, units, spread=1.0, shift=0.0):
    return shift + spread * np.random.default_rng(seed).standard_normal((units, len(STEPS), len(MEASURES)))


def hedges(freedom):
    """Slow twin of the correction of a standardised difference of few units."""
    return gamma(freedom / 2) / (np.sqrt(freedom / 2) * gamma((freedom - 1) / 2))


def relabelled(first, second, paired):
    """Slow twin: |t| of each column under every relabelling, the observed one first."""
    if paired:
        for signs in product([1, -1], repeat=len(first)):
            yield np.abs(stats.ttest_1samp((first - second) * np.array(signs)[:, None], 0).statistic)
        return
    together = np.concatenate([first, second])
    for chosen in combinations(range(len(together)), len(first)):
        rest = [place for place in range(len(together)) if place not in chosen]
        yield np.abs(stats.ttest_ind(together[list(chosen)], together[rest], equal_var=False).statistic)


def students(first, second, paired):
    return stats.ttest_rel(first, second) if paired else stats.ttest_ind(first, second, equal_var=False)


CASES = [(5, 5, True), (7, 7, True), (3, 4, False), (4, 5, False)]


@pytest.mark.parametrize(("count", "other", "paired"), CASES)
def test_each_step_has_scipys_difference_interval_and_effect_size(count, other, paired):
    first, second = draws(count, count, 2, 0.5), draws(other + 100, other)
    found = grouped(first, second, paired=paired).transpose("step", "measure", ...)
    interval = students(first, second, paired).confidence_interval(0.95)
    np.testing.assert_allclose(found["difference"], first.mean(0) - second.mean(0))
    np.testing.assert_allclose(found["low"], interval.low)
    np.testing.assert_allclose(found["high"], interval.high)
    if paired:
        spread, freedom = (first - second).std(0, ddof=1), count - 1
    else:
        freedom = count + other - 2
        squares = (count - 1) * first.var(0, ddof=1) + (other - 1) * second.var(0, ddof=1)
        spread = np.sqrt(squares / freedom)
    np.testing.assert_allclose(found["effect_size"], found["difference"] / spread * hedges(freedom))


@pytest.mark.parametrize(("count", "other", "paired"), CASES)
def test_each_step_has_the_larger_p_value_of_every_relabelling_and_student(count, other, paired):
    first, second = draws(count, count, 2, 0.5), draws(other + 100, other)
    found = grouped(first, second, paired=paired).transpose("step", "measure", ...)
    columns = [values.reshape(len(values), -1) for values in (first, second)]
    null = np.stack(list(relabelled(*columns, paired))) + 1e-9
    observed = null[0] - 2e-9
    student = students(*columns, paired).pvalue
    alone = np.maximum((null >= observed).mean(0), student)
    together = np.maximum((null.max(1)[:, None] >= observed).mean(0), student)
    np.testing.assert_allclose(found["p_value"].values.ravel(), alone)
    np.testing.assert_allclose(found["p_familywise"].values.ravel(), together)


@pytest.mark.parametrize(("count", "other", "paired"), CASES)
def test_means_over_steps_are_adjusted_over_measures(count, other, paired):
    first, second = draws(count, count, 2, 0.5), draws(other + 100, other)
    found = grouped(first, second, paired=paired)
    means = first.mean(1), second.mean(1)
    null = np.stack(list(relabelled(*means, paired))) + 1e-9
    observed = null[0] - 2e-9
    test = students(*means, paired)
    np.testing.assert_allclose(found["mean_p_value"], np.maximum((null >= observed).mean(0), test.pvalue))
    fewest = 2 * stats.t.sf(np.abs(test.statistic), min(count, other) - 1)
    tail = test.pvalue if paired else np.minimum(1, len(MEASURES) * fewest)
    together = (null.max(1)[:, None] >= observed).mean(0)
    np.testing.assert_allclose(found["mean_p_familywise"], np.maximum(together, tail))
    np.testing.assert_allclose(found["mean_q_value"], stats.false_discovery_control(found["mean_p_value"]))


@pytest.mark.parametrize("paired", [True, False])
def test_groups_exchanged_only_turn_the_sign(paired):
    first, second = draws(0, 5, 2, 1), draws(1, 5)
    there, back = grouped(first, second, paired=paired), grouped(second, first, paired=paired)
    for name in ("difference", "effect_size", "mean_difference", "mean_effect_size"):
        np.testing.assert_allclose(there[name], -back[name])
    np.testing.assert_allclose(there["low"], -back["high"])
    for name in ("p_value", "p_familywise", "mean_p_value", "mean_p_familywise", "smallest_p"):
        np.testing.assert_allclose(there[name], back[name])


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_units_of_a_measure_change_no_p_value_and_no_effect_size(paired, scale):
    first, second = draws(2, 6, 1, 0.7), draws(3, 6)
    plain, scaled = grouped(first, second, paired=paired), grouped(first * scale, second * scale, paired=paired)
    for name in ("p_value", "p_familywise", "mean_p_value", "mean_p_familywise", "effect_size"):
        np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-6)
    np.testing.assert_allclose(scaled["low"], plain["low"] * scale, rtol=1e-6)


def test_what_runs_of_a_pair_share_does_not_count():
    first, second = draws(4, 6), draws(5, 6)
    shared = 50 * np.arange(6.0)[:, None, None]
    paired, moved = (grouped(first + level, second + level, paired=True) for level in (0, shared))
    np.testing.assert_allclose(moved["low"], paired["low"])
    unpaired = grouped(first + shared, second + shared, paired=False)
    assert (unpaired["high"] - unpaired["low"] > 10 * (paired["high"] - paired["low"])).all()


@pytest.mark.parametrize(("units", "paired", "smallest"), [(2, True, 2 / 4), (3, True, 2 / 8), (3, False, 2 / 20)])
def test_few_runs_cannot_be_decided_however_far_they_are_apart(units, paired, smallest):
    found = grouped(draws(6, units, 1, 100), draws(7, units), paired=paired)
    np.testing.assert_allclose(found["smallest_p"], smallest)
    assert not found["decidable"].any()
    assert not found["holds"].any()
    assert np.isnan(found["mean_low"]).all()
    assert (found["mean_p_value"] >= smallest - 1e-12).all()


def test_one_pair_has_a_difference_and_nothing_else():
    first, second = draws(8, 1), draws(9, 1)
    labels = {"a0": "0", "b0": "0"}
    coords = {"run": ["a0", "b0"], "step": list(STEPS), "measure": list(MEASURES)}
    array = xr.DataArray(np.concatenate([first, second]), coords, ("run", "step", "measure"))
    found = compare(array, {"a": ["a0"], "b": ["b0"]}, pairs=labels, headline="m").isel(comparison=0)
    np.testing.assert_allclose(found["difference"].transpose("step", "measure"), first[0] - second[0])
    for name in ("low", "high", "effect_size", "mean_error", "mean_effect_size"):
        assert np.isnan(found[name]).all(), name
    assert not found["holds"].any()


def test_equal_groups_differ_by_nothing_with_p_1():
    values = draws(10, 6)
    found = grouped(values, values, paired=True)
    assert (found["difference"] == 0).all()
    assert (found["mean_p_value"] == 1).all()
    assert np.isnan(found["effect_size"]).all()
    assert not found["holds"].any()


@pytest.mark.parametrize("paired", [True, False])
def test_a_difference_without_any_spread_is_as_significant_as_the_runs_allow(paired):
    first, second = (np.full((6, len(STEPS), len(MEASURES)), value) for value in (3.0, 1.0))
    found = grouped(first, second, paired=paired)
    np.testing.assert_allclose(found["mean_p_value"], 2 / 2**6 if paired else 2 / 924)
    np.testing.assert_array_equal(found["mean_difference"], 2)
    np.testing.assert_allclose(found["mean_low"], 2, rtol=1e-6)
    assert np.isnan(found["mean_effect_size"]).all()
    assert found["holds"].all()


def test_rounding_is_no_spread():
    first = np.full((6, len(STEPS), len(MEASURES)), 0.1) * (1 + 1e-15 * np.arange(6)[:, None, None])
    found = grouped(first, np.full_like(first, 0.1), paired=False)
    assert np.isnan(found["effect_size"]).all()
    assert not found["holds"].any()


@pytest.mark.parametrize("paired", [True, False])
def test_a_step_that_one_run_lacks_does_not_count(paired):
    first, second = draws(11, 6, 1, 1), draws(12, 6)
    complete = grouped(first, second, paired=paired)
    first[2, 1, 0] = np.nan
    found = grouped(first, second, paired=paired)
    lacking = found.sel(step=20, measure="m")
    for name in ("difference", "low", "high", "effect_size", "p_value", "p_familywise"):
        assert np.isnan(lacking[name]), name
    assert found["n_steps"].values.tolist() == [2, 3]
    kept = [0, 2]
    expected = first[:, kept, 0].mean() - second[:, kept, 0].mean()
    np.testing.assert_allclose(found["mean_difference"].sel(measure="m"), expected)
    np.testing.assert_array_equal(found["p_value"].sel(measure="n"), complete["p_value"].sel(measure="n"))
    np.testing.assert_array_equal(
        found["mean_difference"].sel(measure="n"), complete["mean_difference"].sel(measure="n")
    )


def test_a_measure_that_one_run_lacks_altogether_takes_no_part_in_the_correction():
    first, second = draws(13, 7, 1, 1), draws(14, 7)
    first[2, :, 1] = np.nan
    found = grouped(first, second, paired=True)
    for name in ("mean_difference", "mean_low", "mean_p_value", "mean_p_familywise", "mean_q_value", "smallest_p"):
        assert np.isnan(found[name].sel(measure="n")), name
    assert not found["holds"].sel(measure="n")
    assert found["n_steps"].sel(measure="n") == 0
    alone = found.sel(measure="m")
    np.testing.assert_allclose(alone["mean_p_familywise"], alone["mean_p_value"])
    np.testing.assert_allclose(alone["mean_q_value"], alone["mean_p_value"])


def test_an_infinite_value_counts_as_missing():
    first, second = draws(15, 6), draws(16, 6)
    missing, infinite = first.copy(), first.copy()
    missing[0, 0, 0], infinite[0, 0, 0] = np.nan, np.inf
    one, other = (grouped(values, second, paired=True) for values in (missing, infinite))
    for name in ("difference", "p_value", "mean_difference", "mean_p_familywise", "n_steps"):
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("apart", [300, 1e3, 1e4])
def test_groups_however_far_apart_tie_with_their_exchange(apart):
    rng = np.random.default_rng(0)
    first, second = apart + rng.standard_normal((3, 1000)), rng.standard_normal((3, 1000))
    together = relabelled_difference(first, second, pairs=False)[1].p_value
    alone = [
        relabelled_difference(*sides, pairs=False)[1].p_value for sides in zip(first.T[:50], second.T[:50], strict=True)
    ]
    np.testing.assert_array_equal(together, 0.1)  # two of the twenty splits of 3 + 3 runs
    np.testing.assert_array_equal(alone, 0.1)


@pytest.mark.parametrize(("units", "paired"), [(14, True), (8, False)])
def test_random_relabellings_come_close_to_all_of_them_and_are_repeatable(units, paired):
    first, second = draws(17, units, 1, 0.4), draws(18, units)
    found, again, other = (grouped(first, second, paired=paired, draws=3999, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(found["p_familywise"], again["p_familywise"])
    assert not np.array_equal(found["p_familywise"], other["p_familywise"])
    rows = [values.mean(1)[:, 0] for values in (first, second)]
    if paired:
        null = np.array(list(product([1, -1], repeat=units))) @ (rows[0] - rows[1])
    else:
        chosen = np.array(list(combinations(range(2 * units), units)))
        null = np.concatenate(rows)[chosen].sum(1) - np.concatenate(rows).sum() / 2
    exact = (np.abs(null) >= np.abs(null[0]) - 1e-9).mean()
    error = np.sqrt(exact * (1 - exact) / 4000)
    student = students(*rows, paired).pvalue
    assert found["mean_p_value"].sel(measure="m").item() == pytest.approx(max(exact, student), abs=5 * error)


def test_measures_in_parts_are_one_family(monkeypatch):
    first, second = draws(19, 6, 1, 0.5), draws(20, 6)
    whole = grouped(first, second, paired=True)
    monkeypatch.setattr("dynamics.relate.differences._AT_ONCE", 1)
    parts = grouped(first, second, paired=True)
    for name in ("difference", "low", "p_value", "p_familywise", "mean_p_familywise"):
        np.testing.assert_array_equal(whole[name], parts[name])


def test_runs_of_one_group_with_one_label_are_averaged():
    values = draws(21, 14, 1, 0.0)
    runs = [f"{group}{pair}{seed}" for group in "ab" for pair in "xyz" for seed in range(2)] + ["aw0", "bw0"]
    array = xr.DataArray(
        values, {"run": runs, "step": list(STEPS), "measure": list(MEASURES)}, ("run", "step", "measure")
    )
    groups = {group: [run for run in runs if run[0] == group] for group in "ab"}
    found = compare(array, groups, pairs={run: run[1] for run in runs}, headline="m").isel(comparison=0)
    means = {
        group: np.stack([array.sel(run=[r for r in groups[group] if r[1] == pair]).mean("run") for pair in "wxyz"])
        for group in "ab"
    }
    assert (found["n_pairs"].item(), found["n_first"].item()) == (4, 4)
    interval = stats.ttest_rel(means["a"], means["b"]).confidence_interval(0.95)
    np.testing.assert_allclose(found["difference"].transpose("step", "measure"), (means["a"] - means["b"]).mean(0))
    np.testing.assert_allclose(found["low"].transpose("step", "measure"), interval.low)
