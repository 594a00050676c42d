"""Which way a score points, and of which task it is: as the user says, else as its file says, else by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache


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
    """Return the direction and the words of the task; no words where it depends on who asks."""
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
    """Return the direction of one metric, also with a number at its end: ``bleu4``, ``map50``."""
    for form in (metric, metric.rstrip("0123456789")):
        if form in HIGHER or form in LOWER:
            return 1 if form in HIGHER else -1
    return 0


def _negation(before: Sequence[str], metric: str, direction: int) -> tuple[int, list[str]]:
    """Return −1 if the words before a metric turn it round, 0 if they may, else 1; and the words that do not negate."""
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


def is_of_task(score: str, task: str) -> bool:
    """Tell whether a score is of a task: by its whole name, the part before the metric, or a folder of its name.

    >>> [is_of_task(score, "mmlu") for score in ("mmlu", "eval_mmlu_loss", "mmlu/acc", "mmlu/stem/acc", "mmlu_pro/acc")]
    [True, True, True, True, False]
    """
    return task in (score, metric_of(score).task) or score.startswith(f"{task}/")


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


def direction_remedy(task: str) -> str:
    """Return how to say whether higher is better."""
    return f"Pass --higher {task} or --lower {task}; in Python, directions={{{task!r}: 'higher'}}."
