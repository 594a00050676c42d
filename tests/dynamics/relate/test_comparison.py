"""Differences between groups beside scipy's intervals and relabellings written out."""

import re
from itertools import combinations, product

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from dynamics.relate import compare, findings_of

STEPS = [10, 20]


def grouped(first, second, pairs=True):
    """Two groups of runs, named in pairs or not."""
    a = [f"imax_s{n}" if pairs else f"i{n}x" for n in range(len(first))]
    b = [f"dmax_s{n}" if pairs else f"d{n}y" for n in range(len(second))]
    values = np.concatenate([first, second])[..., None]
    array = xr.DataArray(values, {"run": a + b, "step": STEPS, "measure": ["m"]}, ("run", "step", "measure"))
    return array, {"imax": a, "dmax": b}


def draws(seed, units):
    return np.random.default_rng(seed).standard_normal((units, 2))


def flips(difference):
    for signs in product([1, -1], repeat=len(difference)):
        yield abs(stats.ttest_1samp(difference * signs, 0).statistic)


def critical(statistics):
    """The largest statistic of which more than one in twenty are as large."""
    ordered = sorted(statistics, reverse=True)
    return ordered[int(0.05 * len(ordered))]


def test_pairs_flip_signs():
    first, second = draws(0, 7) + 0.5, draws(1, 7)
    values, groups = grouped(first, second)
    found = compare(values, groups, headline="m").isel(comparison=0, measure=0)
    difference = (first - second).mean(1)
    test = stats.ttest_1samp(difference, 0)
    interval = test.confidence_interval()
    assert found["mean_difference"].item() == pytest.approx(difference.mean())
    reach = max(interval.high - difference.mean(), critical([*flips(difference)]) * stats.sem(difference))
    ends = difference.mean() - reach, difference.mean() + reach
    assert (found["mean_low"].item(), found["mean_high"].item()) == pytest.approx(ends)
    t = list(flips(difference))
    flipped = np.mean(np.array(t) >= t[0] - 1e-9)
    assert found["mean_p_value"].item() == pytest.approx(max(flipped, test.pvalue))
    assert found["n_pairs"] == 7
    at_step = stats.ttest_1samp(first[:, 0] - second[:, 0], 0).confidence_interval()
    assert found["low"].sel(step=10).item() == pytest.approx(at_step.low)


def test_groups_without_pairs_are_relabelled():
    first, second = draws(2, 4) + 1, draws(3, 5)
    values, groups = grouped(first, second, pairs=False)
    found = compare(values, groups, headline="m").isel(comparison=0, measure=0)
    a, b = first.mean(1), second.mean(1)
    test = stats.ttest_ind(a, b, equal_var=False)
    together = np.concatenate([a, b])
    t = []
    for chosen in combinations(range(9), 4):
        rest = [place for place in range(9) if place not in chosen]
        t.append(abs(stats.ttest_ind(together[list(chosen)], together[rest], equal_var=False).statistic))
    assert found["mean_p_value"].item() == pytest.approx(max(np.mean(np.array(t) >= t[0] - 1e-9), test.pvalue))
    error = np.sqrt(a.var(ddof=1) / 4 + b.var(ddof=1) / 5)
    reach = max(test.confidence_interval().high - (a.mean() - b.mean()), critical(t) * error)
    assert found["mean_high"].item() == pytest.approx(a.mean() - b.mean() + reach)
    assert found["n_pairs"] == 0


def test_numbers_far_from_zero_keep_their_digits():
    first, second = draws(5, 5) / 24, draws(6, 5) / 24
    near, far = (
        compare(*grouped(first + origin, second + origin, pairs=False), headline="m")["mean_p_value"].item()
        for origin in (0.0, 2.0**20)
    )
    assert near == pytest.approx(far, rel=1e-6)


def test_three_pairs_cannot_be_decided():
    values, groups = grouped(draws(4, 3) + 9, draws(5, 3))
    found = compare(values, groups, headline="m", pairs={run: run[5:] for runs in groups.values() for run in runs})
    statement = found["statement"].values[0, 0]
    assert statement.startswith("3 pairs are too few to decide whether m differs between imax and dmax (smallest")
    assert "possible p: 0.25). 6 pairs can reach 0.05." in statement
    assert "interval" not in statement
    assert np.isnan(found["mean_low"]).all()
    assert not found["holds"].any()
    assert "OD507" in {finding.code for finding in findings_of(found)}


def test_a_planted_difference_of_eight_pairs_is_shown():
    values, groups = grouped(draws(6, 8) + 3, draws(7, 8))
    found = compare(values, groups, headline="m").isel(comparison=0, measure=0)
    assert found["holds"]
    assert found["mean_p_value"].item() == pytest.approx(2 / 2**8)
    assert found["statement"].item().startswith("m is higher in imax than in dmax")


def test_every_run_stands_beside_the_medians():
    first, second = draws(8, 3), draws(9, 3)
    values, groups = grouped(first, second)
    found = compare(values, groups, headline="m")
    np.testing.assert_allclose(found["group_median"].sel(group="imax").values[:, 0], np.median(first, axis=0))
    np.testing.assert_allclose(found["value"].sel(run="dmax_s1").values[:, 0], second[1])
    paired = compare(values, groups, headline="m", pairs={run: run[5:] for run in values["run"].values.tolist()})
    assert paired["run_pair"].values.tolist() == ["s0", "s1", "s2"] * 2
    assert found["run_pair"].values.tolist() == [""] * 6


