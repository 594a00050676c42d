"""Rows of scores → scores(run, step, task), each with its direction; what could not be placed becomes a finding.

Which way a metric points, and of which task it is, by its name.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast, runtime_checkable

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.findings import Finding

#: The task that is the mean of all tasks.
ALL = "all"
_NAMED = 8


@runtime_checkable
class Row(Protocol):
    """One score; what ``dynamics.relate.score_files`` reads."""

    @property
    def run(self) -> str: ...
    @property
    def step(self) -> int | None: ...
    @property
    def task(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def items(self) -> float: ...
    @property
    def standard_error(self) -> float: ...
    @property
    def higher_is_better(self) -> bool | None: ...


@dataclass(frozen=True)
class ScoreTable:
    """Scores of all runs, and what a reader must know of them.

    Args:
        scores: ``score``, ``items``, ``standard_error`` ``(run, step, task)`` as they were given, and the coordinate
            ``direction(task)``: +1 if higher is better, −1 if lower, 0 if not known.
        findings: OD501 to OD505 and OD512.
    """

    scores: xr.Dataset
    findings: tuple[Finding, ...]


def score_table(
    rows: Iterable[Row],
    *,
    runs: Mapping[str, Collection[int]] | None = None,
    directions: Mapping[str, str] | None = None,
) -> ScoreTable:
    """Places rows on a grid of runs, steps and tasks.

    A score without a step belongs to the last step of its run. Rows that say the same twice count once; rows of one
    (run, step, task) that differ are left out.

    Args:
        rows: In any order.
        runs: Run → steps that have measures. Rows of other runs are left out; scores at other steps are kept and named.
        directions: Task → ``"higher"`` or ``"lower"`` where names do not tell which is better.

    Raises:
        ValueError: On another direction than these two.

    >>> from dynamics.relate.score_files import ScoreRow
    >>> table = score_table([ScoreRow("a", 10, "vqa/accuracy", 0.5), ScoreRow("a", 20, "vqa/accuracy", 0.7)])
    >>> table.scores["score"].sel(run="a", task="vqa/accuracy").values.tolist()
    [0.5, 0.7]
    """
    placed, findings = _with_steps(list(rows), runs)
    kept, doubled = _once(placed)
    findings += doubled
    if runs is not None:
        findings += _steps_without_measures(kept, runs)
    stated = {row.task: row.higher_is_better for row in kept if row.higher_is_better is not None}
    tasks = list(dict.fromkeys(row.task for row in kept))
    direction = directions_of(tasks, directions, stated)
    findings += _about_tasks(tasks, direction, directions or {})
    return ScoreTable(_dataset(kept, tasks, direction), tuple(findings))


@dataclass(frozen=True)
class _Placed:
    run: str
    step: int
    task: str
    score: float
    items: float
    standard_error: float
    higher_is_better: bool | None


def _with_steps(rows: list[Row], runs: Mapping[str, Collection[int]] | None) -> tuple[list[_Placed], list[Finding]]:
    """Rows of known runs, at a step."""
    findings = []
    unknown = [row for row in rows if runs is not None and row.run not in runs]
    if unknown and runs is not None:
        findings.append(
            Finding(
                "OD501",
                f"Expected scores of {_named(runs)}, got {len(unknown)} of {_named({row.run for row in unknown})}.",
                "Give runs the same names in the score file as on the command line (the folder's name).",
                evidence={"runs": sorted({row.run for row in unknown}), "rows": len(unknown)},
            )
        )
    known = [row for row in rows if runs is None or row.run in runs]
    last = {run: max(steps) for run, steps in (runs or {}).items() if steps}
    for row in known:
        if runs is None and row.step is not None:
            last[row.run] = max(row.step, last.get(row.run, row.step))
    without = [row for row in known if row.step is None]
    homeless = [row for row in without if row.run not in last]
    if without:
        findings.append(
            Finding(
                "OD502",
                f"{len(without)} scores of {_named({row.run for row in without})} say no step; they are taken to be of "
                "the run's last step" + (", or left out where that is not known." if homeless else "."),
                "Put evaluations beside the checkpoint they are of, or give a step column.",
                evidence={"rows": len(without), "left_out": len(homeless)},
            )
        )
    placed = [
        _Placed(
            row.run,
            last[row.run] if row.step is None else row.step,
            row.task,
            row.score,
            row.items,
            row.standard_error,
            row.higher_is_better,
        )
        for row in known
        if row.step is not None or row.run in last
    ]
    return placed, findings


def _once(rows: list[_Placed]) -> tuple[list[_Placed], list[Finding]]:
    """One row for each place; none where rows contradict each other."""
    places: dict[tuple[str, int, str], list[_Placed]] = defaultdict(list)
    for row in rows:
        places[row.run, row.step, row.task].append(row)
    repeated = {place: found for place, found in places.items() if len(found) > 1}
    torn = {place for place, found in repeated.items() if not _agree(found)}
    kept = [_fullest(found) for place, found in places.items() if place not in torn]
    if not repeated:
        return kept, []
    example = next(iter(torn or repeated))
    return kept, [
        Finding(
            "OD503",
            f"{len(repeated)} scores are given more than once, {len(torn)} of them with different values, which are "
            f"left out; for example run {example[0]!r}, step {example[1]}, task {example[2]!r}.",
            "Keep one row for each run, step and task.",
            step=example[1],
            evidence={"places": len(repeated), "contradictions": len(torn)},
        )
    ]


def _agree(rows: list[_Placed]) -> bool:
    first = rows[0].score
    return all(math.isclose(row.score, first, rel_tol=1e-9, abs_tol=1e-12) for row in rows)


def _fullest(rows: list[_Placed]) -> _Placed:
    return min(rows, key=lambda row: math.isnan(row.items) + math.isnan(row.standard_error))


def _steps_without_measures(rows: list[_Placed], runs: Mapping[str, Collection[int]]) -> Iterator[Finding]:
    apart = sorted({(row.run, row.step) for row in rows if row.step not in set(runs[row.run])})
    if apart:
        yield Finding(
            "OD502",
            f"Scores at {len(apart)} steps have no measures there, for example step {apart[0][1]} of run "
            f"{apart[0][0]!r}; they are related to nothing.",
            "Evaluate and save at the same steps.",
            step=apart[0][1],
            evidence={"places": len(apart), "first": [list(place) for place in apart[:_NAMED]]},
        )


def _about_tasks(tasks: list[str], direction: Mapping[str, int], asked: Mapping[str, str]) -> Iterator[Finding]:
    unknown = [task for task in tasks if direction[task] == 0]
    if unknown:
        yield Finding(
            "OD505",
            f"It is not known whether higher is better for {_named(unknown)}; their associations are those of the "
            f"numbers as they are, and the mean over tasks leaves them out.",
            'Say it, e.g. directions={"' + unknown[0] + '": "higher"}.',
            evidence={"tasks": unknown},
        )
    absent = sorted(set(asked) - set(tasks))
    if absent:
        yield Finding(
            "OD512",
            f"A direction is given for {_named(absent)}, of which there are no scores; there are {_named(tasks)}.",
            "Check the task's name.",
            evidence={"tasks": absent},
        )


def _dataset(rows: list[_Placed], tasks: list[str], direction: Mapping[str, int]) -> xr.Dataset:
    runs, steps = list(dict.fromkeys(row.run for row in rows)), sorted({row.step for row in rows})
    arrays = {name: np.full((len(runs), len(steps), len(tasks)), np.nan) for name in schema.SCORE}
    at = [{value: place for place, value in enumerate(axis)} for axis in (runs, steps, tasks)]
    for row in rows:
        place = at[0][row.run], at[1][row.step], at[2][row.task]
        for name, array in arrays.items():
            array[place] = getattr(row, name)
    return xr.Dataset(
        {
            name: (("run", *schema.SCORE[name].dims), array, schema.attributes(schema.SCORE[name]))
            for name, array in arrays.items()
        },
        coords={
            "run": np.array(runs, dtype=str),
            "step": np.array(steps, dtype=np.int64),
            "task": np.array(tasks, dtype=str),
            "direction": (
                "task",
                np.array([direction[task] for task in tasks], dtype=np.int64),
                {"units": "1", "long_name": "+1: higher is better, -1: lower is better, 0: not known"},
            ),
        },
    )


def rows_of(groups: Mapping[str, xr.Dataset]) -> Iterator[Row]:
    """What stands in each run's ``/score`` group, run → dataset; missing scores are no rows.

    >>> arrays = {name: (("step", "task"), [[value, np.nan]]) for name, value in (("score", 0.5), ("direction", -1))}
    >>> score = xr.Dataset(arrays, {"step": [5], "task": ["ratio", "loss"]})
    >>> [(row.run, row.step, row.task, row.score, row.higher_is_better) for row in rows_of({"a": score})]
    [('a', 5, 'ratio', 0.5, False)]
    """
    for run, group in groups.items():
        nothing = xr.full_like(group["score"], np.nan, dtype=np.float64)
        scores, items, errors, directions = (group.get(name, nothing).values for name in (*schema.SCORE, "direction"))
        for i, j in np.argwhere(~np.isnan(scores)).tolist():
            step, task = int(group["step"].values[i]), str(group["task"].values[j])
            higher = {1: True, -1: False}.get(directions[i, j])
            yield _Placed(run, step, task, float(scores[i, j]), float(items[i, j]), float(errors[i, j]), higher)


def better(scores: xr.DataArray) -> xr.DataArray:
    """Return scores turned so that higher is better, with the mean over standardised tasks as task ``"all"``.

    Each score is standardised over all its runs and steps, (x − mean)/standard deviation, before the mean: a perplexity
    of 20 does not outweigh an accuracy of 0.7. Scores of one task (its loss, its perplexity, its accuracy) are averaged
    first and standardised again, so that each task counts once. The mean is over all scores of known direction, where a
    run has every one of them at a step; NaN elsewhere. There is none if fewer than two scores have a direction.

    Args:
        scores: ``(run, step, task)`` with ``direction(task)``; those of direction 0 stay as they are.

    >>> raw = xr.DataArray([[[1.0, 9.0], [2.0, 1.0]]], dims=("run", "step", "task"), coords={"task": ["up", "down"]})
    >>> better(raw.assign_coords(direction=("task", [1, -1]))).sel(task="all").values.tolist()
    [[-1.0, 1.0]]
    """
    direction = scores["direction"]
    turned = scores * xr.where(direction == 0, 1, direction)
    directed = turned.isel(task=np.flatnonzero(direction.values != 0))
    if directed.sizes["task"] < 2 or ALL in scores["task"].values:
        return turned
    by_task: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(directed["task"].values.tolist()):
        by_task[metric_of(name).task].append(place)
    standard = _standardised(directed.values)
    of_tasks = np.stack([standard[..., places].mean(-1) for places in by_task.values()], axis=-1)
    values = _standardised(of_tasks).mean(-1, keepdims=True)
    mean = directed.isel(task=[0]).copy(data=values).assign_coords(task=[ALL], direction=("task", [1]))
    return cast(xr.DataArray, xr.concat([mean, turned], dim="task"))


def _standardised(values: np.ndarray) -> np.ndarray:
    """Values of each column less their mean, over their standard deviation where that is not 0; NaN stays."""
    finite = np.isfinite(values)
    count = np.maximum(finite.sum((0, 1)), 1)
    centred = values - np.where(finite, values, 0.0).sum((0, 1)) / count
    deviation = np.sqrt(np.where(finite, centred**2, 0.0).sum((0, 1)) / count)
    return centred / np.where(deviation > 0, deviation, 1.0)


def _named(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(repr(name) for name in listed[:_NAMED]) + (
        f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    )


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


#: Metrics that are better when lower: in lower case, words joined by "_". A "rate", "score" or "@k" after them is left
#: out first, so that "hallucination" stands for "hallucination_rate" too.
LOWER = _set("""
loss losses logloss ppl perplexity nll nlpd cross_entropy xent bce bits_per_byte bits_per_character
bits_per_char bits_per_dim bpb bpc bpd crps pinball elbo_gap error errors err mae mse rmse mape smape mase wape
msle rmsle nmse nrmse epe mpjpe mcd wer cer mer ter der eer jer fnr fpr fdr far frr fpr95 miss misses
false_positive false_negative false_alarm false_acceptance false_rejection false_discovery false_positives
false_negatives misclassification inaccuracy brier ece mce calibration_error fid kid fvd lpips niqe brisque hd95
hausdorff assd asd chamfer wasserstein emd distance distortion divergence edit_distance levenshtein mean_rank
median_rank medr hallucination hallucinations toxicity toxic harmfulness harmful unsafe violation violations
jailbreak over_refusal unfaithfulness incorrect incorrectness invalid failure failures crash repetition
forgetting regret latency
""")
#: Metrics that are better when higher.
HIGHER = _set("""
accuracy accuracies acc inst_acc mc1 mc2 f1 f2 f05 fbeta f_beta f_score fscore f_measure fmeasure f_1 precision
recall sensitivity specificity tpr tnr ppv npv true_positive true_negative negative_predictive_value
positive_predictive_value auc auroc auprc aupr roc_auc auc_roc aucroc pr_auc auc_pr prauc average_precision map
ap bleu sacrebleu gleu google_bleu rouge rouge1 rouge2 rougel rouge_l rougelsum rouge_lsum rouge_1 rouge_2
meteor chrf cider ciderd cider_d spice sari bertscore bert_score bleurt comet moverscore bartscore mauve smatch
uas las exact_match em anls mcc matthews_correlation matthews_corrcoef pearson pearsonr spearman spearmanr
kendall kendalltau correlation srcc plcc ccc kappa cohen_kappa qwk r2 r_2 r_squared rsquared explained_variance
concordance c_index cindex iou miou giou ciou jaccard dice dsc nsd psnr ssim ms_ssim clipscore clip_score
inception_score vqa_score pesq stoi estoi mos snr sdr si_sdr sisdr nmi ari v_measure similarity likelihood
log_likelihood loglikelihood elbo mrr reciprocal_rank ndcg hits hit pass maj cons win winrate success solve
solved resolved correct correctness valid_rate reward rewards rewards_margins rewards_accuracies reward_margin
return helpfulness harmlessness faithfulness groundedness relevance coherence fluency truthfulness factuality
""")
#: Names that end like a metric and are none, or of which it depends on who asks.
_EITHER = _set("""
attack_success learning_win rewards_chosen rewards_rejected reward_rejected reward_chosen
""")
#: Words around a metric that change nothing, and those that only say of which data it is.
_SPLITS = _set("""
eval evaluation val valid validation dev test train training holdout heldout predict
""")
_MODIFIERS = _SPLITS | _set("""
macro micro weighted balanced binary samples mean avg average median overall total final best max min last epoch
step increase norm normalized normalised none at top k strict flexible raw per_token rate score value percent
percentage pct fraction probability
""")
#: Words between a negation and what it negates.
_TRANSPARENT = _set("""
mean avg average macro micro weighted balanced root squared absolute log percentage median max
""")
_TURNING = _set("""
minus inverse inv inverted negated non no not complement
""")
#: As scikit-learn has them before errors; before a recall or an accuracy they may name a class.
_NEGATIVE = frozenset({"neg", "negative"})
#: Words after a metric: they turn it round, or always say that it got better.
_TURNING_AFTER = _set("""
reduction drop decrease decline degradation free inverse inv inverted negated complement
""")
_IMPROVEMENT = frozenset({"improvement", "uplift"})
#: Likelihoods: what is negated in a negative log likelihood.
_LIKELIHOODS = frozenset({"likelihood", "log_likelihood", "loglikelihood", "elbo"})
_ONE_MINUS = re.compile(rf"(^|/|\s)((?:(?:{'|'.join(sorted(_SPLITS))})[_\s-]+)?)(?:(?:1|1\.0|100)[\s_]*)?[-−–][\s_]*")
#: Top-k accuracy; before or after another metric it only says of how many guesses.
_TOP = re.compile(r"top\d+")
_WORDS = {"higher": 1, "lower": -1}


@dataclass(frozen=True)
class Metric:
    """What a score's name says.

    Args:
        direction: +1 if it is better when higher, −1 when lower, 0 if the name does not tell.
        task: The rest of the name: of which task it is; ``""`` of an evaluation without a name.
    """

    direction: int
    task: str


@lru_cache(maxsize=4096)
def metric_of(name: str) -> Metric:
    """Read a score's name: which way it points, and of which task it is.

    What counts is the longest metric at the end of the name, after words such as ``macro``, ``rate`` or ``@1``; what
    stands before it may turn it round (``neg``, ``1 -``, ``inverse``), and so may what follows (``reduction``). Of
    ``arc_easy/acc_norm,none`` the filter after the comma does not count. A name in which anything else follows a metric
    (``accuracy_std``) does not tell.

    >>> metric_of("eval_vqa_loss"), metric_of("arc_easy/acc_norm,none").task
    (Metric(direction=-1, task='vqa'), 'arc_easy')
    >>> [metric_of(name).direction for name in ("neg_mean_squared_error", "1-accuracy", "hits@10", "val_loss_epoch")]
    [1, -1, 1, -1]
    >>> metric_of("vqa").direction
    0
    """
    text = name.rsplit(",", 1)[0] or name
    text = re.sub(r"(?<![a-z0-9])(?:one|1)[-_\s]+minus[-_\s]+", "minus_", text, flags=re.IGNORECASE)
    text = _ONE_MINUS.sub(r"\1\2minus_", text)
    text = re.sub(r"\btop[-_\s](?=\d)", "top", text, flags=re.IGNORECASE)
    text = re.sub(r"(^|[^A-Za-z])([RP])@", lambda match: match[1] + {"R": "recall@", "P": "precision@"}[match[2]], text)
    text = re.sub(r"IoU", "_iou", text)
    for spelled in (text, re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", text)):
        segments = [_words(segment) for segment in spelled.split("/")]
        for count in range(len(segments), 0, -1):
            direction, task = _read(segments[:count])
            rest = [word for segment in segments[count:] for word in segment]
            if direction and task is not None and not _NOT_A_TASK & set(rest):
                return Metric(direction, "_".join([*task, *(word for word in rest if word not in _MODIFIERS)]))
            if task is None:  # it depends
                return Metric(0, name)
    head, separator, _ = name.rpartition("/")
    return Metric(0, head if separator else name)


#: Last parts of a path that are no task: ``accuracy/std``, ``rewards/rejected``.
_NOT_A_TASK = _set("""
std stdev stddev stderr se var variance ci low high lower upper range count num size weight scale threshold
length time chosen rejected ratio delta change diff difference gap coef
""")


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", text.lower()) if word]


def _read(segments: Sequence[Sequence[str]]) -> tuple[int, list[str] | None]:
    """Direction and the words of the task; no words where it depends on who asks."""
    words = [word for segment in segments for word in segment]
    if [word for word in segments[-1] if word not in _SPLITS] == ["score"]:
        return 1, [word for word in words[:-1] if word not in _SPLITS]
    sign, better = 1, False
    while words:
        for length in range(len(words), 0, -1):
            end = "_".join(words[-length:])
            if end in _EITHER:
                return 0, None
            if direction := _direction(end):
                turned, before = _negation(words[:-length], end, direction)
                task = [word for word in before if word not in _SPLITS]
                return (1 if better else sign * turned * direction), [word for word in task if not _TOP.fullmatch(word)]
        word = words.pop()
        if word in _TURNING_AFTER:
            sign = -sign
        elif word in _IMPROVEMENT:
            better = True
        elif _TOP.fullmatch(word) and not set(words) - _MODIFIERS:
            return 1, []
        elif not (word in _MODIFIERS or word.isdecimal() or _TOP.fullmatch(word)):
            break
    return 0, []


def _direction(metric: str) -> int:
    """Of one metric, also with a number at its end: ``bleu4``, ``map50``."""
    for form in (metric, metric.rstrip("0123456789")):
        if form in HIGHER or form in LOWER:
            return 1 if form in HIGHER else -1
    return 0


def _negation(before: Sequence[str], metric: str, direction: int) -> tuple[int, list[str]]:
    """−1 if the words before a metric turn it round, 0 if they may, else 1; and those words without negations."""
    words, sign = list(before), 1
    while words:
        if words[-1] in _TURNING:
            sign = -sign
        elif words[-1] in _NEGATIVE:
            sign = -sign if direction < 0 or metric in _LIKELIHOODS else 0
        elif words[-1] not in _TRANSPARENT:
            break
        words.pop()
    return sign, words


def directions_of(
    tasks: Iterable[str], asked: Mapping[str, str] | None = None, stated: Mapping[str, bool] | None = None
) -> dict[str, int]:
    """Return the direction of each task: as the user says, else as its file says, else by its name.

    Args:
        tasks: Names of the scores.
        asked: Task → ``"higher"`` or ``"lower"``, whichever is better.
        stated: Task → whether higher is better, from score files.

    Raises:
        ValueError: On another word than these two.

    >>> directions_of(["vqa", "eval_loss"], {"vqa": "higher"})
    {'vqa': 1, 'eval_loss': -1}
    """
    asked, stated = asked or {}, stated or {}
    for task, word in asked.items():
        if word not in _WORDS:
            raise ValueError(f"directions[{task!r}]: expected 'higher' or 'lower' (whichever is better), got {word!r}.")
    return {
        task: _WORDS[asked[task]]
        if task in asked
        else (1 if stated[task] else -1)
        if task in stated
        else metric_of(task).direction
        for task in tasks
    }
