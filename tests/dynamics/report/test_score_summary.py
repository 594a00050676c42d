"""Checkpoints with their scores, and sentences about forgetting."""

import numpy as np
import pytest
import xarray as xr

from dynamics.report import summarise
from dynamics.report.page import MOST_CHECKPOINTS, page
from dynamics.report.score_summary import did_it_forget
from tests.trees import HOSTILE, example_runs, example_tree

STEPS = (0, 100, 200, 300)


def scored(errors=0.01, tree=None, **tasks):
    """A result with scores at steps 0 to 300; "/" in a name is written "__"."""
    tree = tree if tree is not None else example_tree(steps=3, matrices=3)
    values = np.array(list(tasks.values()), dtype=float).T
    arrays = {"score": values, "items": np.full_like(values, np.nan), "standard_error": np.full_like(values, errors)}
    names = [name.replace("__", "/") for name in tasks]
    dataset = xr.Dataset(
        {name: (("step", "task"), array) for name, array in arrays.items()}, {"step": list(STEPS), "task": names}
    )
    tree["score"] = xr.DataTree(dataset)
    return tree


@pytest.fixture(scope="module")
def tree():
    return scored(mmlu__acc=[0.62, 0.60, 0.55, 0.5], eval_loss=[2.0, 1.5, 1.2, 1.3])


def test_each_step_has_its_norms_scores_and_what_is_best_there(tree):
    rows = summarise(tree)["checkpoints"]
    update = tree["update"].to_dataset()
    assert [row["step"] for row in rows] == list(STEPS)
    assert (rows[0]["norm"], rows[0]["increment"]) == (None, None)
    for row in rows[1:]:
        assert row["norm"] == float(update["frobenius_norm_all"].sel(step=row["step"], kind="total"))
    assert rows[2]["increment"] == float(update["frobenius_norm_all"].sel(step=200, kind="increment"))
    assert [row["scores"]["eval_loss"] for row in rows] == [2.0, 1.5, 1.2, 1.3]
    assert [row["best"] for row in rows] == [["mmlu/acc"], [], ["eval_loss"], []]


def test_without_scores_checkpoints_have_their_norms_alone():
    summary = summarise(example_tree(steps=3, matrices=3))
    assert summary["scores"] == []
    assert [row["scores"] for row in summary["checkpoints"]] == [{}, {}, {}]
    assert did_it_forget(summary) == ""


def test_what_was_forgotten_is_told(tree):
    summary = summarise(tree)
    assert did_it_forget(summary).startswith(
        "Worse than before training: mmlu/acc (0.620 at step 0, 0.500 at step 300: worse by 0.0883 to 0.152, 95 % "
    )


def test_nothing_forgotten_is_said_with_how_many_scores():
    summary = summarise(scored(mmlu__acc=[0.62, 0.6, 0.61, 0.615], arc__acc=[0.3, 0.4, 0.4, 0.5]))
    assert did_it_forget(summary) == (
        "No score is shown to be worse than before training (2 scores with a value at step 0)."
    )


def test_a_fall_without_standard_errors_is_undecided_and_a_rise_no_question():
    summary = summarise(scored(np.nan, mmlu__acc=[0.62, 0.6, 0.55, 0.5], arc__acc=[0.3, 0.4, 0.4, 0.5]))
    assert did_it_forget(summary) == (
        "No score is shown to be worse than before training (1 score with a value at step 0). Whether 1 score got "
        "worse cannot be decided without standard errors and a known direction: mmlu/acc (0.620 at step 0, 0.500 at "
        "step 300)."
    )


def test_the_page_has_the_sentences_and_the_table_with_the_best_marked(tree):
    text = page(tree, figures={"scores": "<svg></svg>"})
    assert "How did scores change?" in text
    assert "Worse than before training: mmlu/acc" in text
    assert "<b>1.20 (best)</b>" in text
    assert "<figcaption>Scores over steps" in text
    assert "How did scores change?" not in page(example_tree(steps=2, matrices=2), figures={})


def test_a_long_table_keeps_the_best_and_the_last():
    long = example_tree(steps=250, matrices=1)
    best = int(long["update"]["step"].values[124])
    values = np.where(long["update"]["step"].values == best, 0.9, 0.5)[:, None]
    arrays = dict.fromkeys(("score", "items", "standard_error"), (("step", "task"), values))
    long["score"] = xr.DataTree(xr.Dataset(arrays, {"step": long["update"]["step"].values, "task": ["a/acc"]}))
    text = page(long, figures={})
    assert "<b>0.900 (best)</b>" in text
    rows = text.split('aria-label="Table of checkpoints"')[1].split("</table>")[0].count("<tr>") - 1
    assert 60 < rows <= MOST_CHECKPOINTS + 1
    assert f"{rows} of 250 steps" in text


def test_the_overview_has_a_column_for_each_score_with_a_step_where_it_is_another():
    one, other = (scored(tree=example_tree(steps=4, matrices=2), a__acc=[0.1, 0.2, 0.3, 0.4]) for _ in range(2))
    other["score"] = xr.DataTree(other["score"].to_dataset().assign_coords(task=[HOSTILE]))
    text = page(example_runs(a=one, b=other), figures={})
    overview = text.split('<nav aria-label="Runs"')[1].split("</nav>")[0]
    assert overview.count('<th scope="col">') == 11
    assert overview.count('0.400 <span class="small">(step 300)</span>') == 2
    assert "<td>–</td>" in overview
    assert "<script" not in overview
