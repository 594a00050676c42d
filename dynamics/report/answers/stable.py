"""Is training stable, is it still moving, may it stop?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from dynamics.relate.permutations import LEVEL
from dynamics.relate.score_changes import score_directions
from dynamics.relate.stability import FEWEST_BLOCKS, FEWEST_ROWS, Course, Training, course_of
from dynamics.report.answers.answer import Answer, Evidence, Verdict
from dynamics.report.loss_summary import retained_rises
from dynamics.report.score_summary import scores_of_newest
from dynamics.schema import ALL
from dynamics.text import counted, listed, number, one_line, p_value, percent, sentence_case, with_minus

#: What logs call the loss and the learning rate, the first that a log has.
_LOSSES = ("loss", "train/loss", "train_loss")
_RATES = ("learning_rate", "train/learning_rate", "lr", "train/lr")
#: Findings that say that a training is broken.
_FAULTS = {"OD304": "gradients", "OD201": "weights"}
_SURER = f"Log loss and learning rate ({FEWEST_ROWS} rows or more), and keep {2 * FEWEST_BLOCKS} checkpoints or more."


def may_training_stop(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Is training stable, is it still moving, may I stop?", of the newest training of the folder.

    - ``yes``: more steps like the last ones gain nothing. The training wanders: the loss does not fall, and the upper
      limit of the mean cosine of increments of its newest half is below one over the number of blocks, so that a drift
      moved it less than noise did. Or it is at rest: at the same learning rate and number of steps, its newest
      increment has at most 5 % of the size of those of the first half, and the loss hardly falls. Or its increments
      are below the rounding of the files, or its schedule has ended (learning rate at most 5 % of its peak).
    - ``no``: still moving. Increments agree in direction (p ≤ 0.05) by more than that, or the loss falls (99 % interval
      below 0).
    - ``mixed``: look before going on. It is unstable (loss that rises by 5 % of its level, spikes by ten robust
      standard deviations, increments five times the median, numbers that are not finite, steps beyond the edge of
      stability that are not shown to move it); a held-out loss has risen since its best, or a retained task's
      since the start, while the training moves; or the schedule ended while it moved.
    - ``undecided``: too few checkpoints and rows of the log, or increments between moving and wandering.
    - ``not_asked``: one checkpoint and no log.

    That it moves or wanders is claimed at 95 %, and at 90 % together with the loss of a retained task.

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    training, held_out = _newest(tree, summary)
    if len(training.step) < 2 and not np.isfinite(training.loss).sum() >= FEWEST_ROWS:
        return Answer(
            "stable", "not_asked", "One checkpoint and no log of the loss do not show how training went.", surer=_SURER
        )
    course = course_of(training)
    cost = _retained(tree)
    verdict, words = _judged(course, training, held_out, cost)
    sure = {"moving": 0.90 if cost else 0.95, "wandering": 0.95}.get(course.state)
    several = len(summary["segments"])
    opening = f"Of {several:,} trainings in this folder, the newest: {words}" if several > 1 else sentence_case(words)
    surer = _SURER if course.state == "undecided" else ""
    return Answer(
        "stable",
        verdict,
        opening,
        (*_evidence(course, training), *((cost[1],) if cost else ())),
        sure,
        surer,
    )


def _newest(tree: xr.DataTree, summary: Mapping[str, Any]) -> tuple[Training, str]:
    """Return the newest training, and the name of its held-out loss."""
    update = tree["update"].to_dataset()
    segment = int(update["segment"].values[-1])
    update = update.isel(step=update["segment"].values == segment)
    moved_step, moved_from = update["step"].values, update["from_step"].values
    step, gram = moved_step, np.full((len(moved_step),) * 2, np.nan)
    if "path" in tree.children:
        path = tree["path"].to_dataset()
        member = path["step_segment"].values == segment
        if member.any():
            step, gram = path["step"].values[member], path["gram"].values[np.ix_(member, member)]
    log_step, loss, rate = _log(tree, segment)
    name, evaluation_step, evaluation = _held_out(tree)
    faults = [
        _FAULTS[finding["code"]]
        for finding in summary["findings"]
        if finding["code"] in _FAULTS and (finding["step"] is None or finding["step"] >= moved_step[0])
    ]
    training = Training(
        step=step,
        gram=gram,
        log_step=log_step,
        loss=loss,
        learning_rate=rate,
        evaluation_step=evaluation_step,
        evaluation=evaluation,
        moved=update["frobenius_norm_all"].sel(kind="increment").values,
        moved_step=moved_step,
        moved_from=moved_from,
        rounded=_rounded(update),
        beyond_edge=_beyond_edge(tree, int(moved_step[0])),
        faults=tuple(dict.fromkeys(faults)),
    )
    return training, name


def _log(tree: xr.DataTree, segment: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if "training" not in tree.children:
        return np.empty(0, dtype=np.int64), np.empty(0), np.empty(0)
    log = tree["training"].to_dataset().load()
    log = log.isel(log=log["log_segment"].values == segment)
    metrics = log["metric"].values.tolist()
    columns = []
    for names in (_LOSSES, _RATES):
        name = next((name for name in names if name in metrics), None)
        missing = np.full(log.sizes["log"], np.nan)
        columns.append(missing if name is None else log["value"].values[:, metrics.index(name)].astype(np.float64))
    return log["log_step"].values, columns[0], columns[1]


def _held_out(tree: xr.DataTree) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the held-out loss with the most values: its name, steps and values."""
    scores = scores_of_newest(tree)
    if scores is None:
        return "", np.empty(0, dtype=np.int64), np.empty(0)
    losses = [name for name, sign in score_directions(scores).items() if sign < 0 and "loss" in name]
    values = {name: scores["score"].sel(task=name).values for name in losses}
    name = max(values, key=lambda name: (np.isfinite(values[name]).sum(), name == "eval_loss"), default="")
    if not name:
        return "", np.empty(0, dtype=np.int64), np.empty(0)
    is_finite = np.isfinite(values[name])
    return name, scores["step"].values[is_finite], values[name][is_finite]


