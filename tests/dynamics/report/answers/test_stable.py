"""What is answered to "may I stop?" of simulated trainings, and of results with gaps and hostile names."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import numpy as np
import pytest
import xarray as xr

from dynamics.findings import Finding
from dynamics.relate.stability import Training
from dynamics.report.answers.stable import may_training_stop
from dynamics.report.summary import summarise
from tests.trainings import KINDS, trainings
from tests.trees import HOSTILE, example_tree


@cache
def simulated(name: str) -> Training:
    return next(trainings(KINDS[name][0], np.random.default_rng(0), 1))


def tree_of(training: Training, *, evaluation: str = "eval_loss", earlier: int = 0) -> xr.DataTree:
    """A result of this training, after so many checkpoints of an earlier one with a steeply falling loss."""
    steps, before = training.step + 1000 * (earlier > 0), 10 * np.arange(1, earlier + 1)
    tree = example_tree(
        [*before.tolist(), *steps.tolist()], 2, segment=[0] * earlier + [1 if earlier else 0] * len(steps)
    )
    increment = np.full((len(before) + len(steps), 2), np.nan)
    increment[earlier:, 1] = training.moved
    update = tree["update"].to_dataset()
    origin = np.concatenate([np.full(earlier, -1), training.moved_from + 1000 * (earlier > 0)])
    update = update.assign(frobenius_norm_all=update["frobenius_norm_all"].copy(data=increment))
    tree["update"] = update.assign_coords(from_step=("step", origin))
    if len(steps) > 1:
        tree["path"] = xr.Dataset(
            {"gram": (("step", "step_"), training.gram)},
            {"step": steps, "step_segment": ("step", np.full(len(steps), 1 if earlier else 0))},
        )
    old = np.stack([np.linspace(9, 1, 30), np.ones(30)], 1) if earlier else np.empty((0, 2))
    value = np.concatenate([old, np.stack([training.loss, training.learning_rate], 1)])
    rows = np.concatenate([np.arange(len(old)), training.log_step + 1000 * (earlier > 0)])
    tree["training"] = xr.Dataset(
        {"value": (("log", "metric"), value)},
        {
            "metric": ["loss", "learning_rate"],
            "log_step": ("log", rows),
            "log_segment": ("log", np.repeat([0, 1 if earlier else 0], [len(old), len(training.loss)])),
        },
    )
    if len(training.evaluation):
        tree["score"] = xr.Dataset(
            {"score": (("step", "task"), training.evaluation[:, None])},
            {"step": training.evaluation_step + 1000 * (earlier > 0), "task": [evaluation]},
        )
    return tree


def answered(tree: xr.DataTree, **changes):
    summary = {"segments": list(dict.fromkeys(tree["update"]["segment"].values.tolist())), "findings": [], **changes}
    answer = may_training_stop(tree, summary)
    json.dumps(answer.to_json(), allow_nan=False)
    for evidence in answer.evidence:
        assert evidence.path.removeprefix("/") in tree or tree[evidence.path] is not None
    return answer


@pytest.mark.parametrize(
    ("name", "verdict", "words"),
    [
        (
            "far from the optimum, SGD",
            "no",
            "Training is stable and still moves: increments over steps 200 to 400 agree",
        ),
        ("far, Adam", "no", "agree in direction (mean cosine 0.70"),
        ("far, cosine schedule", "mixed", "The schedule has ended (learning rate at 0.0 % of its peak) while training"),
        ("far, schedule decayed early", "mixed", "a longer schedule could go further."),
        ("stationary noise, SGD", "yes", "do not agree in direction (mean cosine −0.0"),
        ("stationary noise, cosine schedule", "yes", "peak), and training wanders: increments"),
        ("converged without noise", "yes", "Training is at rest: its newest increment has 0.0"),
        ("diverging", "mixed", "Training is unstable: "),
        ("one spike", "mixed", "Training is unstable: the loss has 1 spike in its newest half."),
        ("overfitting while the loss falls", "mixed", "keep the earlier checkpoint."),
        ("3 checkpoints, stationary", "undecided", "cannot be told from 3 measured steps and 80 rows of the log."),
    ],
)
def test_a_simulated_training_is_answered(name, verdict, words):
    answer = answered(tree_of(simulated(name)))
    assert answer.verdict == verdict
    assert words in answer.answer
    assert answer.answer.endswith(".")
    assert (answer.surer != "") == (verdict == "undecided")
    assert answer.sure == (0.95 if "agree in direction" in answer.answer else None)


def test_the_answer_is_about_the_newest_of_several_trainings():
    answer = answered(tree_of(simulated("stationary noise, SGD"), earlier=3))
    assert answer.answer.startswith("Of 2 trainings in this folder, the newest: training wanders: ")
    assert "over steps 1,400 to 1,800" in answer.answer


def test_one_checkpoint_without_a_log_is_not_asked():
    tree = example_tree([100], 2)
    assert answered(tree).verdict == "not_asked"
    assert "Log loss and learning rate" in answered(tree).surer


def test_a_log_alone_shows_a_loss_that_falls():
    training = simulated("far from the optimum, SGD")
    one = {name: getattr(training, name)[-1:] for name in ("step", "moved", "moved_step", "moved_from")}
    falling = training.loss[0] * np.linspace(1, 0.5, 80) + 0.01 * np.random.default_rng(0).standard_normal(80)
    answer = answered(tree_of(dataclasses.replace(training, **one, gram=training.gram[-1:, -1:], loss=falling)))
    assert answer.verdict == "no"
    assert answer.answer.startswith("Training is stable and still moves: the loss fell by ")


def test_a_schedule_that_ended_with_three_checkpoints_leaves_a_longer_one_open():
    training = simulated("3 checkpoints, stationary")
    answer = answered(tree_of(dataclasses.replace(training, learning_rate=np.linspace(1, 0, 80))))
    assert answer.verdict == "yes"
    assert "whether a longer schedule would go further cannot be told from 3 measured steps" in answer.answer
    assert answer.surer


@pytest.mark.parametrize(("code", "what"), [("OD304", "gradients"), ("OD201", "weights")])
def test_numbers_that_are_not_finite_are_unstable(code, what):
    findings = [Finding(code, "It is not finite.", step=300).to_dict()]
    answer = answered(tree_of(simulated("far from the optimum, SGD")), findings=findings)
    assert (answer.verdict, answer.answer) == ("mixed", f"Training is unstable: {what} are not finite.")


def test_a_fault_of_an_earlier_training_is_not_the_newest_ones():
    findings = [Finding("OD304", "It is not finite.", step=20).to_dict()]
    assert answered(tree_of(simulated("stationary noise, SGD"), earlier=3), findings=findings).verdict == "yes"


def with_retained(tree: xr.DataTree, change: float, low: float, high: float, task: str = "general") -> xr.DataTree:
    arrays = {"change": change, "change_low": low, "change_high": high}
    tree["loss"] = xr.Dataset(
        {name: (("step", "task"), [[number, 9.0]]) for name, number in arrays.items()},
        {"step": [400], "task": [task, "new"], "retained": ("task", [True, False])},
    )
    return tree


def test_the_cost_of_a_retained_task_is_told_while_training_moves():
    tree = with_retained(tree_of(simulated("far from the optimum, SGD")), 0.12, 0.05, 0.19)
    answer = answered(tree)
    assert answer.verdict == "mixed"
    assert "but the loss of the retained task general has risen by 0.120 (0.0500 to 0.190)" in answer.answer
    assert answer.evidence[-1].path == "/loss/change"


def test_small_increments_are_no_rest_while_the_loss_falls():
    training = simulated("converged without noise")
    assert answered(tree_of(training)).verdict == "yes"
    falling = np.linspace(3.0, 1.0, len(training.loss))
    assert answered(tree_of(dataclasses.replace(training, loss=falling))).verdict == "no"


def test_costs_of_several_retained_tasks_are_judged_together():
    tree = with_retained(tree_of(simulated("far from the optimum, SGD")), 0.12, 0.01, 0.23)
    assert answered(tree).sure == 0.90
    losses = tree["loss"].to_dataset().assign_coords(retained=("task", [True, True]))
    samples = {"sample_task": ("sample", ["general", "new"] * 8), "sample_group": ("sample", np.repeat(range(8), 2))}
    change = losses["change"].copy(data=[[0.12, 0.0]])
    numbers = {"change": change, "change_low": change - 0.11, "change_high": change + 0.11}
    tree["loss"] = losses.assign_coords(samples).assign(numbers)
    answer = answered(tree)
    assert (answer.verdict, answer.sure) == ("no", 0.95)


@pytest.mark.parametrize(("low", "high"), [(-0.05, 0.3), (np.nan, np.nan)])
def test_a_cost_that_is_not_resolved_is_not_told(low, high):
    answer = answered(with_retained(tree_of(simulated("far from the optimum, SGD")), 0.12, low, high))
    assert answer.verdict == "no"


def test_steps_beyond_the_edge_of_stability_are_told():
    tree = tree_of(simulated("stationary noise, SGD"))
    tree["sharpness"] = xr.Dataset(
        {"critical_sharpness_low": (("step", "task"), [[50.0]]), "learning_rate": ("step", [0.05])},
        {"step": [800], "task": ["all"]},
    )
    assert "beyond the edge of stability" in answered(tree).answer
    tree["sharpness"]["learning_rate"][:] = 0.0  # a schedule that has ended has no edge
    assert "edge" not in answered(tree).answer


def test_hostile_names_and_missing_numbers_do_no_harm():
    training = simulated("overfitting while the loss falls")
    loss = np.full(80, np.nan)
    answer = answered(tree_of(dataclasses.replace(training, loss=loss), evaluation=f"eval_{HOSTILE}\n_loss"))
    assert answer.verdict == "mixed"
    assert "\n" not in answer.answer


def test_increments_that_are_rounding_are_told():
    tree = tree_of(simulated("3 checkpoints, stationary"))
    update = tree["update"].to_dataset()
    share = update["quantisation_noise_share"]
    tree["update"] = update.assign(quantisation_noise_share=share.copy(data=np.full(share.shape, 0.9)))
    answer = answered(tree)
    assert answer.verdict == "yes"
    assert "in 100 % of the matrices most of them is rounding." in answer.answer


def test_a_result_of_plausible_numbers_is_answered_in_its_summary():
    tree = example_tree(gradients=[100, 200])
    [answer] = [one for one in summarise(tree)["answers"] if one["id"] == "stable"]
    assert answer["verdict"] == "undecided"


def test_several_adapters_are_judged_as_one_training():
    tree = example_tree(3, ["model.layers.0.q_proj@policy", "model.layers.0.q_proj@reference"])
    assert may_training_stop(tree, summarise(tree)).verdict == "undecided"