def test_runs_without_partners_are_named():
    values, groups = grouped(draws(10, 7), draws(11, 6))
    found = compare(values, groups, headline="m")
    assert found["n_pairs"] == 6
    assert found.attrs["unpaired"] == ["imax_s6"]
    assert "OD511" in {finding.code for finding in findings_of(found)}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"imax": ["imax_s0"]}, "groups: expected at least two groups, got ['imax']."),
        ({"imax": ["imax_s0"], "dmax": []}, "groups: expected runs in every group, got none in 'dmax'."),
        ({"imax": ["imax_s0"], "dmax": ["x"]}, "groups: 'x' is not among the runs"),
        ({"imax": ["imax_s0"], "dmax": ["imax_s0"]}, "groups: expected each run once, got 'imax_s0' in two places."),
    ],
)
def test_what_are_no_groups_is_refused(groups, message):
    values, _ = grouped(draws(0, 2), draws(1, 2))
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(values, groups, headline="m")


def three_groups(runs, shift, named="abc"):
    values = np.random.default_rng(1).standard_normal((3 * runs, 2, 1))
    values[:runs] += shift
    groups = {group: [f"{group}_s{n}" for n in range(runs)] for group in named}
    names = [run for of in groups.values() for run in of]
    return xr.DataArray(values, {"run": names, "step": STEPS, "measure": ["m"]}, ("run", "step", "measure")), groups


@pytest.mark.parametrize(("runs", "pairs", "decidable"), [(6, True, False), (7, True, True), (4, False, False)])
def test_of_three_groups_only_what_could_be_shown_is_said_not_to_be(runs, pairs, decidable):
    values, groups = three_groups(runs, 50)
    labels = {run: run[2:] if pairs else "" for of in groups.values() for run in of} if pairs else {}
    found = compare(values, groups, headline="m", pairs=labels)
    statements = found["statement"].values[:, 0]
    assert found["decidable"].values.tolist() == [[decidable]] * 3
    assert [bool(holds) for holds in found["holds"].values[:, 0]] == [decidable, decidable, False]
    assert (found["smallest_p_adjusted"] == 3 * found["smallest_p"]).all()
    if decidable:
        assert statements[0].startswith("m is higher in a than in b")
        assert statements[2].startswith("m: no difference between b and c shown")
    else:
        assert all("too few to decide" in text and "adjusted for 3 comparisons" in text for text in statements)
        assert ("7 pairs can reach" if pairs else "4 + 5 runs can reach") in statements[0]
        assert not any("no difference" in text for text in statements)


@pytest.mark.parametrize(("runs", "groups", "paired"), [(5, 2, 0), (6, 2, 6), (6, 3, 0), (7, 3, 7)])
def test_names_pair_runs_only_where_pairs_can_decide(runs, groups, paired):
    values, named = three_groups(runs, 3)
    found = compare(values, dict(list(named.items())[:groups]), headline="m")
    assert found["n_pairs"].values.tolist() == [paired] * (1 if groups == 2 else 3)
    statement = found["statement"].values[0, 0]
    assert (f"{paired} pairs by name" if paired else f"{runs} + {runs} runs, unpaired") in statement
    assert found["holds"].values[0, 0]


@pytest.mark.parametrize("sizes", [(2, 5), (2, 8), (2, 2), (1, 9)])
def test_groups_of_fewer_than_three_runs_are_described(sizes):
    values, groups = grouped(draws(1, sizes[0]) + 50, draws(2, sizes[1]), pairs=False)
    result = compare(values, groups, headline="m")
    found = result.isel(comparison=0, measure=0)
    assert "described, not tested: whether m differs between imax and dmax is undecided" in found["statement"].item()
    for name in ("mean_p_value", "mean_p_familywise", "mean_low", "mean_high"):
        assert np.isnan(found[name])
    assert not found["decidable"]
    assert not found["holds"]
    assert {finding.code for finding in findings_of(result)} == {"OD507"}


@pytest.mark.parametrize("sizes", [(6, 6), (4, 7), (8, 8)])
@pytest.mark.parametrize("named", [True, False])
def test_the_interval_excludes_0_exactly_where_the_difference_is_shown(sizes, named):
    rng = np.random.default_rng(sum(sizes))
    one, groups = grouped(*(rng.standard_normal((size, 2)) for size in sizes), pairs=named)
    values = rng.standard_normal((sum(sizes), 2, 40)) * rng.uniform(0.3, 3, 40)
    values[: sizes[0]] += np.linspace(0, 6, 40)
    measures = xr.DataArray(values, {**one.drop_vars("measure").coords, "measure": range(40)}, one.dims)
    measures = measures.assign_coords(measure=[f"m{number}" for number in range(40)])
    found = compare(measures, groups, headline="m20", draws=999).isel(comparison=0)
    excludes = ((found["mean_low"] > 0) | (found["mean_high"] < 0)).values
    np.testing.assert_array_equal(excludes, found["holds"].values)
    deciding = found["mean_p_value"].where(found["measure"] == "m20", found["mean_p_familywise"])
    np.testing.assert_array_equal((deciding <= 0.05).values & found["decidable"].values, excludes)
    assert excludes.any()
    assert not excludes.all()


def test_only_the_headline_measure_is_decided_without_correction():
    noise = np.random.default_rng(0).standard_normal((16, 2, 40))
    one, groups = grouped(noise[:8, :, 0], noise[8:, :, 0])
    names = [f"m{number}" for number in range(40)]
    values = xr.DataArray(noise, {**one.drop_vars("measure").coords, "measure": names}, one.dims)
    found = compare(values, groups, headline="m0").isel(comparison=0)
    chance = (found["mean_p_value"] <= 0.05) & (found["mean_p_familywise"] > 0.05)
    lucky = found["measure"].values[chance.values & (found["measure"].values != "m0")][0]
    assert not found["holds"].sel(measure=lucky)
    assert compare(values, groups, headline=lucky).isel(comparison=0)["holds"].sel(measure=lucky)
