"""The checkpoint to keep, by losses of trainings whose population is known."""

import json

import numpy as np
import pytest
import xarray as xr

from dynamics import choose_checkpoint
from tests.dynamics.relate.simulated_trainings import STEPS, Training, losses_of

TASKS = ("vqa", "wiki")


def drawn(seed=0, **options):
    return Training(**options).draw(np.random.default_rng(seed))


def small(**tasks):
    """Losses over steps 0, 100, … of each task: the same mean in each of eight groups, and a noise of 0.01."""
    rng = np.random.default_rng(0)
    curves = np.repeat(np.array(list(tasks.values()), dtype=float).T, 8, axis=1)
    values = curves + 0.01 * rng.standard_normal(curves.shape)
    steps = [100 * number for number in range(len(values))]
    names = np.repeat(list(tasks), 8)
    return losses_of(values, None, names, [*range(8)] * len(tasks), steps=steps)


def row(choice, name):
    return next(candidate for candidate in choice["candidates"] if candidate["name"] == name)


# ---- the value, the choice, and what cannot be told from it ----


def test_the_value_is_what_new_tasks_improved_less_what_retained_tasks_lost():
    data = drawn().assign_coords(sample_group=("sample", ["a"] * 192))  # one group: all samples choose
    choice = choose_checkpoint(data, retained_weight=2.0)
    new, retained = (data["sample_loss"].sel(sample=data["sample_task"] == task).mean("sample") for task in TASKS)
    improved, lost = (new[0] - new) / new[0], (retained - retained[0]) / retained[0]
    steps = [candidate for candidate in choice["candidates"] if candidate["kind"] != "scaled"]
    assert [candidate["value"] for candidate in steps] == pytest.approx((improved - 2 * lost).values)
    assert [candidate["new"] for candidate in steps] == pytest.approx(improved.values)
    assert [candidate["retained"] for candidate in steps] == pytest.approx(-lost.values)
    assert [candidate["step"] for candidate in steps] == list(STEPS)
    assert (choice["samples"], choice["groups"]) == (192, 1)


def test_the_best_checkpoint_is_chosen_and_those_beside_it_are_named():
    data = small(vqa=[4.0, 3.0, 2.0, 2.0, 2.9], wiki=[2.0, 2.0, 2.0, 2.0, 2.0])
    data["sample_loss"][3] = data["sample_loss"][2]
    choice = choose_checkpoint(data)
    assert (choice["best"], choice["within_one_standard_error"]) == ("step 200", ["step 300"])
    assert choice["reported"]["low"] < 0.5 < choice["reported"]["high"]


@pytest.mark.parametrize(("weight", "best"), [(0.0, "step 200"), (1.0, "step 100"), (50.0, "start")])
def test_the_trade_off_decides(weight, best):
    data = small(vqa=[4.0, 3.0, 2.8], wiki=[2.0, 2.05, 2.3])
    assert choose_checkpoint(data, retained_weight=weight)["best"] == best


def test_a_checkpoint_that_is_worse_in_both_is_dominated():
    choice = choose_checkpoint(small(vqa=[4.0, 3.0, 3.5, 2.5], wiki=[2.0, 2.1, 2.4, 2.3]))
    assert choice["not_dominated"] == ["start", "step 100", "step 300"]
    assert row(choice, "step 200")["dominated"]


def test_the_best_is_never_dominated():
    for seed in range(20):
        choice = choose_checkpoint(drawn(seed, noise=1.5), retained_weight=seed / 10)
        assert choice["best"] in choice["not_dominated"]


def test_a_shorter_last_step_can_be_the_best():
    data = small(vqa=[4.0, 3.9, 3.9], wiki=[2.0, 2.5, 2.9])
    half = np.concatenate([np.full(8, 3.0), np.full(8, 2.0)])
    data = data.assign_coords(scale=[0.5, 1.0]).assign(scaled_loss=(("scale", "sample"), [half, half]))
    choice = choose_checkpoint(data.assign_attrs(scaled_step=200))
    assert choice["best"] == "0.5 × the update at step 200"
    assert [candidate["kind"] for candidate in choice["candidates"]] == ["start", "step", "step", "scaled"]


