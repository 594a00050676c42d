from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics.fisher.samples import SampleGroups
from dynamics.fisher.task_structure import (
    _exchanged,
    _some_groups,
    decompose,
    divergence_test,
    purity_gap,
    with_equal_traces,
)
from tests.dynamics.fisher.simulated import gradients, grams, power_law, within_three_errors


def parts_of(gram, member):
    """Parts for one assignment, ``[block]``."""
    parts = decompose(gram[None], member.argmax(1)[None])
    return SimpleNamespace(**{name: part[0] for name, part in vars(parts).items()})


def two_tasks(samples, per_group=1):
    member = np.repeat(np.eye(2, dtype=bool), samples, axis=0)
    return SampleGroups(np.arange(2 * samples) // per_group, member)


@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(1, 5))
def test_divergence_lies_between_zero_and_the_entropy_of_weights(seed, tasks, directions):
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.arange(tasks), rng.integers(0, tasks, 8)])
    rows = rng.standard_normal((1, len(label), directions)) * rng.exponential(1.0, len(label))[:, None]
    found = parts_of(grams(rows), label[:, None] == np.arange(tasks))
    assert 0 <= found.divergence[0] <= found.largest[0] + 1e-9
    assert found.within + found.divergence == pytest.approx(found.mixture, abs=1e-9)


def test_rotated_covariances_in_closed_form():
    """Two dimensions: f = ½(I + s n·σ), and the mixture of two has ½(1 ± s cos φ) for a rotation by φ."""
    share, angle = 0.9, 0.5
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    one = np.sqrt(np.diag([share, 1 - share]))
    rows = np.concatenate([one, one @ rotation.T])[None]
    found = parts_of(grams(rows), np.repeat(np.eye(2, dtype=bool), 2, axis=0))

    def entropy(p):
        return -(p * np.log(p) + (1 - p) * np.log(1 - p))

    mixture = entropy(0.5 * (1 + (2 * share - 1) * np.cos(angle)))
    assert found.mixture[0] == pytest.approx(mixture, rel=1e-12)
    assert found.within[0] == pytest.approx(entropy(share), rel=1e-12)
    assert found.divergence[0] == pytest.approx(mixture - entropy(share), rel=1e-10)
    assert found.largest[0] == pytest.approx(np.log(2), rel=1e-12)


def test_the_same_fisher_has_no_divergence_and_disjoint_ones_all():
    rows = np.eye(4)[None]
    member = np.repeat(np.eye(2, dtype=bool), 2, axis=0)
    assert parts_of(grams(rows), member).divergence[0] == pytest.approx(np.log(2))
    same = np.concatenate([np.eye(2), np.eye(2)])[None]
    assert parts_of(grams(same), member).divergence[0] == pytest.approx(0, abs=1e-12)


def test_a_task_without_gradient_has_no_weight():
    rows = np.concatenate([np.eye(2), np.zeros((2, 2))])[None]
    found = parts_of(grams(rows), np.repeat(np.eye(2, dtype=bool), 2, axis=0))
    assert found.divergence[0] == found.largest[0] == 0


def test_parts_are_those_of_explicit_matrices():
    rng = np.random.default_rng(0)
    rows = gradients(rng, 1, 9, np.ones(5))[0]
    task = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])

    def entropy(fisher):
        shares = np.linalg.eigvalsh(fisher / np.trace(fisher))
        return -np.sum(shares * np.log(np.maximum(shares, 1e-300)))

    fishers = [rows[task == code].T @ rows[task == code] for code in range(3)]
    weights = np.array([np.trace(fisher) for fisher in fishers]) / np.trace(sum(fishers))
    found = parts_of(grams(rows[None]), task[:, None] == np.arange(3))
    assert found.mixture[0] == pytest.approx(entropy(sum(fishers)))
    assert found.within[0] == pytest.approx(weights @ [entropy(fisher) for fisher in fishers])
    assert found.largest[0] == pytest.approx(-(weights * np.log(weights)).sum())


def test_equal_traces_are_those_of_scaled_gradients():
    rng = np.random.default_rng(1)
    rows = gradients(rng, 1, 6, np.ones(4)) * np.array([5, 5, 5, 1, 1, 1])[:, None]
    task = np.repeat([0, 1], 3)
    sizes = np.array([(rows[0, task == code] ** 2).sum(1).mean() for code in task])
    np.testing.assert_allclose(with_equal_traces(grams(rows), task[None])[0], grams(rows / np.sqrt(sizes)[:, None]))


