"""Associations beside slow twins: every permutation written out, scipy, and cases that cannot be decided."""

import re
from itertools import permutations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from dynamics.relate import associate, association_notes

RUNS = [f"r{number}" for number in range(5)]
STEPS = [10, 20, 30, 40]


def measures(values, names=("m",), runs=RUNS, steps=STEPS):
    values = np.asarray(values, dtype=float).reshape(len(runs), len(steps), len(names))
    return xr.DataArray(
        values, {"run": list(runs), "step": list(steps), "measure": list(names)}, ("run", "step", "measure")
    )


def scores(values, names=("t/accuracy",), runs=RUNS, steps=STEPS):
    return measures(values, names, runs, steps).rename(measure="task")


def draws(seed, shape=(5, 4)):
    return np.random.default_rng(seed).standard_normal(shape)


def demeaned(values):
    return values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()


def correlation(x, y):
    a, b = demeaned(x), demeaned(y)
    return (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())


def test_over_steps_every_permutation_of_whole_runs():
    x, y = draws(0), draws(1)
    found = associate(measures(x), scores(y), headline="m").isel(measure=0, task=0)
    observed = correlation(x, y)
    null = [correlation(x, y[list(order)]) for order in permutations(range(5))]
    assert found["coefficient"].item() == pytest.approx(observed)
    assert found["p_value"].item() == pytest.approx(np.mean(np.abs(null) >= abs(observed) - 1e-12))
    assert found["n_runs"] == 5
    assert found["n_steps"] == 4


def test_a_trend_that_all_runs_share_and_a_level_of_each_run_do_not_count():
    x, y = draws(0), draws(1)
    shifted = x + 100 * np.arange(4) + 50 * np.arange(5)[:, None]
    one, other = (associate(measures(values), scores(y), headline="m") for values in (x, shifted))
    np.testing.assert_allclose(one["coefficient"], other["coefficient"])
    np.testing.assert_allclose(one["p_value"], other["p_value"])


def test_familywise_p_is_that_of_the_largest_correlation_of_each_permutation():
    x, y = draws(2, (5, 4, 3)), draws(3, (5, 4, 2))
    found = associate(measures(x, "abc"), scores(y, ("s/accuracy", "t/accuracy")), headline="a")
    tasks = [task for task in found["task"].values if task != "all"]
    turned = {"s/accuracy": y[..., 0], "t/accuracy": y[..., 1]}
    standard = [(value - value.mean()) / value.std() for value in turned.values()]
    turned["all"] = np.mean(standard, axis=0)
    every = list(found["task"].values)
    null = np.array(
        [
            [[abs(correlation(x[..., m], turned[t][list(order)])) for t in every] for m in range(3)]
            for order in permutations(range(5))
        ]
    )
    largest = null.max((1, 2))
    for m, t in ((m, t) for m in range(3) for t in range(len(every))):
        expected = np.mean(largest >= null[0, m, t] - 1e-12)
        assert found["p_familywise"].values[m, t] == pytest.approx(expected)
    assert len(tasks) == 2
    known = found["p_value"].values.ravel()
    np.testing.assert_allclose(found["q_value"].values.ravel(), stats.false_discovery_control(known))


@pytest.mark.parametrize("coefficient", ["spearman", "pearson"])
def test_between_runs_is_scipys(coefficient):
    x, y = draws(4, (5, 1)), draws(5, (5, 1))
    given = measures(x, steps=[40]), scores(y, steps=[40])
    found = associate(*given, headline="m", coefficient=coefficient).isel(measure=0, task=0)
    function = stats.spearmanr if coefficient == "spearman" else stats.pearsonr
    assert found["coefficient"].item() == pytest.approx(function(x[:, 0], y[:, 0]).statistic)
    null = [abs(function(x[:, 0], y[list(order), 0]).statistic) for order in permutations(range(5))]
    assert found["p_value"].item() == pytest.approx(np.mean(np.array(null) >= null[0] - 1e-12))


