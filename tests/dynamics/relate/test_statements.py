"""Every form of sentence, whole, and that its numbers are those of the variables beside it."""

import re

import numpy as np
import pytest
import xarray as xr

from dynamics.relate import associate, compare
from dynamics.text import number

#: A number as sentences write it, with a true minus sign.
NUMBER = r"[−\d.e+-]*\d"


def grid(values, last, names, runs=None):
    """Numbers ``[run, step]`` or ``[run, step, name]`` with coordinates."""
    values = np.asarray(values, dtype=float).reshape(*np.shape(values)[:2], -1)
    coords = {
        "run": runs or [f"r{number}" for number in range(len(values))],
        "step": [10 * (number + 1) for number in range(values.shape[1])],
        last: list(names),
    }
    return xr.DataArray(values, coords, ("run", "step", last))


def wave(frequency, runs=6, steps=5):
    """Curves that have little to do with one another, the same on every machine."""
    return np.sin(frequency * np.arange(1.0, runs * steps + 1) ** 2 + frequency - 1).reshape(runs, steps)


X, E, LOSS = wave(1), wave(2), xr.DataArray(grid(wave(3), "loss", ["loss"]).isel(loss=0, drop=True))


def associated(x, y, tasks=("qa/accuracy",), measures=("m",), **options):
    return associate(grid(x, "measure", measures), grid(y, "task", tasks), headline="m", **options)


def sentence(result):
    """The only one."""
    return result["statement"].item()


@pytest.mark.parametrize(
    ("y", "options", "expected"),
    [
        (
            X + 0.3 * E,
            {},
            "Higher m goes with better qa/accuracy within runs, beyond the curve that all share (r = 0.98, 95 % "
            "interval 0.46 to 1.00, p = 0.0069; 6 runs × 5 steps). Faster learning alone could cause both.",
        ),
        (
            -X + 0.3 * E,
            {},
            "Higher m goes with worse qa/accuracy within runs, beyond the curve that all share (r = −0.97, 95 % "
            "interval −1.00 to −0.40, p = 0.019; 6 runs × 5 steps). Faster learning alone could cause both.",
        ),
        (
            X + 0.3 * E,
            {"tasks": ["qa/loss"]},
            "Higher m goes with worse qa/loss (lower is better) within runs, beyond the curve that all share (r = "
            "−0.98, 95 % interval −1.00 to −0.46, p = 0.0069; 6 runs × 5 steps). Faster learning alone could cause "
            "both.",
        ),
        (
            -X + 0.3 * E,
            {"tasks": ["oddity"]},
            "Higher m goes with lower oddity (which direction is better is unknown) within runs, beyond the curve "
            "that all share (r = −0.97, 95 % interval −1.00 to −0.40, p = 0.019; 6 runs × 5 steps). Faster learning "
            "alone could cause both.",
        ),
        (
            X + 0.3 * E,
            {"loss": LOSS},
            "Higher m goes with better qa/accuracy within runs, beyond the curve that all share (r = 0.98, 95 % "
            "interval 0.46 to 1.00, p = 0.0069; 6 runs × 5 steps). Faster learning alone could cause both. With the "
            "training loss held equal, r = 0.98.",
        ),
        (
            X + 0.3 * E,
            {"loss": LOSS, "given": "loss"},
            "Higher m goes with better qa/accuracy within runs, with the training loss held equal (r = 0.98, 95 % "
            "interval 0.52 to 1.00, p = 0.0069; 6 runs × 5 steps).",
        ),
        (
            X + 0.3 * E,
            {"given": "trend"},
            "Higher m goes with better qa/accuracy within runs, beyond each run's own straight line (r = 0.99, 95 % "
            "interval 0.41 to 1.00, p = 0.0083; 6 runs × 5 steps). Curves that bend faster could cause both.",
        ),
        (
            X + 0.1 * E,
            {"question": "between_runs", "coefficient": "spearman"},
            "Higher m goes with better qa/accuracy between runs (r = 1.00, 95 % interval 0.63 to 1.00, p = 0.0028; 6 "
            "runs at their last step).",
        ),
    ],
    ids=["better", "worse", "lower", "unknown", "loss beside", "given loss", "given trend", "between runs"],
)
def test_an_association_that_is_shown(y, options, expected):
    assert sentence(associated(X, y, **options)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            "m and qa/accuracy: no association shown within runs, beyond the curve that all share (r = 0.18, 95 % "
            "interval −0.20 to 0.51, p = 0.28; 6 runs × 5 steps). Correlations outside the interval are ruled out.",
        ),
        (
            {"given": "trend"},
            "m and qa/accuracy: no association shown within runs, beyond each run's own straight line (r = 0.42, 95 "
            "% interval −0.12 to 0.90, p = 0.097; 6 runs × 5 steps). Correlations outside the interval are ruled out.",
        ),
    ],
    ids=["plain", "given trend"],
)
def test_an_association_that_is_not_shown(options, expected):
    assert sentence(associated(X, E, **options)) == expected


