"""Which checkpoint to keep, and did it forget: the answer where the truth is known."""

import json

import numpy as np
import pytest
import xarray as xr

from dynamics.report.answers.kept_checkpoint import which_checkpoint
from dynamics.report.score_summary import checkpoint_choice
from dynamics.report.summary import summarise
from dynamics.schema import LOSS
from tests.dynamics.relate.simulated_trainings import STEPS, Training
from tests.dynamics.relate.test_checkpoint_choice_scores import scores
from tests.trees import HOSTILE, example_tree


@pytest.fixture(scope="module")
def plain():
    return example_tree(steps=[step for step in STEPS if step], matrices=2)


def answered(plain, loss=None, score=None):
    """The answer for a run with these losses and scores; its evidence is in the tree or the summary."""
    tree = plain.copy()
    if loss is not None:  # what is not chosen by is unknown
        names = [name for name, variable in LOSS.items() if variable.dims == ("step", "task") and name not in loss]
        unknown = np.full((loss.sizes["step"], loss.sizes["task"]), np.nan)
        loss = loss.assign(dict.fromkeys(names, (("step", "task"), unknown)))
    for name, group in (("loss", loss), ("score", score)):
        if group is not None:
            tree[name] = xr.DataTree(group)
    summary = summarise(tree)
    answer = which_checkpoint(tree, summary)
    assert answer.to_json() == json.loads(json.dumps(answer.to_json(), allow_nan=False))
    for number in answer.evidence:
        group, _, name = number.path.removeprefix("/").partition("/")
        assert name in tree[group] if name else group in summary
    return answer


def losses(**options):
    return Training(groups=64, **options).draw(np.random.default_rng(0))


def test_what_was_learnt_and_what_was_forgotten_are_told_with_intervals(plain):
    answer = answered(plain, losses())
    assert (answer.verdict, answer.sure) == ("mixed", 0.95)
    assert answer.answer == (
        "Keep step 100 (of 8): vqa improved by 18 % (95 % interval 15 to 21), retained wiki got worse by 6.6 % (4.0 to "
        "9.2); 0.25 × the update at step 800 cannot be told from it."
    )
    assert answer.evidence[0].low > 0


def test_what_the_last_step_forgot_is_told_beside_an_earlier_choice(plain):
    data = losses()
    rise = np.full((data.sizes["step"], data.sizes["task"]), 3.0)
    bounds = {"change_low": rise - 0.5, "change": rise, "change_high": rise + 0.5}
    data = data.assign({name: (("step", "task"), values) for name, values in bounds.items()})
    answer = answered(plain, data)
    assert answer.sure == 0.90
    assert answer.answer.endswith("; by step 800 the loss of retained wiki has risen by 3.00 nat (2.50 to 3.50).")
    uncertain = answered(plain, data.assign(change_low=data["change"] - 4))
    assert "has risen" not in uncertain.answer


def test_a_step_without_a_checkpoint_is_no_candidate_unless_none_was_saved(plain):
    score = scores(eval_loss=[1.5, 1.2, 1.4], steps=[100, 150, 300])
    assert answered(plain, score=score).answer == "Step 300 is best (of 2) by eval_loss."
    recorded = plain.copy()
    recorded.attrs["captured"] = json.dumps({"steps": [100, 200, 300], "checkpoints": []})
    score = scores(eval_loss=[1.5, 1.2, 1.4], steps=[100, 200, 300])
    answer = answered(recorded, score=score)
    assert answer.answer == "Step 200 is best (of 3; no evaluated step was saved) by eval_loss."
    assert answer.surer.startswith("Save checkpoints at the steps that are evaluated.")


def test_only_what_is_missing_is_asked_for(plain):
    answer = answered(plain, score=scores(eval_loss=[1.9, 1.2, 1.4], steps=[0, 100, 200], errors=np.nan))
    assert "(step 0)" not in answer.surer
    assert "Give standard errors" in answer.surer


def test_new_tasks_alone_that_improved_are_kept(plain):
    data = losses()
    answer = answered(plain, data.isel(sample=(data["sample_task"] == "vqa").values, task=[0]))
    assert answer.verdict == "yes"
    assert "(of 8): vqa improved by 2" in answer.answer
    assert answer.surer.startswith("Mark samples of what the base could do")