def _rounded(update: xr.Dataset) -> float:
    """Return the share of matrices whose newest increment is mostly rounding of the storage."""
    last = update.isel(step=-1).sel(kind="increment")
    moved = last["frobenius_norm"].values > 0
    return float(np.mean(last["quantisation_noise_share"].values[moved] > 0.5)) if moved.any() else np.nan


def _beyond_edge(tree: xr.DataTree, first_step: int) -> bool:
    """Return whether the last critical sharpness of plain gradient descent exceeds 2/η."""
    if "sharpness" not in tree.children:
        return False
    group = tree["sharpness"].to_dataset().load()
    rates = group["learning_rate"].values
    rated = np.flatnonzero(np.isfinite(rates) & (rates > 0) & (group["step"].values >= first_step))
    if not rated.size:
        return False
    at = group.isel(step=rated[-1]).sel(task=ALL)
    return float(at["critical_sharpness_low"]) > 2 / float(at["learning_rate"])


def _retained(tree: xr.DataTree) -> tuple[str, Evidence] | None:
    """Return what the retained task that lost most has lost, if any did beyond its interval."""
    rises = retained_rises(tree["loss"].to_dataset().isel(step=-1).load()) if "loss" in tree.children else []
    if not rises:
        return None
    task, change, low, high = max(rises, key=lambda rise: rise[1])
    ends = f"{number(low)} to {number(high)}"
    words = f"the loss of the retained task {one_line(task)} has risen by {number(change)} ({ends})"
    return words, Evidence("/loss/change", change, low, high)