@pytest.mark.parametrize(("runs", "smallest"), [(2, 1.0), (3, 1 / 3)])
def test_too_few_runs_are_not_decided(runs, smallest):
    x, y = draws(6, (runs, 4)), draws(7, (runs, 4))
    found = associate(measures(x, runs=RUNS[:runs]), scores(y, runs=RUNS[:runs]), headline="m").isel(measure=0, task=0)
    assert found["smallest_p"].item() >= smallest / 2
    assert not found["decidable"]
    assert not found["holds"]
    assert f"cannot be decided with n = {runs}; the smallest possible p is" in found["statement"].item()


def test_one_run_is_described_without_a_p_value():
    steps = list(range(10, 210, 10))
    x, y = draws(8, (1, 20)), draws(9, (1, 20))
    found = associate(measures(x, runs=["r"], steps=steps), scores(y, runs=["r"], steps=steps), headline="m")
    assert found.attrs["question"] == "one_run"
    assert np.isnan(found["p_value"]).all()
    assert "no p-value is given for one run" in found["statement"].values[0, 0]
    assert found["effective_steps"].values[0, 0] <= 20


def test_scores_that_are_better_when_lower_are_turned():
    x, y = draws(10), draws(11)
    up, down = (associate(measures(x), scores(y, (name,)), headline="m") for name in ("t/accuracy", "t/loss"))
    np.testing.assert_allclose(up["coefficient"], -down["coefficient"])
    assert down["direction"].item() == -1


def test_what_is_missing_is_left_out_and_said():
    x, y = draws(12), draws(13)
    x[0] = np.nan
    y[1, 2] = np.nan
    found = associate(measures(x), scores(y), headline="m").isel(measure=0, task=0)
    kept = np.ix_([1, 2, 3, 4], [0, 1, 3])
    assert found["coefficient"].item() == pytest.approx(correlation(x[kept], y[kept]))
    assert (found["n_runs"], found["n_steps"]) == (4, 3)


def test_a_constant_measure_has_a_reason():
    found = associate(measures(np.ones((5, 4))), scores(draws(14)), headline="m").isel(measure=0, task=0)
    assert np.isnan(found["coefficient"])
    assert found["reason"].item() == "one of the two does not vary"
    assert found["statement"].item().startswith("Nothing can be said of m")


def test_repeats_and_left_out_runs_are_noted():
    names = ["a_s1", "a_s2", "b_s1", "b_s2", "c"]
    found = associate(measures(draws(15), runs=names), scores(draws(16)[:4], runs=names[:4]), headline="m")
    assert {"OD508", "OD509"} <= {finding.code for finding in association_notes(found)}


def test_clusters_are_the_units():
    clusters = {name: "ab"[number % 2] for number, name in enumerate(RUNS)}
    found = associate(measures(draws(17)), scores(draws(18)), headline="m", clusters=clusters).isel(measure=0, task=0)
    assert found["n_units"] == 2
    assert not found["decidable"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"headline": "n"}, "headline: expected one of the measures 'm', got 'n'."),
        ({"question": "one_run"}, "question 'one_run': expected one run, got 5."),
        ({"clusters": {"r0": "a"}}, "clusters: expected a cluster for every run, got none for 'r1'"),
        ({"directions": {"t/accuracy": "up"}}, "expected 'higher' or 'lower'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        associate(measures(draws(0)), scores(draws(1)), **({"headline": "m"} | changes))


def test_no_common_run_is_refused():
    with pytest.raises(ValueError, match="Expected runs that have both measures and scores"):
        associate(measures(draws(0)), scores(draws(1), runs=[f"x{n}" for n in range(5)]), headline="m")


def test_only_the_headline_pair_is_decided_without_correction():
    runs, names = [f"r{number}" for number in range(8)], [f"m{number}" for number in range(40)]
    x, y = draws(2, (8, 4, 40)), draws(3, (8, 4))
    given, told = measures(x, names, runs), scores(y, runs=runs)
    found = associate(given, told, headline="m0").isel(task=0)
    chance = (found["p_value"] <= 0.05) & (found["p_familywise"] > 0.05)
    lucky = found["measure"].values[chance.values & (found["measure"].values != "m0")][0]
    assert not found["holds"].sel(measure=lucky)
    assert associate(given, told, headline=lucky).isel(task=0)["holds"].sel(measure=lucky)