def divergence_one_by_one(rows, task):
    """χ of one assignment after each task's gradients were made equally large, from explicit Fisher matrices."""

    def entropy(fisher):
        shares = np.maximum(np.linalg.eigvalsh(fisher) / np.trace(fisher), 0)
        return -np.sum(shares[shares > 0] * np.log(shares[shares > 0]))

    def scaled(of_task):
        size = np.mean((of_task**2).sum(1))
        return of_task / np.sqrt(size) if size else of_task

    parts = [scaled(rows[task == code]) for code in np.unique(task)]
    fishers = [part.T @ part for part in parts if part.any()]
    pooled = sum(fishers)
    return entropy(pooled) - sum(np.trace(f) / np.trace(pooled) * entropy(f) for f in fishers)


@pytest.mark.parametrize("most_bytes", [1, 6000, 2**24])
@pytest.mark.parametrize("per_task", [(6, 6), (2, 3, 7)])
def test_band_is_that_of_permutations_one_by_one(monkeypatch, most_bytes, per_task):
    """Groups of one to three samples, so that tasks change their sizes; the last task has one group with the first."""
    monkeypatch.setattr(import_module("dynamics.fisher.task_structure"), "_MOST_BYTES", most_bytes)
    rng = np.random.default_rng(8)
    task, group = np.repeat(np.arange(len(per_task)), per_task), np.array([0, 1, 2, 2, 3, 3, 4, 5, 5, 5, 6, 0])
    rows = gradients(rng, 5, 12, power_law(6)) * np.where(task == 0, 4.0, 1.0)[:, None]
    rows[1, task == 0] = 0
    rows[2] = 0
    rows[3, :, 1:] = 0
    labels = SampleGroups(group, task[:, None] == np.arange(len(per_task)))
    found = divergence_test(grams(rows), labels, permutations=19, seed=9)
    generator = np.random.default_rng(9)
    shuffled = [_exchanged(task, group, 1, generator)[0] for _ in range(19)]
    for block in (0, 1, 3, 4):
        squares = (rows[block] ** 2).sum(1)
        medians = np.array([np.median(squares[task == code]) for code in task])
        aligned = rows[block] / np.sqrt(np.where(medians > 0, medians, 1))[:, None]
        null = np.array([divergence_one_by_one(aligned, permuted) for permuted in shuffled])
        observed = divergence_one_by_one(rows[block], task)
        np.testing.assert_allclose(found.divergence[block], observed, rtol=0, atol=1e-12)
        expected = [*np.quantile(null, (0.025, 0.975)), (1 + (null >= observed - 1e-12).sum()) / 20]
        measured = [part[block] for part in (found.low, found.high, found.p_value)]
        np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-12)
    assert np.isnan([found.divergence[2], found.p_value[2]]).all()


def divergence_of(rng, sets, samples, ratio, spread, *, disjoint=False, per_group=1):
    """χ's test of two tasks, one Fisher or none in common; norms of the first are ``ratio`` times those of the other.

    ``spread`` is the standard deviation of the logarithm of squared norms within a task.
    """
    rows = gradients(rng, sets, 2 * samples, power_law(100), 0.0, per_group, 0.7 if per_group > 1 else 0.0)
    rows *= np.exp(spread / 2 * rng.standard_normal((sets, 2 * samples, 1)))
    if disjoint:
        rows[:, :samples, ::2] = rows[:, samples:, 1::2] = 0
    rows[:, :samples] *= ratio
    return divergence_test(grams(rows), two_tasks(samples, per_group), permutations=39)


@pytest.mark.parametrize(
    ("ratio", "spread", "per_group"), [(1, 0, 1), (3, 0, 1), (30, 0, 1), (1, 2, 1), (30, 2, 1), (30, 1, 4)]
)
def test_size_holds_whatever_the_norms(ratio, spread, per_group):
    """2.5 standard errors about 0.05 with 100 data sets; 500 in tests/benchmarks/calibration.py."""
    found = divergence_of(np.random.default_rng(2), 100, 20, ratio, spread, per_group=per_group)
    assert (found.p_value <= 0.05).mean() <= 0.11
    assert (found.p_value <= 0.5).mean() >= 0.36  # nor conservative
    assert (found.high <= np.log(2)).all()


@pytest.mark.parametrize(("ratio", "spread"), [(1, 0), (30, 0), (10, 2)])
def test_disjoint_tasks_are_found_whatever_their_norms(ratio, spread):
    found = divergence_of(np.random.default_rng(3), 20, 32, ratio, spread, disjoint=True)
    assert (found.p_value <= 0.05).all()
    np.testing.assert_allclose(found.divergence, np.log(2))
    assert (found.high < found.divergence).all()


def test_norms_of_a_task_as_a_whole_do_not_matter():
    rows = gradients(np.random.default_rng(4), 1, 24, power_law(20))
    scale = np.repeat([100.0, 1.0], 12)[:, None]
    plain, scaled = (divergence_test(grams(part), two_tasks(12)) for part in (rows, rows * scale))
    for name in ("divergence", "largest", "low", "high", "p_value"):
        np.testing.assert_allclose(getattr(plain, name), getattr(scaled, name), rtol=1e-9)