def test_an_association_of_too_few_runs_says_how_many_could():
    assert sentence(associated(X[:3], E[:3])) == (
        "3 runs are too few to decide whether m goes with qa/accuracy within runs, beyond the curve that all share "
        "(smallest possible p: 0.17). 4 runs can reach 0.05. Observed: r = 0.10."
    )


def test_an_association_of_too_few_clusters_counts_clusters():
    clusters = dict(zip([f"r{number}" for number in range(6)], "aabbcc", strict=True))
    assert sentence(associated(X, E, clusters=clusters)) == (
        "3 clusters of runs are too few to decide whether m goes with qa/accuracy within runs, beyond the curve that "
        "all share (smallest possible p: 0.17). 4 clusters of runs can reach 0.05. Observed: r = 0.34."
    )


def test_an_association_that_only_its_correction_hinders_asks_for_more_runs():
    result = associated(np.stack([X, E, LOSS], axis=-1)[:3], E[:3], measures="mno")
    assert str(result["statement"].sel(measure="o").item()) == (
        "3 runs are too few to decide whether o goes with qa/accuracy within runs, beyond the curve that all share "
        "(smallest possible p: 0.33, adjusted for 3 associations). 4 runs can reach 0.05. Observed: r = 0.60."
    )


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (
            20,
            "One run cannot show whether m goes with qa/accuracy: give several runs. In this run, beyond its trend, "
            "r = 0.10 (95 % interval −0.47 to 0.62; 20 steps, worth 16.0 independent ones). There is no p-value for "
            "one run.",
        ),
        (
            7,
            "One run cannot show whether m goes with qa/accuracy: give several runs. In this run, beyond its trend, "
            "r = −0.60 (no interval; 7 steps, worth 3.6 independent ones). There is no p-value for one run.",
        ),
        (5, "m cannot be related to qa/accuracy: no run has 6 steps with both."),
    ],
)
def test_one_run_is_described(steps, expected):
    assert sentence(associated(wave(4, 1, steps), wave(5, 1, steps))) == expected


@pytest.mark.parametrize(
    ("gaps", "reason"),
    [(None, "one of the two does not vary"), (slice(None), "no run has a step with both")],
)
def test_without_a_coefficient_the_reason_is_given(gaps, reason):
    y = E.copy() if gaps is None else np.full_like(E, np.nan)
    assert sentence(associated(np.ones_like(X), y)) == f"m cannot be related to qa/accuracy: {reason}."


def test_tasks_with_the_same_reason_share_a_sentence_that_names_eight():
    tasks = [f"t{number}/accuracy" for number in range(10)]
    result = associated(np.ones_like(X), np.stack([wave(number + 2) for number in range(10)], axis=-1), tasks)
    assert result.attrs["statements"] == [
        "m cannot be related to all, t0/accuracy, t1/accuracy, t2/accuracy, t3/accuracy, t4/accuracy, t5/accuracy, "
        "t6/accuracy and 3 more: one of the two does not vary."
    ]


