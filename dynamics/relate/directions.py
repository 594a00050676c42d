"""Which way a metric points, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_BETTER_LOWER = """
loss perplexity ppl word_perplexity byte_perplexity bits_per_byte nll cross_entropy error error_rate err mae mse rmse
mape mean_absolute_error mean_squared_error root_mean_squared_error wer cer mer ter brier brier_score ece
calibration_error hamming_loss fid kid edit_distance fpr false_positive_rate forgetting
"""
_BETTER_HIGHER = """
accuracy accuracies acc f1 f1_score precision recall sensitivity specificity auc auroc auprc roc_auc average_precision
map ap bleu sacrebleu rouge rouge1 rouge2 rougel rouge_l rougelsum rouge_lsum meteor chrf cider spice bertscore
exact_match em mcc matthews_correlation pearson pearsonr spearman spearmanr kappa r2 iou miou dice giou ciou
similarity likelihood log_likelihood pass_rate win_rate reward ndcg mrr bleurt comet
"""
#: Metrics that are better when lower, and when higher: in lower case, parts joined by "_".
LOWER, HIGHER = frozenset(_BETTER_LOWER.split()), frozenset(_BETTER_HIGHER.split())
_MODIFIER_WORDS = "macro micro weighted norm none mean avg average at top k samples strict flexible"
#: Words around a metric's name that do not turn it round.
_MODIFIERS = frozenset(_MODIFIER_WORDS.split())
_TURNED = frozenset({"neg", "negative"})
_WORDS = {"higher": 1, "lower": -1}


def direction_of(name: str) -> int:
    """+1 if a score of this name is better when higher, −1 when lower, 0 if the name does not tell.

    What counts is the longest known metric at the end of the name, after modifiers such as ``macro`` or ``@1``; a
    ``neg`` before it turns it round. Of a name such as ``arc_easy/acc_norm,none`` the part after the last ``/`` counts.

    >>> direction_of("eval_vqa_loss"), direction_of("arc_easy/acc_norm,none"), direction_of("neg_mean_squared_error")
    (-1, 1, 1)
    >>> direction_of("vqa")
    0
    """
    metric = name.rsplit("/", 1)[-1].rsplit(",", 1)[0]
    words = [word for word in re.split(r"[^a-z0-9]+", metric.lower()) if word]
    while words and (words[-1] in _MODIFIERS or words[-1].isdecimal()):
        words.pop()
    for length in range(len(words), 0, -1):
        end = "_".join(words[-length:])
        sign = 1 if end in HIGHER else -1 if end in LOWER else 0
        if sign:
            before = words[-length - 1] if length < len(words) else ""
            return -sign if before in _TURNED else sign
    return 0


def directions_of(
    tasks: Iterable[str], asked: Mapping[str, str] | None = None, stated: Mapping[str, bool] | None = None
) -> dict[str, int]:
    """The direction of each task: as the user says, else as its file says, else by its name.

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
        else direction_of(task)
        for task in tasks
    }
