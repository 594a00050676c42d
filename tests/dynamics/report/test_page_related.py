"""The sections of the page on groups of runs and on scores."""

import xarray as xr

from dynamics import plot
from dynamics.relate.run_measures import relate_runs
from dynamics.relate.score_files import ScoreRow
from dynamics.report.page import MOST_PAIRS, MOST_STATEMENTS, RELATIONS, related_sections
from tests.related import RUNS, many_tasks, related_groups
from tests.trees import example_tree


def test_both_groups_share_one_form():
    groups = related_groups()
    tree = xr.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
    parts = related_sections(tree, {"comparison": "<svg/>", "association_grid": "<svg/>"})
    assert parts["headline"] == groups["comparison"].attrs["headline"]
    association, comparison = parts["association"], parts["comparison"]
    assert association["headings"] == ["measure", "task", "r", "95 % interval", "p", "p, adjusted", "runs", "steps",
                                       "significant"]  # fmt: skip
    assert comparison["headings"] == ["measure", "groups", "difference", "95 % interval", "effect size", "p",
                                      "p, adjusted", "units", "significant"]  # fmt: skip
    for part, name in ((association, "task"), (comparison, "comparison")):
        group = groups[part["id"]]
        assert len(part["rows"]) == group.sizes["measure"] * group.sizes[name]
        assert all(len(row) == len(part["headings"]) for row in part["rows"])
    assert [caption for _, caption in comparison["figures"]] == ["Every run, and the median of each group."]
    assert len(association["figures"]) == 1


def test_rows_have_the_stored_numbers():
    group = related_groups()["association"]
    part = related_sections(xr.DataTree.from_dict({"/association": group}), {})["association"]
    (row,) = [row for row in part["rows"] if row[:2] == ["total/stable_rank", "vqa/accuracy"]]
    stored = group.sel(measure="total/stable_rank", task="vqa/accuracy")
    assert row[2] == stored["coefficient"].item()
    assert row[6:] == [stored["n_runs"].item(), stored["n_steps"].item(), "yes" if stored["holds"].item() else "no"]


def test_a_result_without_them_has_no_section():
    tree = example_tree(steps=2, matrices=2)
    parts = related_sections(tree, {})
    assert [parts[name] for name in RELATIONS] == [None, None, None]
    assert parts["headline"] == ""
    assert not {"association", "comparison", "score_comparison"} & set(plot.drawings(tree))


def test_many_tasks_stay_within_a_page():
    group = many_tasks()
    assert group.sizes["task"] == 301
    part = related_sections(xr.DataTree.from_dict({"/association": group}), {})["association"]
    assert len(part["rows"]) == MOST_PAIRS
    assert {row[0] for row in part["rows"][:1]} <= set(group["measure"].values.tolist())
    assert f"{MOST_PAIRS} of {301 * group.sizes['measure']:,} rows: the significant ones" in part["caption"]
    assert len(part["statements"]) <= MOST_STATEMENTS
    assert len(part["statements"]) + part["more"] == len(group.attrs["statements"])


def test_tasks_with_the_same_reason_share_a_sentence():
    trees = {run: example_tree(run=run, steps=4, matrices=3) for run in RUNS[:2]}
    rows = [ScoreRow(run, 100, f"task{number}/accuracy", 0.5) for run in trees for number in range(100)]
    group = relate_runs(trees, rows).groups["association"]
    assert len(group.attrs["statements"]) == 1
    assert "and 93 more: no run has a step with both." in group.attrs["statements"][0]