def test_a_training_that_only_hurt_keeps_nothing(plain):
    answer = answered(plain, losses(overfitting=1.0))
    assert (answer.verdict, answer.sure) == ("no", 0.95)
    assert answer.answer == "No checkpoint is better than the model before training (8 checkpoints)."


def test_a_retained_loss_that_hardly_moved_is_not_called_forgotten(plain):
    answer = answered(plain, losses(forgetting=1e-4))
    assert answer.verdict == "yes"
    assert "retained wiki got worse by 0.00" in answer.answer


def test_noise_alone_is_undecided(plain):
    answer = answered(plain, Training(groups=8, noise=2.0).draw(np.random.default_rng(0)))
    assert answer.verdict == "undecided"
    assert "cannot be told from the start" in answer.answer
    assert answer.surer == "Probe more groups of samples."


def test_three_groups_claim_nothing(plain):
    answer = answered(plain, Training(groups=3).draw(np.random.default_rng(0)))
    assert (answer.verdict, answer.sure) == ("undecided", None)
    assert "is best (of 8)" in answer.answer


def test_retained_tasks_alone_tell_what_was_forgotten(plain):
    data = losses()
    answer = answered(plain, data.isel(sample=(data["sample_task"] == "wiki").values, task=[1]))
    assert answer.verdict == "no"
    assert answer.answer.startswith("At step 800, retained wiki got worse by 47 % (95 % interval ")
    assert answer.answer.endswith("; every task is retained.")


def test_where_no_loss_after_the_start_is_finite_nothing_is_chosen(plain):
    data = losses()
    data["sample_loss"][1:] = data["scaled_loss"][:] = np.nan
    answer = answered(plain, data)
    assert (answer.verdict, answer.sure) == ("undecided", None)
    assert answer.answer == "No checkpoint can be chosen: no checkpoint after the start has finite losses."
    assert [piece.path for piece in answer.evidence] == ["/loss/sample_loss"]
    assert "smaller learning rate" in answer.surer


@pytest.mark.parametrize("bad", ["all", "last step", "start"])
def test_losses_that_are_not_finite_are_no_candidates(plain, bad):
    data = losses()
    rows = {"all": slice(None), "last step": slice(-1, None), "start": slice(0, 1)}[bad]
    data["sample_loss"][rows] = np.nan
    answer = answered(plain, data)
    assert answer.verdict == ("mixed" if bad == "last step" else "undecided")
    assert ("(of 7)" if bad == "last step" else "no task has a finite, positive loss at the start") in answer.answer


def test_scores_alone_choose_and_tell_what_fell(plain):
    score = scores(vqa__acc=[0.2, 0.6, 0.7, 0.65], mmlu__acc=[0.62, 0.61, 0.5, 0.4], retained=["mmlu/acc"])
    answer = answered(plain, score=score)
    assert (answer.verdict, answer.sure) == ("yes", 0.95)
    assert answer.answer.startswith("Keep step 100 (of 3): vqa/acc improved by 0.400 (95 % interval ")
    fell = score.assign(score=score["score"] - xr.DataArray([0, 0.1], dims="task") * (score["step"] > 0))
    answer = answered(plain, score=fell)
    assert answer.verdict == "mixed"
    assert "retained mmlu/acc got worse by 0.110 (" in answer.answer


def test_scores_without_a_start_name_the_best_and_claim_nothing(plain):
    answer = answered(plain, score=scores(eval_loss=[1.5, 1.2, 1.4], steps=[100, 200, 300]))
    assert (answer.verdict, answer.sure) == ("undecided", None)
    assert answer.answer == "Step 200 is best (of 3) by eval_loss."
    assert "(step 0)" in answer.surer


def test_without_losses_and_scores_it_is_said_how_to_ask(plain):
    answer = answered(plain)
    assert (answer.verdict, answer.evidence) == ("not_asked", ())
    assert "--probe" in answer.surer
    assert "--scores" in answer.surer


def test_a_score_beside_the_losses_can_tell_what_was_forgotten(plain):
    data = losses()
    new = data.isel(sample=(data["sample_task"] == "vqa").values, task=[0])
    answer = answered(plain, new, scores(mmlu__acc=[0.62, 0.55, 0.5], vqa=[0.9, 0.5, 0.1]))
    assert (answer.verdict, answer.sure) == ("mixed", 0.90)
    assert answer.answer.endswith("; score mmlu/acc is 0.500 at step 200 against 0.620 at the start.")
    assert "score vqa" not in answer.answer  # of the same samples as the losses


