"""Associations beside slow twins: every permutation written out, scipy, and cases that cannot be decided."""

import re
from itertools import permutations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from dynamics.relate import associate, findings_of

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


def studentised(x, y):
    """Mean share of a run in the correlation over its standard error."""
    a, b = demeaned(x), demeaned(y)
    shares = (a * b).sum(1) / np.sqrt((a**2).sum() * (b**2).sum())
    return abs(shares.mean() / (shares.std(ddof=1) / np.sqrt(len(shares))))


def jackknifed(x, y):
    """p-value of the jackknife over runs, each left out and the others demeaned anew."""
    runs = len(x)
    rest = [np.arange(runs) != run for run in range(runs)]
    without = np.arctanh([correlation(x[keep], y[keep]) for keep in rest])
    error = np.sqrt((runs - 1) / runs * ((without - without.mean()) ** 2).sum())
    return 2 * stats.t.sf(abs(np.arctanh(correlation(x, y))) / error, runs - 1)


@pytest.mark.parametrize("seed", range(4))
def test_over_steps_p_is_the_larger_of_every_permutation_and_the_jackknife(seed):
    x, y = draws(seed), draws(seed + 10) + seed * draws(seed)
    found = associate(measures(x), scores(y), headline="m").isel(measure=0, task=0)
    null = [studentised(x, y[list(order)]) for order in permutations(range(5))]
    permuted = np.mean(np.array(null) >= null[0] * (1 - 1e-12))
    assert found["coefficient"].item() == pytest.approx(correlation(x, y))
    assert found["p_value"].item() == pytest.approx(max(permuted, jackknifed(x, y)))
    assert found["n_runs"] == 5
    assert found["n_steps"] == 4


@pytest.mark.parametrize("question", ["over_steps", "between_runs"])
@pytest.mark.parametrize("runs", [9, 12])
def test_the_interval_excludes_0_exactly_where_the_association_is_shown(runs, question):
    rng = np.random.default_rng(runs)
    x = rng.standard_normal((runs, 5, 12))
    y = np.linspace(0, 4, 12) * x + rng.standard_normal((runs, 5, 12))
    names = [f"m{number}" for number in range(12)]
    tasks = [f"t{number}/accuracy" for number in range(12)]
    of = [f"r{number}" for number in range(runs)]
    given = measures(x, names, of, range(5)), scores(y, tasks, of, range(5))
    found = associate(*given, headline="m11", question=question, draws=999)
    excludes = ((found["low"] > 0) | (found["high"] < 0)).values
    np.testing.assert_array_equal(excludes, found["holds"].values)
    assert excludes.any()
    assert not excludes.all()
    leading = (found["measure"] == "m11") & (found["task"] == "all")
    deciding = found["p_value"].where(leading, found["p_familywise"])
    np.testing.assert_array_equal(((deciding <= 0.05) & found["decidable"]).transpose("measure", "task"), excludes)


def with_the_loss(rng, runs=8, steps=10):
    """A measure and a score that both follow how far each run has come, and its loss."""
    speed = np.exp(rng.normal(0, 0.7, (runs, 1)))
    progress = 1 - np.exp(-speed * np.linspace(0.3, 3, steps))
    x, y = (progress + 0.02 * rng.standard_normal((runs, steps)) for _ in range(2))
    names = [f"r{run}" for run in range(runs)]
    loss = xr.DataArray(3 - 2 * progress, {"run": names, "step": range(steps)}, ("run", "step"))
    return measures(x, runs=names, steps=range(steps)), scores(y, runs=names, steps=range(steps)), loss


def test_with_the_loss_held_equal_a_common_cause_is_gone():
    x, y, loss = with_the_loss(np.random.default_rng(1))
    plain, beside, equal = (
        associate(x, y, headline="m", **options).isel(measure=0, task=0)
        for options in ({}, {"loss": loss}, {"loss": loss, "given": "loss"})
    )
    assert plain["coefficient"] > 0.7
    assert plain["holds"]
    assert "Faster learning alone could cause both." in plain["statement"].item()
    assert abs(equal["coefficient"]) < 0.4
    assert not equal["holds"]
    assert "with the training loss held equal" in equal["statement"].item()
    assert beside["coefficient_given_loss"].item() == pytest.approx(equal["coefficient"].item())
    assert f"With the training loss held equal, r = {equal['coefficient']:.2f}." in beside["statement"].item().replace(
        "−", "-"
    )