def _judged(
    course: Course, training: Training, held_out: str, cost: tuple[str, Evidence] | None
) -> tuple[Verdict, str]:
    """Return verdict and sentence."""
    ended = f"the schedule has ended (learning rate at {percent(course.rate)} of its peak)" if course.ended else ""
    if course.state == "unstable":
        return "mixed", f"training is unstable: {listed(_faults(course))}."
    if course.state == "overfitting" and course.best is not None:
        steps, values = training.evaluation_step, training.evaluation
        return "mixed", (
            f"{one_line(held_out)} has risen from {number(values[course.best])} at step {int(steps[course.best]):,} to "
            f"{number(values[-1])} at step {int(steps[-1]):,} while training went on: keep the earlier checkpoint."
        )
    if course.state == "moving":
        moves = listed(_moves(course, training))
        if ended:
            return "mixed", (
                f"{ended} while training still moved: {moves}; more steps at this rate change nothing, a longer "
                "schedule could go further."
            )
        if cost:
            return "mixed", f"training still moves ({moves}), but {cost[0]}: see which checkpoint to keep."
        return "no", f"training is stable and still moves: {moves}."
    opening = f"{ended}, and " if ended else ""
    if course.state == "converged":
        caveat = " (no learning rate is logged: a schedule that ended looks the same)" if course.ended is None else ""
        return "yes", (
            f"{opening}training is at rest: its newest increment has {percent(course.size, 2)} of the size of the "
            f"median one of the first half, at the same learning rate and number of steps{caveat}."
        )
    if course.state == "below_rounding":
        return "yes", (
            f"{opening}the newest increments are lost in the rounding of the files: in {percent(training.rounded, 0)} "
            "of the matrices most of them is rounding."
        )
    if course.state == "wandering":
        advice = "a longer schedule would not be shown to go further" if ended else "lower the learning rate or stop"
        what = "more steps at this learning rate only diffuse" if not ended else "noise moved it more than a drift did"
        return "yes", f"{opening}training wanders: {_direction(course, training)}, so {what}; {advice}."
    data = f"{counted(len(training.step), 'measured step')} and {counted(_rows(training), 'row')} of the log"
    if ended:
        return "yes", (
            f"{ended}, so more steps like the last ones change nothing; whether a longer schedule would go further "
            f"cannot be told from {data}."
        )
    between = f": {_direction(course, training)}" if course.motion is not None else ""
    return "undecided", f"whether training still moves cannot be told from {data}{between}."


def _rows(training: Training) -> int:
    return int(np.isfinite(training.loss).sum())


def _faults(course: Course) -> list[str]:
    trend = course.trend
    rise = "" if trend is None else f"the loss rose by {number(trend.change)} to {number(trend.last)}"
    words = {
        "gradients": "gradients are not finite",
        "weights": "weights are not finite",
        "loss": "the loss is infinite",
        "rises": rise,
        "spikes": f"the loss has {counted(course.spikes, 'spike')} in its newest half",
        "explodes": "the newest increment is over five times as large as the median one at its learning rate",
        "edge": "steps are beyond the edge of stability (critical sharpness above 2/η) and lead nowhere",
    }
    return [words[reason] for reason in course.reasons]


def _moves(course: Course, training: Training) -> Sequence[str]:
    parts = []
    if "direction" in course.reasons and course.motion is not None:
        parts.append(_direction(course, training))
    if course.trend is not None and "loss" in course.reasons:
        since = f" since step {course.trend.first_step:,}"
        parts.append(f"the loss fell by {number(-course.trend.change)} to {number(course.trend.last)}{since}")
    return parts


def _direction(course: Course, training: Training) -> str:
    motion = course.motion
    assert motion is not None
    hardly = "hardly agree" if motion.p_value <= LEVEL else "do not agree"
    agree = f"{'agree' if 'direction' in course.reasons else hardly} in direction"
    cosine = with_minus(f"{motion.cosine:z.2f}")
    return (
        f"increments over steps {motion.first_step:,} to {int(training.step[-1]):,} {agree} (mean cosine {cosine}, "
        f"chance 0; p = {p_value(motion.p_value)})"
    )


def _evidence(course: Course, training: Training) -> list[Evidence]:
    rows = []
    if course.motion is not None:
        rows.append(Evidence("/path/gram", course.motion.cosine, np.nan, course.motion.high))
    if np.isfinite(course.size):
        rows.append(Evidence("/update/frobenius_norm_all", course.size))
    if course.trend is not None:
        rows.append(Evidence("/training/value", course.trend.change, course.trend.low, course.trend.high))
    if len(training.evaluation):
        rows.append(Evidence("/score/score", float(training.evaluation[-1])))
    return rows