@pytest.mark.parametrize("nested", [True, False])
def test_band_holds_the_divergence_of_one_fisher(nested):
    """Groups of two: of one task each, or of one sample of each task."""
    rng = np.random.default_rng(1)
    gram = grams(gradients(rng, 60, 24, np.ones(8), per_group=2, correlation=0.7))
    task = np.arange(24) // 12 if nested else np.arange(24) % 2
    found = divergence_test(gram, SampleGroups(np.arange(24) // 2, task[:, None] == np.arange(2)), permutations=60)
    assert ((found.low <= found.divergence) & (found.divergence <= found.high)).mean() >= 0.88
    assert (found.p_value <= 0.05).mean() <= 0.12
    assert found.divergence.mean() > 0.05  # biased away from the truth, 0: and not corrected


def test_one_group_of_several_tasks_does_not_keep_the_others_from_being_exchanged():
    rng = np.random.default_rng(5)
    rows = gradients(rng, 1, 32, power_law(40))
    task = np.repeat([0, 1], 16)
    rows[:, task == 0, ::2] = rows[:, task == 1, 1::2] = 0
    group = np.arange(32)
    group[16] = 0  # one image with both tasks
    assert divergence_test(grams(rows), SampleGroups(group, task[:, None] == np.arange(2))).p_value == 0.01


def test_of_many_samples_whole_groups_are_tested(monkeypatch):
    rows = gradients(np.random.default_rng(6), 1, 48, power_law(30), per_group=4, correlation=0.5)
    labels, seed = two_tasks(24, per_group=4), 3
    monkeypatch.setattr(import_module("dynamics.fisher.task_structure"), "MOST_SAMPLES", 30)
    found = divergence_test(grams(rows), labels, permutations=9, seed=seed)
    chosen = _some_groups(labels.group, np.random.default_rng(seed))
    assert len(chosen) == 28  # seven groups of four
    assert set(np.bincount(labels.group[chosen])) == {0, 4}
    task = labels.member.argmax(1)[chosen]
    expected = decompose(with_equal_traces(grams(rows[:, chosen]), task[None]), task[None])
    np.testing.assert_allclose(found.divergence, expected.divergence[0])
    np.testing.assert_allclose(found.largest, expected.largest[0])


def test_many_samples_find_disjoint_tasks_and_no_others():
    rng = np.random.default_rng(7)
    same = divergence_of(rng, 8, 160, 3, 1)
    disjoint = divergence_of(rng, 8, 160, 3, 1, disjoint=True)
    assert (same.p_value <= 0.05).mean() <= 0.25
    assert (disjoint.p_value <= 0.05).all()


def test_exchanges_keep_groups_whole():
    rng = np.random.default_rng(3)
    group = np.array([7, 7, 3, 3, 3, 5])
    (nested,) = _exchanged(np.array([0, 0, 1, 1, 1, 0]), group, 1, rng)
    assert all(len(set(nested[group == code])) == 1 for code in (7, 3, 5))
    mixed = np.array([0, 1, 1, 0, 2, 1])
    exchanged = _exchanged(mixed, group, 20, rng)
    assert all(sorted(new[group == code]) == sorted(mixed[group == code]) for new in exchanged for code in (7, 3, 5))
    assert any((new != mixed).any() for new in exchanged)
    partly = np.array([0, 0, 1, 1, 2, 1])  # the group 3 holds two tasks, 7 and 5 one each
    exchanged = _exchanged(partly, group, 20, rng)
    assert {tuple(new[group != 3]) for new in exchanged} == {(0, 0, 1), (1, 1, 0)}
    assert all(sorted(new[group == 3]) == [1, 1, 2] for new in exchanged)


def test_no_band_where_no_exchange_is_possible():
    gram = np.eye(2)[None]
    labels = SampleGroups(np.zeros(2, int), np.array([[True], [True]]))
    found = divergence_test(gram, labels)
    assert all(np.isnan(part).all() for part in (found.low, found.high, found.p_value))


def test_purity_gap_is_nearly_unbiased():
    rng = np.random.default_rng(4)
    gram = grams(gradients(rng, 600, 64, np.array([4.0, 2.0, 1.0, 1.0])))
    found = purity_gap(gram, two_tasks(32))
    assert within_three_errors(found.gap.estimate, 0.0)
    assert found.sharing.mean() == pytest.approx(1, abs=0.02)
    assert 0.90 <= ((found.gap.low <= 0) & (found.gap.high >= 0)).mean() <= 0.99
    halves = [np.array([2.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 2.0, 1.0])]
    disjoint = grams(np.concatenate([gradients(rng, 100, 32, half) for half in halves], axis=1))
    assert purity_gap(disjoint, two_tasks(32)).sharing.mean() == pytest.approx(0, abs=0.02)
