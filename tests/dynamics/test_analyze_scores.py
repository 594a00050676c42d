"""Several runs with scores and groups: what goes with scores, how groups differ, by the command line."""

import json

import numpy as np
import pytest

from dynamics import analyze_run, open_run, schema
from dynamics.relate.run_measures import UPDATE_HEADLINE, training_loss
from dynamics.report.page import page as page_of
from tests.command import analyze
from tests.runs import write_run, write_state

STEPS = (10, 20, 30, 40)
RUNS = ("imax_s1", "imax_s2", "imax_s3", "dmax_s1", "dmax_s2", "dmax_s3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(RUNS):
        write_run(folder / name, steps=STEPS, seed=number)
    return folder


@pytest.fixture(scope="module")
def scores(runs):
    rng = np.random.default_rng(0)
    lines = ["run,step,task,score"]
    lines += [f"{run},{step},vqa/accuracy,{rng.uniform():.3f}" for run in RUNS for step in STEPS]
    lines += [f"{run},{step},report/loss,{rng.uniform():.3f}" for run in RUNS for step in STEPS]
    path = runs / "scores.csv"
    path.write_text("\n".join(lines))
    return path


def labelled(runs):
    return [f"{run[:4]}={runs / run}" for run in RUNS]


def codes(tree):
    return {finding["code"] for finding in json.loads(tree.attrs["findings"])}


@pytest.fixture(scope="module")
def result(runs, scores, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "dynamics"
    found = analyze(*labelled(runs), "--scores", scores, "--out", out, "--no-report")
    assert found.returncode == 0, found.stderr
    return found, out


def test_groups_are_compared_and_related(result):
    found, out = result
    tree = open_run(out.parent)
    schema.check(tree)
    association, comparison = (tree[name].to_dataset() for name in ("association", "comparison"))
    assert association.attrs["headline"] == comparison.attrs["headline"] == UPDATE_HEADLINE
    assert association["task"].values.tolist() == ["all", "vqa/accuracy", "report/loss"]
    assert association["direction"].values.tolist() == [1, 1, -1]
    assert (association["n_runs"].sel(measure=UPDATE_HEADLINE) == 6).all()
    assert comparison["comparison"].values.tolist() == ["imax − dmax"]
    assert comparison["n_pairs"].values.tolist() == [0]
    text = " ".join(found.stdout.split())
    assert f"3 + 3 runs are too few to decide whether {UPDATE_HEADLINE} differs between imax and dmax" in text
    assert "(smallest possible p: 0.1). 3 + 4 runs can reach 0.05." in text
    assert "3 + 3 runs, unpaired (names match 3 pairs; 6 are needed)" in text
    assert text.startswith("6 runs: 3 of imax and 3 of dmax. ")
    assert (
        text.index("Which recipe is better") < text.index("too few to decide") < text.index("Runs at their last step")
    )
    assert {"OD507", "OD513"} <= codes(tree)


def test_the_page_answers_first_and_links_to_its_tables(result):
    drawn = {"comparison": "<svg></svg>"}
    page = page_of(open_run(result[1].parent), figures=drawn)
    scores = page.index("Which group scores better?")
    first = page.index("How do the measures of the groups differ, and which go with the scores?")
    assert scores < first
    assert first < page.index('id="run0"')
    assert page.count('href="#comparison"') >= 1
    assert 'id="association"' in page
    assert "<figcaption>Every run, and the median of each group.</figcaption>" in page
    summary = json.loads((result[1] / "analysis" / "summary.json").read_text())
    rows = summary["score_comparison"]["rows"]
    assert [(row["task"], row["verdict"], row["n_first"]) for row in rows] == [
        ("all", "undecided", 3),
        ("vqa/accuracy", "undecided", 3),
        ("report/loss", "undecided", 3),
    ]
    assert summary["runs"]["imax_s1"]["scores"][0]["last"]["step"] == 40
    assert summary["comparison"]["statements"][0] in page.replace("&#39;", "'")


def test_each_run_has_the_choice_of_its_checkpoint(result):
    folder = result[1] / "analysis"
    summary = json.loads((folder / "summary.json").read_text())
    assert sorted(path.name for path in folder.glob("checkpoint_choice*")) == sorted(
        f"checkpoint_choice.{run}.json" for run in RUNS
    )
    for run in RUNS:
        choice = json.loads((folder / f"checkpoint_choice.{run}.json").read_text())
        assert choice == summary["runs"][run]["checkpoint_choice"]
        assert choice["best"] in [f"step {step}" for step in STEPS]
    recipe = summary["answers"][-1]
    assert (recipe["id"], recipe["verdict"]) == ("recipe", "undecided")
    assert "3 + 3 runs cannot decide" in recipe["answer"]


def test_retained_tasks_are_given_by_name_and_a_choice_goes_with_its_scores(runs, scores, tmp_path):
    arguments = runs / "imax_s1", "--out", tmp_path / "dynamics", "--no-report"
    assert analyze(*arguments, "--scores", scores, "--retained", "report", "--retained", "other").returncode == 0
    path = tmp_path / "dynamics" / "analysis" / "checkpoint_choice.json"
    assert json.loads(path.read_text())["retained"] == ["report/loss"]
    tree = open_run(tmp_path)
    schema.check(tree)
    assert tree["score"]["retained"].values.tolist() == [name == "report/loss" for name in tree["score"]["task"].values]
    assert "OD520" in codes(tree)
    assert analyze(*arguments).returncode == 0
    assert not path.exists()


def test_a_single_run_is_described(runs, scores, tmp_path):
    out = tmp_path / "dynamics"
    found = analyze(runs / "imax_s1", "--scores", scores, "--out", out, "--no-report")
    assert found.returncode == 0
    tree = open_run(tmp_path)
    assert tree["association"].attrs["question"] == "one_run"
    assert "OD501" in codes(tree)  # the file has scores of other runs
    statements = json.loads((out / "analysis" / "summary.json").read_text())["association"]["statements"]
    assert any("increment/ln_participation_ratio cannot be related to" in statement for statement in statements)
    # The warning is told once, on stderr; what describes and decides nothing is left to the result.
    assert (found.stderr.count("OD501"), found.stdout.count("OD501")) == (1, 0)
    assert "cannot be related to" not in found.stdout


def test_scores_of_the_trainers_log_are_found(tmp_path):
    for number in range(2):
        run = write_run(tmp_path / f"run_{number}", steps=STEPS, seed=number)
        log = [{"step": step, "eval_vqa_accuracy": step / 100 + number} for step in STEPS]
        write_state(run / f"checkpoint-{STEPS[-1]}", STEPS[-1], log)
    tree = analyze_run([tmp_path / f"run_{n}" for n in range(2)], out=tmp_path / "out", report=False)
    assert tree["association"]["task"].values.tolist() == ["eval_vqa_accuracy"]


def test_without_scores_or_groups_nothing_is_added(runs, tmp_path):
    tree = analyze_run([runs / "imax_s1", runs / "imax_s2"], out=tmp_path, report=False)
    assert set(tree.children) == {"runs"}
    assert codes(tree) == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--headline", "nothing"], "headline: expected one of the measures"),
        (["--given", "lr"], "given: expected 'loss' or 'trend', got 'lr'"),
        (["--higher", "vqa", "--lower", "vqa"], "Expected each task in higher or in lower, got 'vqa' in both."),
        (["--fail-on", "never"], "expected note, warning or error, got 'never'"),
    ],
)
def test_what_is_no_argument_ends_with_two_before_anything_is_read(runs, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr("dynamics.pipeline.open_source", lambda *_: pytest.fail("a run was opened"))
    found = analyze(runs / "imax_s1", runs / "imax_s2", "--out", tmp_path / "o", "--no-report", *arguments)
    assert found.returncode == 2
    assert words in " ".join(found.stderr.replace("│", " ").split())


def logged(tmp_path, count=4, loss=True):
    """Runs whose log has a score, and the loss between and at the checkpoints."""
    names = [f"run_{number}" for number in range(count)]
    for number, name in enumerate(names):
        run = write_run(tmp_path / name, steps=STEPS, seed=number)
        log = [{"step": step, "eval_vqa_accuracy": float(np.sin(step + number))} for step in STEPS]
        log += [{"step": step, "loss": 3.0 - step / 20 + number % 3 * step / 50} for step in range(5, 41, 5) if loss]
        for step in STEPS:
            write_state(run / f"checkpoint-{step}", step, [entry for entry in log if entry["step"] <= step])
    return [tmp_path / name for name in names]


def test_the_logged_loss_is_held_equal(tmp_path):
    runs = logged(tmp_path)
    plain = analyze_run(runs, out=tmp_path / "o", report=False)
    equal = analyze_run(runs, out=tmp_path / "p", report=False, given="loss")
    assert [tree["association"].attrs["given"] for tree in (plain, equal)] == ["", "loss"]
    both = (tree["association"].sel(measure=UPDATE_HEADLINE) for tree in (plain, equal))
    beside, held = (group["coefficient_given_loss"].values for group in both)
    assert np.isfinite(held).all()
    np.testing.assert_allclose(beside, held)
    np.testing.assert_allclose(held, equal["association"]["coefficient"].sel(measure=UPDATE_HEADLINE))
    assert not np.allclose(held, plain["association"]["coefficient"].sel(measure=UPDATE_HEADLINE))
    loss = training_loss(plain["runs/run_1"], STEPS)["loss"].values
    np.testing.assert_allclose(loss, [3 - (step - 2.5) / 20 + (step - 2.5) / 50 for step in STEPS])


def test_a_loss_that_was_not_logged_is_not_held_equal_and_said(tmp_path):
    tree = analyze_run(logged(tmp_path, 2, loss=False), out=tmp_path / "o", report=False, given="loss")
    assert tree["association"].attrs["given"] == ""
    told = [finding for finding in json.loads(tree.attrs["findings"]) if finding["code"] == "OD514"]
    assert "expected the training loss of these runs at these steps" in told[0]["message"]
    assert "--given trend" in told[0]["remedy"]


def test_relations_that_fail_cost_only_themselves(runs, scores, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("no")

    monkeypatch.setattr("dynamics.pipeline.relate_runs", fail)
    found = analyze(*labelled(runs)[:2], "--scores", scores, "--out", tmp_path / "o", "--no-report")
    assert found.returncode == 1
    assert "OD515" in found.stderr
    assert (tmp_path / "o" / "analysis").exists()


def test_a_score_file_that_is_none_is_named_and_the_rest_is_saved(runs, tmp_path):
    (tmp_path / "bad.json").write_text("[1, 2]")
    found = analyze(runs / "imax_s1", "--scores", tmp_path / "bad.json", "--out", tmp_path / "o", "--no-report")
    assert found.returncode == 1
    assert "OD506" in found.stderr
    assert (tmp_path / "o" / "analysis").exists()


def test_directions_can_be_said(runs, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(["run,step,task,score", *(f"imax_s1,{step},oddity,{step}" for step in STEPS)]))
    tree = analyze_run(runs / "imax_s1", out=tmp_path / "o", report=False, scores=[path], lower=["oddity"])
    assert tree["association"]["direction"].values.tolist() == [-1]
    undirected = analyze_run(runs / "imax_s1", out=tmp_path / "p", report=False, scores=[path])
    assert "OD505" in codes(undirected)


@pytest.mark.parametrize(("level", "status"), [("error", 0), ("note", 1)])
def test_findings_can_fail_a_build(runs, tmp_path, level, status):
    found = analyze(runs / "imax_s1", "--out", tmp_path / "o", "--no-report", "--fail-on", level)
    assert found.returncode == status


def test_a_headline_that_no_run_has_is_replaced_and_said(runs, scores, tmp_path):
    choices = {"report": False, "scores": [scores], "headline": "ln_gain_16"}
    tree = analyze_run(runs / "imax_s1", out=tmp_path / "o", **choices)
    assert tree["association"].attrs["headline"] == UPDATE_HEADLINE
    told = [finding for finding in json.loads(tree.attrs["findings"]) if finding["code"] == "OD513"]
    assert told[0]["message"].startswith(f"No run has ln_gain_16. The headline measure is {UPDATE_HEADLINE}")
