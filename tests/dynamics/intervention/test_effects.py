"""Effects of parts with their intervals: identities, slow twins, and inputs of which nothing can be said."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dynamics.fisher.samples import SampleGroups
from dynamics.intervention.effects import (
    Decomposition,
    effects,
    part_and_rest,
    ratio_of_means,
    required_groups,
)
from tests.dynamics.intervention.simulated import groups_of_two, newton_step, outcome


@pytest.fixture
def labels() -> SampleGroups:
    """Forty samples of ten groups of unequal size; three tasks, the first of all samples, two that share groups."""
    group = np.repeat(np.arange(10), [1, 7, 2, 3, 9, 4, 4, 1, 5, 4])
    first = np.arange(40) % 3 == 0
    return SampleGroups(group, np.stack([np.ones(40, dtype=bool), first, ~first], axis=1))


def normal(seed: int, *shape: int, mean: float = 0.0) -> np.ndarray:
    return mean + np.random.default_rng(seed).standard_normal(shape)


# ---- mean effects ----


def left_out_interval(values: np.ndarray, labels: SampleGroups, task: int) -> tuple[float, float, float]:
    """Slow twin of :func:`effects` for one arm without splits: leave out each group and take the mean again."""
    member = labels.member[:, task]
    groups = np.unique(labels.group[member])
    means = np.array([values[member & (labels.group != group)].mean() for group in groups])
    count = len(groups)
    error = np.sqrt((count - 1) / count * ((means - means.mean()) ** 2).sum())
    reach = stats.t.ppf(0.975, count - 1) * error
    mean = values[member].mean()
    return mean, mean - reach, mean + reach


def test_effects_are_means_with_intervals_over_groups(labels: SampleGroups) -> None:
    values = normal(0, 2, 40, mean=0.3)
    result = effects(values, labels)
    for arm in range(2):
        for task in range(3):
            twin = left_out_interval(values[arm], labels, task)
            numbers = [part[arm, task] for part in (result.estimate, result.low, result.high)]
            np.testing.assert_allclose(numbers, twin, rtol=1e-12)


def test_effects_are_those_of_the_reference(labels: SampleGroups, reference: ModuleType) -> None:
    values = normal(1, 1, 40)
    result = effects(values, labels)
    numbers = [part[0, 0] for part in (result.estimate, result.low, result.high)]
    np.testing.assert_allclose(numbers, reference.tint(values[0], labels.group), rtol=1e-12)


@given(scale=st.floats(1e-8, 1e8), sign=st.sampled_from([-1.0, 1.0]))
def test_effects_scale_with_the_loss(scale: float, sign: float) -> None:
    values, labels = normal(2, 2, 1, 12), groups_of_two(12)
    one, other = effects(values, labels), effects(sign * scale * values, labels)
    np.testing.assert_allclose(other.estimate, sign * scale * one.estimate, rtol=1e-12)
    np.testing.assert_allclose(other.high - other.low, scale * (one.high - one.low), rtol=1e-10)


def test_a_sample_without_a_finite_loss_leaves_other_tasks_alone(labels: SampleGroups) -> None:
    whole = normal(3, 2, 40)
    broken = whole.copy()
    broken[0, 0], broken[1, 0] = np.nan, -np.inf  # sample 0 is of tasks 0 and 1
    one, other = effects(whole, labels), effects(broken, labels)
    for part in ("estimate", "low", "high"):
        assert np.isnan(getattr(other, part)[:, :2]).all()
        np.testing.assert_array_equal(getattr(other, part)[:, 2], getattr(one, part)[:, 2])


@pytest.mark.parametrize(("group", "mean"), [([0, 0, 0], 2.0), ([], np.nan)], ids=["one group", "no sample"])
def test_fewer_than_two_groups_have_no_interval(group: list[int], mean: float) -> None:
    labels = SampleGroups.of_one_task(np.array(group, dtype=int))
    values = np.arange(1.0, 1 + len(group))[None]
    result = effects(values, labels)
    np.testing.assert_equal([result.estimate.item(), result.low.item(), result.high.item()], [mean, np.nan, np.nan])
    assert np.isnan(required_groups(values, labels)).all()


def test_a_task_of_one_group_has_a_mean_and_no_interval() -> None:
    labels = SampleGroups(np.array([0, 0, 1]), np.array([[True, True], [True, True], [True, False]]))
    result = effects(np.array([[1.0, 3.0, 8.0]]), labels)
    assert result.estimate.tolist() == [[4.0, 2.0]]
    assert np.isnan(result.low).tolist() == [[False, True]]


# ---- several splits ----


def test_splits_that_agree_are_one() -> None:
    values, labels = normal(4, 2, 12), groups_of_two(12)
    one, other = effects(values, labels), effects(np.stack([values, values, values]), labels)
    for part in ("estimate", "low", "high"):
        np.testing.assert_allclose(getattr(other, part), getattr(one, part), rtol=1e-12)


@pytest.mark.parametrize("splits", [2, 3, 5])
def test_variance_between_splits_is_added_as_stated(splits: int) -> None:
    """With groups of equal size: the jackknife's of the mean over splits, and (1 + 1/S) σ²/g."""
    values, labels = normal(5, splits, 1, 24), groups_of_two(24)
    groups = values[:, 0].reshape(splits, 12, 2).mean(-1)
    between = (groups - groups.mean(0)) - (groups - groups.mean(0)).mean(1, keepdims=True)
    spread = (between**2).sum(0).sum() / (splits - 1) / 11
    variance = groups.mean(0).var(ddof=1) / 12 + (1 + 1 / splits) * spread / 12
    result = effects(values, labels)
    assert (result.high - result.low).item() / 2 == pytest.approx(stats.t.ppf(0.975, 11) * variance**0.5, rel=1e-10)