def test_keeping_none_is_an_answer():
    choice = choose_checkpoint(small(vqa=[4.0, 4.5, 5.0], wiki=[2.0, 2.2, 2.4]))
    assert choice["best"] == "start"
    assert choice["within_one_standard_error"] == []
    assert (choice["reported"]["value"], choice["reported"]["low"]) == (0.0, 0.0)
    assert all(candidate["high"] < 0 for candidate in choice["candidates"][1:])


# ---- one half chooses, the other reports ----


def test_the_half_that_judges_has_no_part_in_the_choice():
    data = drawn(noise=1.2)
    choice = choose_checkpoint(data)
    groups = np.unique(data["sample_group"].values)
    judges = []
    for group in groups:
        changed = data.copy(deep=True)
        changed["sample_loss"][0, data["sample_group"].values == group] *= 1.01
        other = choose_checkpoint(changed)
        judges += [group] if other["candidates"] == choice["candidates"] else []
        assert other["best"] == choice["best"]
        assert (other["reported"] == choice["reported"]) == (other["candidates"] != choice["candidates"])
    assert len(judges) == len(groups) / 2


def test_another_seed_makes_other_halves():
    data = drawn(noise=1.2)
    assert choose_checkpoint(data, seed=1)["candidates"] != choose_checkpoint(data)["candidates"]
    assert choose_checkpoint(data) == choose_checkpoint(data)


def simulated(draws, **options):
    """Value reported, naive value, and truth of the chosen candidate, with whether intervals hold it, draw by draw."""
    training, rng = Training(noise=1.2, samples=2, **options), np.random.default_rng(1)
    rows = []
    for _ in range(draws):
        choice = choose_checkpoint(training.draw(rng))
        best = [candidate["name"] for candidate in choice["candidates"]].index(choice["best"])
        reported, truth = choice["reported"], training.value[best]
        holds = reported["low"] <= truth <= reported["high"]
        tasks = zip(reported["tasks"], training.improvement[best], strict=True)
        together = all(task["low"] <= value <= task["high"] for task, value in tasks)
        naive = choice["candidates"][best]["value"]
        rows.append((holds, together, reported["value"] - truth, naive - truth))
    return np.array(rows, dtype=float)


@pytest.mark.parametrize("options", [{}, {"unequal": True}], ids=["equal", "unequal"])
def test_reported_intervals_hold_the_truth_and_naive_values_flatter(options):
    holds, together, error, flattery = simulated(400, **options).T
    assert holds.mean() >= 0.93
    assert together.mean() >= 0.93
    standard_error = error.std() / np.sqrt(len(error))
    assert abs(error.mean()) < 4 * standard_error
    assert flattery.mean() > 0.01 + abs(error.mean())


def test_the_choice_lies_within_one_standard_error_of_the_oracles_in_18_of_20_runs():
    training, rng = Training(), np.random.default_rng(0)
    names = None
    near = []
    for _ in range(20):
        data = training.draw(rng)
        choice = choose_checkpoint(data)
        names = names or [candidate["name"] for candidate in choice["candidates"]]
        oracle, best = int(np.argmax(training.value)), names.index(choice["best"])
        # The paired difference between the two, per group of both tasks, over the groups of one half.
        losses = np.concatenate([data["sample_loss"].values, data["scaled_loss"].values])
        vqa, wiki = ((data["sample_task"] == task).values for task in TASKS)
        relative = losses[:, vqa] / losses[0, vqa].mean() + losses[:, wiki] / losses[0, wiki].mean()
        by_group = (relative[best] - relative[oracle]).reshape(training.groups, -1).mean(1)
        error = by_group.std(ddof=1) / np.sqrt(training.groups / 2)
        near.append(training.value[oracle] - training.value[best] <= error)
    assert sum(near) >= 18


# ---- what is missing or odd ----


def test_one_checkpoint_is_kept_or_not():
    assert choose_checkpoint(small(vqa=[4.0, 3.0], wiki=[2.0, 2.0]))["best"] == "step 100"
    assert choose_checkpoint(small(vqa=[4.0, 4.3], wiki=[2.0, 2.0]))["best"] == "start"