def test_pairs_with_other_runs_are_other_families():
    x, y = draws(20, (6, 5, 2)), draws(21, (6, 5, 1))
    runs = [f"r{number}" for number in range(6)]
    x[0, :, 1] = np.nan
    found = associate(measures(x, "ab", runs, range(5)), scores(y, runs=runs, steps=range(5)), headline="a")
    one = associate(measures(x[..., 1:], "b", runs, range(5)), scores(y, runs=runs, steps=range(5)), headline="b")
    expected = max(2 * np.mean(permuted_twin(x[1:, :, 1], y[1:, :, 0])), jackknifed(x[1:, :, 1], y[1:, :, 0]))
    assert found["p_familywise"].values[1, 0] == pytest.approx(min(1.0, expected))
    assert one["n_runs"].item() == 5
    assert found["n_runs"].values.ravel().tolist() == [6, 5]


def permuted_twin(x, y):
    null = np.array([studentised(x, y[list(order)]) for order in permutations(range(len(x)))])
    return null >= null[0] * (1 - 1e-12)


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
            [[studentised(x[..., m], turned[t][list(order)]) for t in every] for m in range(3)]
            for order in permutations(range(5))
        ]
    )
    largest = null.max((1, 2))
    for m, t in ((m, t) for m in range(3) for t in range(len(every))):
        expected = np.mean(largest >= null[0, m, t] * (1 - 1e-12)), jackknifed(x[..., m], turned[every[t]])
        assert found["p_familywise"].values[m, t] == pytest.approx(max(expected))
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
    permuted = np.mean(np.array(null) >= null[0] - 1e-12)
    assert permuted <= found["p_value"].item() <= 1
    if coefficient == "spearman":
        r = min(null[0], 1 - 6 / 120)
        expected = max(permuted, 2 * stats.norm.sf(np.arctanh(r) / np.sqrt((1 + r**2 / 2) / 2)))
        assert found["p_value"].item() == pytest.approx(expected)


@pytest.mark.parametrize(("runs", "smallest"), [(2, 1.0), (3, 1 / 3)])
def test_too_few_runs_are_not_decided(runs, smallest):
    x, y = draws(6, (runs, 4)), draws(7, (runs, 4))
    found = associate(measures(x, runs=RUNS[:runs]), scores(y, runs=RUNS[:runs]), headline="m").isel(measure=0, task=0)
    assert found["smallest_p"].item() >= smallest / 2
    assert not found["decidable"]
    assert not found["holds"]
    assert found["statement"].item().startswith(f"{runs} runs are too few to decide whether m goes with t/accuracy")


def test_one_run_is_described_without_a_p_value():
    steps = list(range(10, 210, 10))
    x, y = draws(8, (1, 20)), draws(9, (1, 20))
    found = associate(measures(x, runs=["r"], steps=steps), scores(y, runs=["r"], steps=steps), headline="m")
    assert found.attrs["question"] == "one_run"
    assert np.isnan(found["p_value"]).all()
    assert "There is no p-value for one run." in found["statement"].values[0, 0]
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
    assert found["statement"].item().startswith("m cannot be related to t/accuracy")


def test_repeats_and_left_out_runs_are_noted():
    names = ["a_s1", "a_s2", "b_s1", "b_s2", "c"]
    found = associate(measures(draws(15), runs=names), scores(draws(16)[:4], runs=names[:4]), headline="m")
    assert {"OD508", "OD509"} <= {finding.code for finding in findings_of(found)}


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
        ({"given": "loss"}, "given='loss': expected the training loss of these runs at these steps"),
        ({"given": "loss"}, "Log it, or ask for given='trend'"),
        ({"given": "trend", "question": "between_runs"}, "given='trend': expected several runs that share at least 3"),
        ({"loss": xr.DataArray([1.0], dims="step")}, "loss: expected the dimensions ('run', 'step'), got ('step',)."),
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
    y = y + 0.75 * x[..., 1]
    given, told = measures(x, names, runs), scores(y, runs=runs)
    found = associate(given, told, headline="m0").isel(task=0)
    chance = (found["p_value"] <= 0.05) & (found["p_familywise"] > 0.05)
    assert chance.any()
    lucky = found["measure"].values[chance.values & (found["measure"].values != "m0")][0]
    assert not found["holds"].sel(measure=lucky)
    assert associate(given, told, headline=lucky).isel(task=0)["holds"].sel(measure=lucky)