@pytest.mark.parametrize("splits", [2, 4])
def test_what_halves_owe_to_each_other_is_counted_with_splits_and_missed_without(splits: int) -> None:
    """d_i = Σ z_i z_j/n over the other half: what i has of j, j has of i in the same split."""
    rng = np.random.default_rng(6)
    groups, draws = 40, 2000
    halves = np.array([rng.permutation(groups) < groups // 2 for _ in range(splits)])
    z = rng.standard_normal((draws, groups))
    apart = halves[:, :, None] != halves[:, None]
    values = np.einsum("di,dj,sij->sdi", z, z, apart.astype(float)) / (groups // 2)
    labels = SampleGroups.of_one_task(np.arange(groups))
    with_splits, without = effects(values, labels), effects(values.mean(0), labels)
    variance = with_splits.estimate.var()
    reach = 2 * stats.t.ppf(0.975, groups - 1)
    assert (((with_splits.high - with_splits.low) / reach) ** 2).mean() == pytest.approx(variance, rel=0.1)
    assert (((without.high - without.low) / reach) ** 2).mean() == pytest.approx(variance / 2, rel=0.1)


# ---- two parts ----


@pytest.fixture(scope="module")
def resolved() -> tuple[Decomposition, tuple[np.ndarray, ...]]:
    """A step whose whole effect is resolved, with k = 4 and 16."""
    rng = np.random.default_rng(0)
    labels = groups_of_two(256)
    drawn = outcome(newton_step(rng), labels, rng)
    arrays = drawn.on, drawn.off, drawn.full, drawn.captured
    return part_and_rest(*arrays, labels), arrays


def test_shares_of_both_parts_sum_to_one(resolved: tuple[Decomposition, tuple[np.ndarray, ...]]) -> None:
    one, (on, off, full, captured) = resolved
    other = part_and_rest(off, on, full, 1 - captured, groups_of_two(256))
    np.testing.assert_allclose(one.share.estimate + other.share.estimate, 1, rtol=1e-10)
    np.testing.assert_allclose(one.share.low + other.share.high, 1, rtol=1e-10)
    np.testing.assert_allclose(one.excess.estimate, -other.excess.estimate, rtol=1e-10)
    np.testing.assert_allclose(one.necessity.estimate + other.sufficiency.estimate, 1, rtol=1e-10)


def test_ratios_are_those_of_the_means(resolved: tuple[Decomposition, tuple[np.ndarray, ...]]) -> None:
    parts, (on, off, full, captured) = resolved
    means = on.mean((0, 2))[:, None], off.mean((0, 2))[:, None], full.mean(), captured.mean((0, 2))[:, None]
    d_on, d_off, whole, c = means
    assert parts.resolved.all()
    assert parts.separable.all()
    contribution = (d_on + whole - d_off) / 2
    np.testing.assert_allclose(parts.captured, c, rtol=1e-12)
    np.testing.assert_allclose(parts.interaction.estimate, whole - d_on - d_off, atol=1e-12)
    np.testing.assert_allclose(parts.sufficiency.estimate, d_on / whole, rtol=1e-10)
    np.testing.assert_allclose(parts.necessity.estimate, 1 - d_off / whole, rtol=1e-10)
    np.testing.assert_allclose(parts.share.estimate, contribution / whole, rtol=1e-10)
    # T takes c of each fold.
    np.testing.assert_allclose(
        parts.excess.estimate, contribution - (captured * full).mean((0, 2))[:, None], atol=1e-12
    )
    for part in ("estimate", "low", "high"):
        np.testing.assert_allclose(getattr(parts.efficiency, part), getattr(parts.share, part) / c, rtol=1e-10)


def test_interaction_of_a_quadratic_loss_is_that_of_its_hessian() -> None:
    """D(x) = −⟨g, x⟩ − ½xᵀHx, so I = −onᵀH off, and D_on is closed."""
    rng = np.random.default_rng(1)
    features, residuals = rng.standard_normal((20, 6)), rng.standard_normal(20)
    on, off = rng.standard_normal((2, 6))
    values = {
        name: residuals * (features @ change) - (features @ change) ** 2 / 2
        for name, change in {"on": on, "off": off, "full": on + off}.items()
    }
    labels = groups_of_two(20)
    parts = part_and_rest(values["on"][None], values["off"][None], values["full"], np.full((1, 20), 0.5), labels)
    hessian, slope = features.T @ features / 20, residuals @ features / 20
    assert parts.interaction.estimate.item() == pytest.approx(-on @ hessian @ off, rel=1e-10)
    closed = slope @ on - on @ hessian @ on / 2
    assert effects(values["on"][None], labels).estimate.item() == pytest.approx(closed, rel=1e-10)


def test_share_holds_c_exactly_where_the_excess_holds_zero() -> None:
    """Fieller's interval and T's are one test, so a sentence on T never contradicts the share beside it."""
    labels, full = groups_of_two(40), normal(7, 40, mean=2.0)
    on = 0.6 * full + np.linspace(-1, 1, 60)[:, None] + normal(8, 2, 60, 40)
    parts = part_and_rest(on, full - on, full, np.full(on.shape, 0.6), labels)
    above, below = parts.excess.low > 0, parts.excess.high < 0
    assert above.any()
    assert below.any()
    np.testing.assert_array_equal(parts.share.low > 0.6, above)
    np.testing.assert_array_equal(parts.share.high < 0.6, below)


def test_an_unresolved_whole_has_effects_but_no_shares() -> None:
    labels, full = groups_of_two(40), normal(10, 40)
    parts = part_and_rest(normal(11, 1, 40, mean=2.0), normal(12, 1, 40), full, np.full((1, 40), 0.3), labels)
    assert not parts.resolved.any()
    for name in ("share", "efficiency", "sufficiency", "necessity"):
        estimate = getattr(parts, name)
        assert np.isnan([estimate.estimate, estimate.low, estimate.high]).all(), name
    assert np.isfinite([parts.excess.low, parts.interaction.high]).all()


def test_a_whole_that_does_harm_has_shares_of_the_harm() -> None:
    labels, on, off = groups_of_two(40), normal(13, 40, mean=-3.0) / 10, normal(14, 40, mean=-1.0) / 10
    parts = part_and_rest(on[None], off[None], on + off, np.full((1, 40), 0.3), labels)
    assert parts.resolved.all()
    assert parts.share.estimate.item() == pytest.approx(on.mean() / (on + off).mean(), rel=1e-10)
    assert parts.share.low.item() > 0.5
    assert parts.excess.high.item() < 0  # it pays less than its share: it does more harm


@pytest.mark.parametrize(
    ("whole", "separable"), [(2.0, True), (2.01, False), (0.67, True), (0.66, False), (-2.0, False)]
)
def test_parts_are_separable_up_to_an_interaction_of_half_the_whole(whole: float, separable: bool) -> None:
    """D_on + D_off = 1, so that |I| = |D − 1|."""
    half = np.full((1, 8), 0.5)
    parts = part_and_rest(half, half, np.full(8, whole), half, groups_of_two(8))
    assert parts.separable.item() == separable


def test_an_update_that_does_nothing_says_nothing() -> None:
    nothing = np.zeros((2, 1, 8))
    parts = part_and_rest(nothing, nothing, np.zeros(8), np.full((2, 1, 8), np.nan), groups_of_two(8))
    assert not parts.resolved.any()
    assert np.isnan([parts.captured, parts.share.estimate, parts.excess.estimate]).all()
    assert (parts.interaction.low.item(), parts.interaction.high.item()) == (0.0, 0.0)


def test_a_broken_loss_breaks_nothing_but_its_number(labels: SampleGroups) -> None:
    on, off, full = normal(15, 2, 40, mean=1.0), normal(16, 2, 40, mean=1.0), normal(17, 40, mean=2.0)
    on[0, 0] = np.nan
    parts = part_and_rest(on, off, full, np.full((2, 40), 0.5), labels)
    assert np.isnan(parts.share.estimate).tolist() == [[True, True, False], [False] * 3]
    assert not parts.separable[0, :2].any()
    assert parts.resolved.all()


def test_parts_are_those_of_the_reference(reference: ModuleType) -> None:
    """A whole experiment by another hand: the same folds, weights, losses and intervals."""
    rng = np.random.default_rng(2)
    case, labels = newton_step(rng), groups_of_two(256)
    features = rng.standard_normal((256, 200)) * np.sqrt(case.spectrum)
    targets = features @ case.optimum + 0.5 * rng.standard_normal(256)

    def losses(weights: np.ndarray) -> np.ndarray:
        return (targets - features @ weights) ** 2 / 2

    gradients = -targets[:, None] * features
    full, arms = reference.experiment(
        gradients, losses, case.start, case.update, labels.group, (4,), splits=1, crossfit=True
    )
    theirs = reference.summarise(full, arms[4], labels.group)
    on, off, captured = (arms[4][name][None] for name in ("on", "off", "c"))
    ours = part_and_rest(on, off, full, captured, labels)
    names = {"interaction": "interaction", "excess": "excess", "share": "share", "suff": "sufficiency"}
    for name, field in (names | {"nec": "necessity"}).items():
        estimate = getattr(ours, field)
        numbers = [part.item() for part in (estimate.estimate, estimate.low, estimate.high)]
        np.testing.assert_allclose(numbers, theirs[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert ours.captured.item() == pytest.approx(theirs["c"], rel=1e-12)


# ---- ratios ----


@pytest.mark.parametrize("splits", [1, 3])
def test_ratio_holds_what_the_interval_of_the_difference_holds(labels: SampleGroups, splits: int) -> None:
    """Brute force: r is in the interval exactly where the mean of top − r·bottom may be 0."""
    top, bottom = normal(18, splits, 1, 40, mean=1.0), normal(19, 40, mean=1.5)
    result = ratio_of_means(top, bottom, labels)
    grid = np.linspace(-3, 4, 2001)
    differences = effects(top - grid[:, None] * bottom, labels)
    holds = (differences.low <= 0) & (differences.high >= 0)
    assert np.isfinite(result.low[0]).all()
    np.testing.assert_array_equal((grid[:, None] >= result.low[0]) & (grid[:, None] <= result.high[0]), holds)
    np.testing.assert_allclose(
        result.estimate[0], effects(top, labels).estimate[0] / effects(bottom[None], labels).estimate[0], rtol=1e-12
    )


def test_ratio_is_that_of_the_reference_where_groups_are_alike(reference: ModuleType) -> None:
    labels, top, bottom = groups_of_two(30), normal(20, 1, 30), normal(21, 30, mean=2.0)
    result = ratio_of_means(top, bottom, labels)
    numbers = [part.item() for part in (result.estimate, result.low, result.high)]
    np.testing.assert_allclose(numbers, reference.ratio_int(top[0], bottom, labels.group), rtol=1e-9)


@given(scale=st.floats(-1e6, 1e6).filter(lambda value: abs(value) > 1e-6))
def test_ratio_is_free_of_the_units(scale: float) -> None:
    labels, top, bottom = groups_of_two(30), normal(22, 1, 30), normal(23, 30, mean=2.0)
    one, other = ratio_of_means(top, bottom, labels), ratio_of_means(scale * top, scale * bottom, labels)
    for part in ("estimate", "low", "high"):
        np.testing.assert_allclose(getattr(other, part), getattr(one, part), rtol=1e-9)


def test_ratio_to_what_may_be_zero_does_not_exist(labels: SampleGroups) -> None:
    bottom = normal(24, 40)
    whole = effects(bottom[None], labels)
    assert ((whole.low < 0) & (whole.high > 0)).all()
    result = ratio_of_means(normal(25, 1, 40, mean=5.0), bottom, labels)
    assert np.isnan([result.estimate, result.low, result.high]).all()


# ---- how many groups ----


def test_required_groups_are_those_of_the_normal_test() -> None:
    values, labels = normal(27, 1, 50, mean=0.2), SampleGroups.of_one_task(np.arange(50))
    expected = np.ceil((2.8 * values.std(ddof=1) / values.mean()) ** 2)
    assert required_groups(values, labels).item() == expected
    assert required_groups(values * 1e6, labels).item() == expected


def test_required_groups_find_the_effect_four_times_out_of_five() -> None:
    groups = int(np.ceil((2.8 / 0.4) ** 2))
    values = normal(28, 4000, groups, mean=0.4)
    resolved = effects(values, SampleGroups.of_one_task(np.arange(groups))).low > 0
    assert 0.76 <= resolved.mean() <= 0.82


def test_at_least_two_groups_are_required() -> None:
    values = 1 + normal(29, 1, 10) / 1e6
    assert required_groups(values, SampleGroups.of_one_task(np.arange(10))).item() == 2
    assert np.isnan(required_groups(np.zeros((1, 10)), SampleGroups.of_one_task(np.arange(10)))).all()