def test_of_several_tasks_the_mean_comes_first_and_the_others_are_adjusted():
    result = associated(X, np.stack([X + 0.3 * E, E], axis=-1), ("qa/accuracy", "vqa/loss"))
    assert result.attrs["statements"] == result["statement"].values.ravel().tolist()
    assert result.attrs["statements"] == [
        "Higher m goes with better scores (mean over tasks) within runs, beyond the curve that all share (r = 0.80, "
        "95 % interval 0.29 to 1.00, p = 0.022; 6 runs × 5 steps). Faster learning alone could cause both.",
        "Higher m goes with better qa/accuracy within runs, beyond the curve that all share (r = 0.98, 95 % interval "
        "0.33 to 1.00, p = 0.018, adjusted for 3 associations; 6 runs × 5 steps). Faster learning alone could cause "
        "both.",
        "m and vqa/loss (lower is better): no association shown within runs, beyond the curve that all share (r = "
        "−0.18, 95 % interval −0.51 to 0.20, p = 0.28, adjusted for 3 associations; 6 runs × 5 steps). Correlations "
        "outside the interval are ruled out.",
    ]


def test_what_another_measure_shows_comes_after_the_headline():
    x = np.stack([E, X], axis=-1)
    result = associated(x, X + 0.3 * wave(5), measures=("m", "n"))
    assert result["holds"].values.ravel().tolist() == [False, True]
    assert result.attrs["statements"] == result["statement"].values.ravel().tolist()
    without = associated(x, LOSS.values, measures=("m", "n"))
    assert not without["holds"].any()
    assert without.attrs["statements"] == [without["statement"].sel(measure="m").item()]


def numbers(text, pattern):
    return tuple(match.replace("−", "-") for match in re.search(pattern, text).groups())


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_the_numbers_of_an_association_are_those_of_its_variables(weight):
    x = np.stack([wave(number, 8) for number in (1, 2, 3)], axis=-1)
    result = associated(x, weight * x[..., 0] + wave(7, 8), measures="mno")
    for measure in "mno":
        row = result.sel(measure=measure).isel(task=0)
        pattern = rf"\(r = ({NUMBER}), 95 % interval ({NUMBER}) to ({NUMBER}), p = ({NUMBER})"
        expected = [f"{row[name]:.2f}" for name in ("coefficient", "low", "high")]
        expected.append(f"{row['p_value' if measure == 'm' else 'p_familywise']:.2g}")
        assert numbers(row["statement"].item(), pattern) == tuple(expected)
        assert ("no association" in row["statement"].item()) == (not row["holds"])


FIRST = np.array([5, 7, 6, 8, 7, 9, 8, 9])
SECOND = np.array([2, 3, 1, 4, 4, 4, 5, 5])
THIRD = np.array([3, 2, 2, 3, 5, 4, 4, 6])


def compared(*groups, steps=2, measures=("m",), paired=None, gap=()):
    """Differences of groups of runs: a run's mean over the steps is its number; ``paired`` by seed, or not."""
    names = {group: [f"{group}_s{n}" for n in range(len(runs))] for group, runs in zip("abc", groups, strict=False)}
    runs = [run for members in names.values() for run in members]
    around = np.linspace(-1, 1, steps)[:, None] if steps > 1 else np.zeros((1, 1))
    values = np.concatenate([np.reshape(group, (len(group), 1, -1)) + around for group in groups]).astype(float)
    for place in gap:
        values[place] = np.nan
    pairs = {None: None, False: {}, True: {run: run[2:] for run in runs}}[paired]
    return compare(grid(values, "measure", measures, runs), names, pairs=pairs, headline="m")


