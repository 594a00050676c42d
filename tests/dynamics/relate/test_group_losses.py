"""Losses by group: improvements, their jackknife and halves, each beside a slow twin."""

import numpy as np
import pytest

from dynamics.relate.group_losses import GroupedLosses

TASKS = ["vqa", "wiki"]


def losses(seed=0, sizes=(1, 2, 3, 4, 5, 6), candidates=4):
    """Losses ``[candidate, sample]`` with tasks and groups; each group has samples of both tasks."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)) * 7, np.array(sizes) * 2)
    task = np.concatenate([np.repeat(TASKS, size) for size in sizes])
    return rng.lognormal(0, 0.5, (candidates, len(group))), task, group


def improvement(values, task):
    """Improvement of each task, sample means by hand."""
    means = np.stack([values[:, task == name].mean(1) for name in TASKS], axis=1)
    return (means[0] - means) / means[0]


def test_improvements_are_those_of_sample_means():
    values, task, group = losses()
    grouped = GroupedLosses.of(values, task, group, TASKS)
    assert grouped.improvement == pytest.approx(improvement(values, task))
    assert grouped.counts.sum(0).tolist() == [21, 21]
    assert (grouped.improvement[0] == 0).all()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.3, -2.0)])
def test_covariances_are_those_of_leaving_out_each_group_by_hand(weights):
    values, task, group = losses()
    weights = np.array(weights)
    left_out = np.stack([improvement(values[:, group != name], task[group != name]) @ weights for name in set(group)])
    expected = np.cov(left_out.T) * (len(left_out) - 1) ** 2 / len(left_out)
    assert GroupedLosses.of(values, task, group, TASKS).covariance(weights) == pytest.approx(expected)


def test_groups_without_a_task_do_not_count_for_it():
    values, task, group = losses()
    extra = np.concatenate([task, ["wiki"] * 3]), np.concatenate([group, [100, 101, 102]])
    grouped = GroupedLosses.of(np.concatenate([values, np.ones((4, 3))], axis=1), *extra, TASKS)
    plain = GroupedLosses.of(values, task, group, TASKS)
    vqa = np.array([1.0, 0.0])
    assert grouped.covariance(vqa) == pytest.approx(plain.covariance(vqa))
    assert grouped.freedom(vqa) == pytest.approx(plain.freedom(vqa))


@pytest.mark.parametrize("lone", ["one group", "all samples of a task in one group"])
def test_without_a_second_group_there_is_no_interval(lone):
    values, task, group = losses()
    group = np.zeros_like(group) if lone == "one group" else np.where(task == "vqa", 0, group)
    value, low, high = GroupedLosses.of(values, task, group, TASKS).interval(1, np.ones(2), 0.05)
    assert np.isfinite(value)
    assert np.isnan([low, high]).all()


def test_effective_groups_are_all_where_alike_and_few_where_one_has_most():
    even = GroupedLosses(np.ones((2, 9, 1)), np.ones((9, 1)))
    assert even.freedom(np.ones(1)) == pytest.approx(8)
    sums = np.ones((2, 9, 1))
    sums[:, 0] = 100
    assert GroupedLosses(sums, np.ones((9, 1))).freedom(np.ones(1)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_halves_are_alike_in_size_and_have_every_task(seed):
    values, task, group = losses(sizes=(40, 40, 9, 8, 2, 2, 1, 1))
    apart = np.where(task == "vqa", group, group + 1000)  # no group has both tasks
    for names in (group, apart):
        grouped = GroupedLosses.of(values, task, names, TASKS)
        first = grouped.halves(seed)
        assert first.sum() == len(first) / 2
        assert np.array_equal(first, grouped.halves(seed))
        ours, theirs = (grouped.part(half).counts.sum(0) for half in (first, ~first))
        assert (np.abs(ours - theirs) <= 1).all()


def test_odd_groups_of_several_kinds_go_in_turns():
    counts = np.repeat(np.eye(4), [3, 3, 3, 3], axis=0)
    first = GroupedLosses(np.ones((2, 12, 4)), counts).halves(0)
    assert first.sum() == 6
    assert set(counts[first].sum(0)) <= {1, 2}