def test_retained_losses_beside_scores_are_told(plain):
    data = losses()
    wiki = data.isel(sample=(data["sample_task"] == "wiki").values, task=[1])
    change = wiki["sample_loss"].mean("sample") - wiki["sample_loss"][0].mean()
    ends = {name: (("step", "task"), (change + offset).values[:, None]) for name, offset in _ENDS.items()}
    answer = answered(plain, wiki.assign(ends), scores(vqa__acc=[0.2, 0.6, 0.7]))
    assert (answer.verdict, answer.sure) == ("mixed", 0.90)
    assert "; the loss of retained wiki rose by 0." in answer.answer


_ENDS = {"change": 0.0, "change_low": -0.01, "change_high": 0.01}


def test_of_several_trainings_the_newest_is_asked():
    tree = example_tree(steps=[100, 200, 300, 400], matrices=2, segment=[0, 0, 1, 1])
    tree["score"] = xr.DataTree(scores(vqa__acc=[0.2, 0.9, 0.8, 0.6, 0.7]))
    answer = which_checkpoint(tree, summarise(tree))
    assert answer.verdict == "yes"
    assert answer.answer.startswith("Of the newest training, keep step 400 (of 2): vqa/acc improved by 0.500 (")


def test_scores_that_the_log_gives_to_an_earlier_training_are_not_the_newest_ones():
    tree = example_tree(steps=[100, 200, 300, 400], matrices=2, segment=[0, 0, 1, 1])
    data = scores(vqa__acc=[0.2, 0.5, 0.95, 0.6, 0.7]).assign_coords(step=[0, 100, 150, 300, 400])
    tree["score"] = xr.DataTree(data.assign_coords(segment=("step", [0, 0, 0, 1, 1])))
    answer = which_checkpoint(tree, summarise(tree))
    assert answer.verdict == "undecided"  # what the newest training began with was not evaluated
    assert answer.answer.startswith("Of the newest training, step 400 is best (of 2)")


def test_names_are_told_as_they_are(plain):
    data = losses()
    named = data.assign_coords(
        task=[HOSTILE, "wiki"],
        sample_task=("sample", np.where(data["sample_task"] == "vqa", HOSTILE, "wiki")),
    )
    assert HOSTILE in answered(plain, named).answer


def test_answers_are_right_in_93_percent_of_trainings(plain):
    """The same with 400 of each kind: python -m tests.benchmarks.answer_rates --table verdicts."""
    rng = np.random.default_rng(2)
    verdicts, right = zip(
        *(checkpoint_answer(plain, training, rng) for training in KINDS.values() for _ in range(40)), strict=True
    )
    assert set(verdicts) == {"yes", "mixed", "no", "undecided"}
    assert np.mean(right) >= 0.93


#: Trainings that help at no cost, that cost something, that only hurt, and whose effect is lost in noise.
KINDS = {
    "helps, forgets nothing": Training(samples=2, forgetting=1e-6),
    "helps, and forgets": Training(samples=2),
    "only hurts": Training(samples=2, overfitting=1.0),
    "helps little, noisy": Training(samples=2, groups=12, noise=2.0),
    "helps little, unequal groups": Training(samples=2, noise=1.2, unequal=True),
    "hurts a little, noisy, unequal groups": Training(
        samples=2, groups=12, noise=3.0, overfitting=1.0, forgetting=1e-6, unequal=True
    ),
}


def checkpoint_answer(plain, training, rng):
    """The verdict on one simulated training, and whether it and every interval in the sentence are right."""
    tree = xr.DataTree(children={"loss": xr.DataTree(training.draw(rng)), "update": plain["update"]})
    choice = checkpoint_choice(tree)
    verdict = which_checkpoint(tree, {"checkpoint_choice": choice, "segments": [0]}).verdict
    best = [candidate["name"] for candidate in choice["candidates"]].index(choice["best"])
    value, improvement = training.value[best], training.improvement[best]
    right = {
        "yes": value > 0,
        "mixed": value > 0 and improvement[1] < 0,
        "no": training.value[1:].max() < 0,
        "undecided": True,
    }[verdict]
    rows = zip(choice["reported"]["tasks"], improvement, strict=True)
    return verdict, bool(right and all(row["low"] <= truth <= row["high"] for row, truth in rows))