@pytest.mark.parametrize(
    ("groups", "options", "expected"),
    [
        (
            (FIRST, SECOND),
            {},
            "m is higher in a than in b by 3.88 (95 % interval 3.05 to 4.70, effect size 4.12, p = 0.0078; 8 pairs "
            "by name, mean over 2 steps).",
        ),
        (
            (SECOND, FIRST),
            {"paired": True},
            "m is lower in a than in b by 3.88 (95 % interval 3.05 to 4.70, effect size 4.12, p = 0.0078; 8 pairs, "
            "mean over 2 steps).",
        ),
        (
            (FIRST[:6], SECOND[:6]),
            {"paired": False, "steps": 1},
            "m is higher in a than in b by 4.00 (95 % interval 2.27 to 5.73, effect size 2.75, p = 0.0022; 6 + 6 "
            "runs, unpaired, one step).",
        ),
    ],
    ids=["pairs by name", "pairs as given", "unpaired"],
)
def test_a_difference_that_is_shown(groups, options, expected):
    assert sentence(compared(*groups, **options)) == expected


def test_a_difference_that_is_not_shown():
    assert sentence(compared(THIRD, SECOND)) == (
        "m: no difference between a and b shown (0.125, 95 % interval −0.707 to 0.957, effect size 0.11, p = 1; 8 "
        "pairs by name, mean over 2 steps). Differences outside the interval are ruled out."
    )


@pytest.mark.parametrize(
    ("count", "paired", "expected"),
    [
        (
            3,
            True,
            "3 pairs are too few to decide whether m differs between a and b (smallest possible p: 0.25). 6 pairs "
            "can reach 0.05. Observed difference: 4.00 (standard error 0.577, effect size 2.26, 3 pairs, mean over 2 "
            "steps).",
        ),
        (
            3,
            False,
            "3 + 3 runs are too few to decide whether m differs between a and b (smallest possible p: 0.1). 3 + 4 "
            "runs can reach 0.05. Observed difference: 4.00 (standard error 0.816, effect size 3.19, 3 + 3 runs, "
            "unpaired, mean over 2 steps).",
        ),
        (
            3,
            None,
            "3 + 3 runs are too few to decide whether m differs between a and b (smallest possible p: 0.1). 3 + 4 "
            "runs can reach 0.05. Observed difference: 4.00 (standard error 0.816, effect size 3.19, 3 + 3 runs, "
            "unpaired (names match 3 pairs; 6 are needed), mean over 2 steps).",
        ),
    ],
    ids=["pairs", "unpaired", "pairs by name"],
)
def test_a_difference_of_too_few_runs_says_how_many_could(count, paired, expected):
    assert sentence(compared(FIRST[:count], SECOND[:count], paired=paired)) == expected


def test_groups_of_fewer_than_three_runs_are_described():
    assert sentence(compared(FIRST[:2], SECOND[:5], paired=False)) == (
        "Groups of fewer than 3 runs are described, not tested: whether m differs between a and b is undecided. "
        "Observed difference: 3.20 (standard error 1.16, effect size 2.03, 2 + 5 runs, unpaired, mean over 2 steps)."
    )


def test_of_one_run_against_one_only_the_difference_is_given():
    assert sentence(compared(FIRST[:1], SECOND[:1], paired=False)) == (
        "Groups of fewer than 3 runs are described, not tested: whether m differs between a and b is undecided. "
        "Observed difference: 3.00 (1 + 1 runs, unpaired, mean over 2 steps)."
    )


def test_without_a_step_that_all_runs_have_nothing_is_said():
    result = compared(FIRST, SECOND, gap=[(0, 0), (9, 1)])
    assert sentence(result) == "m cannot be compared: no step has it for every run of a and b."


def test_a_difference_without_spread_has_no_effect_size():
    assert sentence(compared(SECOND[:6] + 1, SECOND[:6])) == (
        "m is higher in a than in b by 1.00 (95 % interval 1.00 to 1.00, p = 0.031; 6 pairs by name, mean over 2 "
        "steps)."
    )


@pytest.mark.parametrize(
    ("paired", "where"), [(True, "6 pairs, mean over 2 steps"), (False, "6 + 6 runs, unpaired, mean over 2 steps")]
)
def test_equal_groups_leave_nothing_to_test(paired, where):
    equal = SECOND[:6] if paired else np.full(6, 0.1)
    assert sentence(compared(equal, equal, paired=paired)) == (
        f"m is equal in a and b ({where}): there is nothing to test."
    )


