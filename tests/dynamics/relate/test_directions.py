"""Which way scores point, by names as evaluation tools and people write them."""

import re

import pytest

from dynamics.relate import directions
from dynamics.relate.directions import directions_of, metric_of

HIGHER = """
accuracy eval_accuracy acc acc_norm,none arc_easy/acc_norm,none valAcc hits@1 hits@10 pass@1 pass@k top1 top_1 top-5
accuracy_top5 top1_accuracy mAP50 mAP50-95 map@50 ap50 bleu4 BLEU-4 CIDEr CIDEr-D psnr ssim mauve anls tpr r2 r2_score
rewards/margins eval_rewards/margins rewards/accuracies vqa/score eval_score accuracy_epoch R@5 P@1 ndcg@10 mrr
mean_reciprocal_rank macro_f1 f1_macro F1-score gsm8k/exact_match,strict-match rougeLsum rouge-2 meteor chrf++ auroc
pr_auc mIoU meanIoU dice sensitivity true_negative_rate negative_predictive_value win_rate success_rate
log_likelihood accuracy/mmlu accuracy/val maj@8 balanced_accuracy inst_level_strict_acc,none
neg_mean_squared_error neg_log_loss neg_brier_score neg_loss inverse_perplexity inv_ppl perplexity_inverse 1-wer
one_minus_wer 1_minus_error one-minus-loss eval_1-wer -loss 100-wer 1-hallucination_rate non_toxicity_rate
loss_reduction error_reduction wer_improvement accuracy_improvement error_free_rate
"""
LOWER = """
loss eval_loss eval_vqa_loss val_loss_epoch loss/val loss/test val_loss_best perplexity eval_ppl word_perplexity,none
bits_per_byte wer cer eer der fnr fpr FNR false_positive_rate logloss log_loss smape mae rmse mean_absolute_error lpips
fid hd95 HD95 hausdorff_distance assd ece brier_score edit_distance nll negative_log_likelihood neg_log_likelihood
error_rate top1_error top-5_err hallucination_rate toxicity toxicity_score miss_rate mean_rank evalLoss wordErrorRate
1-accuracy one_minus_accuracy 1_minus_acc one-minus-accuracy eval_1-accuracy val/1-auc 1-mean_accuracy 100-accuracy
-accuracy inverse_accuracy accuracy_drop f1_degradation accuracy_loss accuracy_reduction loss_increase
"""
UNKNOWN = """
vqa score_std accuracy_std acc_stderr,none accuracy/std loss_scale loss/weight rewards/chosen rewards/rejected
logps/chosen kl entropy learning_rate attack_success_rate anomaly_score severity_score accuracy_gap loss_ratio
accuracy_delta negative_recall neg_f1 runtime samples_per_second refusal_rate bias length z_score wer_gain 1-shot rank
"""


@pytest.mark.parametrize(
    ("name", "direction"),
    [(name, sign) for names, sign in ((HIGHER, 1), (LOWER, -1), (UNKNOWN, 0)) for name in names.split()],
)
def test_direction(name, direction):
    assert metric_of(name).direction == direction


@pytest.mark.parametrize("name", ["1-shot_accuracy", "5-shot/acc", "rouge_1-f1", "1-nn_accuracy", "top-1-accuracy"])
def test_a_number_before_a_metric_is_no_negation(name):
    assert metric_of(name).direction == 1


@pytest.mark.parametrize(
    ("names", "task"),
    [
        (("eval_loss", "eval_ppl", "eval_accuracy", "val_loss_epoch", "hits@1", "hits@10", "eval_1-accuracy"), ""),
        (("eval_vqa_loss", "vqa/accuracy", "test_vqa_wer", "vqa/score", "accuracy/vqa"), "vqa"),
        (("arc_easy/acc,none", "arc_easy/acc_norm,none"), "arc_easy"),
        (("mmlu_5/acc",), "mmlu_5"),
        (("oddity",), "oddity"),
    ],
)
def test_scores_of_one_task_are_known_as_such(names, task):
    assert {metric_of(name).task for name in names} == {task}


def test_what_the_user_says_goes_before_the_file_and_the_name():
    names = ["a/loss", "b/loss", "c/loss"]
    assert directions_of(names, {"a/loss": "higher"}, {"a/loss": False, "b/loss": True}) == {
        "a/loss": 1,
        "b/loss": 1,
        "c/loss": -1,
    }


@pytest.mark.parametrize("word", ["up", "Higher", "", "higher "])
def test_another_word_than_higher_or_lower_is_refused(word):
    message = f"directions['vqa']: expected 'higher' or 'lower' (whichever is better), got {word!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        directions_of(["qa"], {"vqa": word})


def test_tasks_keep_their_order_and_only_they_are_told():
    asked, stated = {"b": "lower", "absent": "higher"}, {"a": True, "missing": False}
    assert list(directions_of(["c_loss", "b", "a"], asked, stated).items()) == [("c_loss", -1), ("b", -1), ("a", 1)]


def test_no_metric_points_both_ways():
    assert not directions.HIGHER & directions.LOWER
    assert not directions._EITHER & (directions.HIGHER | directions.LOWER)


@pytest.mark.parametrize("split", ["eval_{}", "val_{}", "test/{}", "{}/validation", "{}_epoch", "macro_{}", "{}_mean"])
def test_every_known_metric_points_its_way_whatever_split_or_mean_it_is_of(split):
    words = [(word, sign) for words, sign in ((directions.HIGHER, 1), (directions.LOWER, -1)) for word in sorted(words)]
    wrong = [(word, sign) for word, sign in words if metric_of(split.format(word)).direction != sign]
    assert wrong == []


def test_one_minus_turns_every_known_metric():
    words = [(word, sign) for words, sign in ((directions.HIGHER, 1), (directions.LOWER, -1)) for word in sorted(words)]
    wrong = [word for word, sign in words if metric_of(f"one_minus_{word}").direction != -sign]
    assert wrong == []