def test_without_a_checkpoint_there_is_no_choice():
    choice = choose_checkpoint(small(vqa=[4.0]))
    assert (choice["best"], choice["reason"]) == (None, "no checkpoint after the start has finite losses")


def test_new_tasks_alone_choose_by_themselves():
    choice = choose_checkpoint(small(vqa=[4.0, 3.0, 2.5], report=[2.0, 1.9, 1.5]))
    assert (choice["best"], choice["retained"]) == ("step 200", [])
    assert row(choice, "step 200")["retained"] is None
    assert row(choice, "step 200")["value"] == row(choice, "step 200")["new"]


def test_retained_tasks_alone_choose_nothing_and_report_the_last_step():
    data = small(wiki=[2.0, 2.2, 2.5])
    choice = choose_checkpoint(data)
    assert (choice["best"], choice["reason"]) == (None, "every task is retained")
    (task,) = choice["reported"]["tasks"]
    assert choice["reported"]["candidate"] == "step 200"
    assert task["low"] < -0.25 < task["high"] < 0


def test_tasks_can_be_called_retained():
    data = small(vqa=[4.0, 3.0], old=[2.0, 2.2])
    assert choose_checkpoint(data, retained=["old"])["retained"] == ["old"]
    with pytest.raises(ValueError, match=r"^retained: expected tasks among vqa, old, got 'new'\.$"):
        choose_checkpoint(data, retained=["new"])


def test_too_few_groups_choose_and_report_nothing():
    data = drawn(groups=3)
    choice = choose_checkpoint(data)
    assert choice["reported"] is None
    assert choice["within_one_standard_error"] is not None
    assert choice["caveats"] == ["No other half judges the choice: a task has samples of 3 groups only; 4 are needed."]
    lone = choose_checkpoint(data.assign_coords(sample_group=("sample", ["a"] * data.sizes["sample"])))
    assert lone["best"] is not None
    assert lone["within_one_standard_error"] is None
    assert row(lone, lone["best"])["low"] is None


def test_a_checkpoint_that_exploded_is_no_candidate():
    data = small(vqa=[4.0, 3.0, 1.0], wiki=[2.0, 2.0, 2.0])
    data["sample_loss"][2, 3] = np.nan
    choice = choose_checkpoint(data)
    assert (choice["best"], choice["left_out"]) == ("step 100", ["step 200: a loss is not finite"])
    json.dumps(choice, allow_nan=False)


def test_a_sample_without_a_loss_at_the_start_is_left_out():
    data = small(vqa=[4.0, 3.0, 2.0], wiki=[2.0, 2.0, 2.0])
    expected = choose_checkpoint(data.isel(sample=slice(1, None)))
    data["sample_loss"][:, 0] = np.nan
    choice = choose_checkpoint(data)
    assert choice["left_out"] == ["1 sample without a finite loss at the start"]
    assert choice["candidates"] == expected["candidates"]


def test_nothing_but_nan_is_no_choice():
    choice = choose_checkpoint(small(vqa=[4.0, 3.0], wiki=[2.0, 2.0]) * np.nan)
    assert (choice["best"], choice["reason"]) == (None, "no task has a finite, positive loss at the start")


def test_a_task_without_loss_at_the_start_is_left_out():
    data = small(vqa=[4.0, 3.0], wiki=[2.0, 2.0])
    data["sample_loss"][:, data["sample_task"].values == "wiki"] = 0.0
    choice = choose_checkpoint(data)
    assert (choice["tasks"], choice["left_out"]) == (["vqa"], ["wiki: its loss at the start is not positive"])


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match=r"^retained_weight: expected a number that is not negative, got"):
        choose_checkpoint(small(vqa=[4.0, 3.0]), retained_weight=weight)


def test_another_group_of_the_result_is_refused():
    with pytest.raises(ValueError, match=r"^Expected the group /loss or /score of a run \(.*\), got gini\.$"):
        choose_checkpoint(xr.Dataset({"gini": ("step", [1.0])}))