def test_an_interval_that_holds_every_correlation_rules_out_none():
    x, y = wave(4, 4, 4), wave(9, 4, 4)
    result = associated(x, y)
    assert result["low"].item() < -0.995
    assert result["high"].item() > 0.995
    assert sentence(result).endswith(" 4 runs × 4 steps). Every correlation is still possible: more runs are needed.")


def test_of_three_groups_each_difference_is_adjusted():
    assert compared(FIRST, SECOND, THIRD).attrs["statements"] == [
        "m is higher in a than in b by 3.88 (95 % interval 2.87 to 4.88, effect size 4.12, p = 0.023, adjusted for 3 "
        "comparisons; 8 pairs by name, mean over 2 steps).",
        "m is higher in a than in c by 3.75 (95 % interval 2.00 to 5.50, effect size 2.60, p = 0.023, adjusted for 3 "
        "comparisons; 8 pairs by name, mean over 2 steps).",
        "m: no difference between b and c shown (−0.125, 95 % interval −1.22 to 0.971, effect size −0.11, p = 1, "
        "adjusted for 3 comparisons; 8 pairs by name, mean over 2 steps). Differences outside the interval are ruled "
        "out.",
    ]


def test_what_another_measure_differs_in_comes_after_the_headline():
    first = np.stack([[THIRD, FIRST, THIRD]], axis=-1).reshape(3, 8).T
    second = np.stack([SECOND, SECOND, SECOND], axis=-1)
    result = compared(first, second, measures="mno")
    assert result["holds"].values.ravel().tolist() == [False, True, False]
    assert result.attrs["statements"] == result["statement"].sel(measure=["m", "n"]).values.ravel().tolist()
    assert result.attrs["statements"][1] == (
        "n is higher in a than in b by 3.88 (95 % interval 3.05 to 4.70, effect size 4.12, p = 0.0078, adjusted for "
        "3 measures; 8 pairs by name, mean over 2 steps)."
    )


def three_measures(runs, **options):
    """Two groups of runs that differ little, much, and somewhat."""
    first, second = (np.stack([wave(k + shift, runs, 1)[:, 0] for k in (1, 2, 3)], axis=-1) for shift in (0, 3))
    return compared(np.add(first, [0.1, 2, 0.5]), second, measures="mno", **options)


def test_a_difference_that_only_its_correction_hinders_asks_for_more_pairs():
    result = three_measures(9, paired=True)
    assert result["statement"].sel(measure="o").item() == (
        "9 pairs are too few to decide whether o differs between a and b (smallest possible p: 0.062, adjusted for 3 "
        "measures). More runs are needed. Observed difference: 0.407 (standard error 0.376, effect size 0.33, 9 "
        "pairs, mean over 2 steps)."
    )


@pytest.mark.parametrize(("paired", "decidable"), [(True, "mn"), (False, "mno")])
def test_the_numbers_of_a_difference_are_those_of_its_variables(paired, decidable):
    result = three_measures(9, paired=paired).isel(comparison=0)
    assert "".join(result["measure"].values[result["decidable"].values]) == decidable
    for measure in decidable:
        row = result.sel(measure=measure)
        pattern = (
            rf"(?:by |shown \()({NUMBER})(?:,| \() ?95 % interval ({NUMBER}) to ({NUMBER}), effect size ({NUMBER}), "
            rf"p = ({NUMBER})"
        )
        expected = [number(row[f"mean_{name}"].item()).replace("−", "-") for name in ("difference", "low", "high")]
        p_value = row["mean_p_value" if measure == "m" else "mean_p_familywise"]
        expected += [f"{row['mean_effect_size']:.2f}", f"{p_value:.2g}"]
        assert numbers(row["statement"].item(), pattern) == tuple(expected)
        assert ("no difference" in row["statement"].item()) == (not row["holds"])
