"""Score files as the tools write them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import TrainingArguments
from transformers.trainer_pt_utils import save_metrics

from dynamics.relate.score_files import ScoreRow, read_scores, score_files

#: Written by lm_eval 0.4.13 of its dummy model, two tasks in a group and one beside it; configurations and environment
#: are left out.
HARNESS = Path(__file__).with_name("lm_eval_results.json")


def written(folder: Path, name: str, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class Trainer:
    """What ``save_metrics`` takes of a trainer."""

    def __init__(self, folder: Path) -> None:
        self.args = TrainingArguments(output_dir=str(folder), report_to=[])

    def is_world_process_zero(self) -> bool:
        return True


def test_harness_results_give_scores_of_groups_instead_of_their_members():
    file = read_scores(HARNESS)
    assert not file.findings
    assert [(row.run, row.step, row.task, row.higher_is_better) for row in file.rows] == [
        ("imax_s1", 50, "toy_perplexity/word_perplexity", False),
        ("imax_s1", 50, "toy_perplexity/bits_per_byte", False),
        ("imax_s1", 50, "toy_group/acc", True),
    ]
    accuracy = file.rows[-1]
    assert (accuracy.score, accuracy.items) == (pytest.approx(1 / 3), 18)
    assert accuracy.standard_error == pytest.approx(math.sqrt(1 / 36 + 1 / 36) / 2)  # of two tasks, each 1/6
    assert file.rows[0].items == 9  # what was evaluated of the 12
    assert math.isnan(file.rows[0].standard_error)  # "N/A"


def test_harness_filters_and_older_layout(tmp_path):
    results = {
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01},
        "old": {"acc": 0.5, "acc_stderr": 0.1},
    }
    path = written(tmp_path, "results_2026.json", {"results": results, "config": {"model_args": "pretrained=x"}})
    rows = read_scores(path, run="r").rows
    assert [(row.task, row.score, row.standard_error, row.step) for row in rows] == [
        ("gsm8k/exact_match,strict-match", 0.25, 0.01, None),
        ("old/acc", 0.5, 0.1, None),
    ]


@pytest.mark.parametrize(
    ("arguments", "folder", "expected"),
    [
        ("peft=runs/imax/checkpoint-70,dtype=auto", "anywhere", ("imax", 70)),
        ({"pretrained": "base", "peft": "/x/dmax/checkpoint-8/"}, "anywhere", ("dmax", 8)),
        ({"pretrained": "org/base"}, "imax/checkpoint-30/evaluation", ("imax", 30)),
        ({"pretrained": "org/base"}, "runs__dmax__checkpoint-9", ("dmax", 9)),
        ({"pretrained": "org/base"}, "imax", ("imax", None)),
    ],
)
def test_run_and_step_of_harness_results(tmp_path, arguments, folder, expected):
    content = {"results": {"t": {"acc,none": 1.0}}, "config": {"model_args": arguments}}
    row = read_scores(written(tmp_path / folder, "results_1.json", content)).rows[0]
    assert (row.run, row.step) == expected


def test_trainer_results_take_the_step_of_the_state_beside_them(tmp_path):
    run = tmp_path / "imax"
    run.mkdir()
    metrics = {"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 3.0, "eval_samples": 40, "epoch": 3.0}
    save_metrics(Trainer(run), "eval", metrics)
    written(run, "trainer_state.json", {"global_step": 120, "log_history": []})
    expected = (ScoreRow("imax", 120, "eval_accuracy", 0.75, 40.0), ScoreRow("imax", 120, "eval_loss", 0.5, 40.0))
    for name in ("eval_results.json", "all_results.json"):
        assert [row.__dict__ | {"standard_error": None} for row in read_scores(run / name).rows] == [
            row.__dict__ | {"standard_error": None} for row in expected
        ]


def test_trainer_results_in_a_checkpoint_and_without_any_step(tmp_path):
    inside = written(tmp_path / "imax" / "checkpoint-20", "eval_results.json", {"eval_vqa_loss": 1.0})
    alone = written(tmp_path / "dmax", "eval_results.json", {"eval_vqa_loss": 1.0})
    assert [(row.run, row.step) for path in (inside, alone) for row in read_scores(path).rows] == [
        ("imax", 20),
        ("dmax", None),
    ]


def test_trainer_log_of_several_evaluation_sets(tmp_path):
    history = [
        {"step": 10, "loss": 2.0},
        {"step": 10, "eval_vqa_loss": 1.5, "eval_vqa_runtime": 3.0},
        {"step": 10, "eval_report_loss": 2.5, "eval_report_num_tokens": 900.0},
        {"step": 20, "eval_vqa_loss": float("nan")},
    ]
    path = written(tmp_path / "imax", "trainer_state.json", {"global_step": 20, "log_history": history})
    assert [(row.run, row.step, row.task, row.score) for row in read_scores(path).rows] == [
        ("imax", 10, "eval_vqa_loss", 1.5),
        ("imax", 10, "eval_report_loss", 2.5),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tidy_table(tmp_path, delimiter):
    lines = [
        "Run,step,task,metric,score,items,standard_error,note",
        "a,10,vqa,accuracy,0.5,100,0.05,x",
        "a,,vqa,,1e-1,,,",
    ]
    path = written(tmp_path, "scores.csv", "\ufeff" + "\n".join(lines).replace(",", delimiter) + "\n\n")
    file = read_scores(path)
    assert not file.findings
    assert file.rows[0] == ScoreRow("a", 10, "vqa/accuracy", 0.5, 100.0, 0.05)
    assert (file.rows[1].step, file.rows[1].task, file.rows[1].score) == (None, "vqa", 0.1)


def test_cells_that_are_no_numbers_are_named_with_their_line(tmp_path):
    rows = ["run,step,task,score", "a,10,t,good", "a,1.5,t,0.5", "a,10,t,", "a,20,t,0.5", ",20,t,0.5", "a,10,t,inf"]
    file = read_scores(written(tmp_path, "s.csv", "\n".join(rows)))
    assert [row.step for row in file.rows] == [20]
    (finding,) = file.findings
    assert finding.code == "OD504"
    assert finding.evidence == {"cells": 5}
    for problem in (
        "line 2, score 'good'",
        "line 3, step '1.5'",
        "line 4, score ''",
        "line 6, run ''",
        "line 7, score 'inf'",
    ):
        assert problem in finding.message


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("s.csv", "a,b\n1,2\n", "Expected the columns run, step, task, score, got a, b: no step, task, score."),
        (
            "s.csv",
            "step,task,score\n1,t,2\n",
            "Expected the columns run, step, task, score, got step, task, score: no run.",
        ),
        ("s.csv", 'run,step,task,score\n"a,1,t,2', "It is not a CSV table: unexpected end of data."),
        ("s.json", {"a": 1}, "Expected trainer_state.json, *_results.json"),
        ("s.json", "{", "It is not valid JSON"),
        ("s.csv", "", "It is empty"),
        ("s.md", "# Scores", "Expected a score file whose name ends in .csv, .tsv or .json, got 's.md'."),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, problem):
    file = read_scores(written(tmp_path, name, content))
    (finding,) = file.findings
    assert (finding.code, finding.severity, finding.file, file.rows) == ("OD506", "error", name, ())
    assert problem in finding.message


def test_a_table_in_another_encoding_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "s.csv").write_bytes("run,step,task,score\na,1,Präzision,0.5\n".encode("latin-1"))
    (finding,) = read_scores(tmp_path / "s.csv").findings
    assert finding.code == "OD506"
    assert finding.message == (
        "Expected UTF-8, got another encoding ('utf-8' codec can't decode byte 0xe4 in position 26: invalid "
        "continuation byte)."
    )
    assert finding.remedy == "Save the table as UTF-8 (Excel: 'CSV UTF-8')."


@pytest.mark.parametrize("odd", [["b"], {"b": 1}, None, 3, 1.5, True])
def test_odd_members_of_a_harness_group_are_no_tasks(tmp_path, odd):
    results = {task: {"acc,none": 0.5} for task in ("group", "a", "b")}
    content = {"results": results, "group_subtasks": {"group": ["a", odd], "other": odd}}
    file = read_scores(written(tmp_path, "results_1.json", content), run="r")
    assert [row.task for row in file.rows] == ["group/acc", "b/acc"]


@pytest.mark.parametrize("key", ["group_subtasks", "higher_is_better", "n-samples", "config", "model_name", "versions"])
@pytest.mark.parametrize("odd", [[[]], [{}], "text", 3, None, {"t": [[1]]}, {"t": {"acc": [1]}}])
def test_whatever_a_harness_file_holds_its_scores_are_read(tmp_path, key, odd):
    content = {"results": {"t": {"acc,none": 0.5, "odd,none": odd}, "u": odd}, key: odd}
    file = read_scores(written(tmp_path, "results_1.json", content), run="r")
    assert ("t/acc", 0.5) in [(row.task, row.score) for row in file.rows]


def test_a_file_on_which_reading_fails_costs_only_itself(tmp_path, monkeypatch):
    def fail(*_):
        raise TypeError("unhashable type: 'list'")

    monkeypatch.setattr("dynamics.relate.score_files._harness", fail)
    file = read_scores(written(tmp_path, "results_1.json", {"results": {}}))
    (finding,) = file.findings
    assert (finding.code, finding.severity, file.rows) == ("OD506", "error", ())
    assert finding.message == "It cannot be read as scores: TypeError: unhashable type: 'list'."


HOSTILE = [
    "\x1b[31mred",
    "bell\x07",
    "\x1b]0;title\x07",
    "line\nbreak",
    "\u202ereversed",
    "nul\0",
    "\ud800",
    "x" * 5000,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_a_terminal_would_obey_are_escaped(tmp_path, name):
    harness = {"results": {name: {f"{name},none": 0.5, "acc,none": name}}, "model_name": f"{name}/checkpoint-5"}
    log = {"log_history": [{"step": 5, f"eval_{name}_loss": 1.0}]}
    files = [read_scores(written(tmp_path, f, c)) for f, c in (("results_1.json", harness), ("s.json", log))]
    if name.isprintable() or name.startswith(("\x1b", "bell")):
        table = f'run,step,task,metric,score\n"{name}",5,"{name}",acc,0.5\n"{name}",5,t,acc,"{name}"'
        files.append(read_scores(written(tmp_path, "s.csv", table)))
    for file in files:
        assert len(file.rows) == 1
        texts = [file.rows[0].task, file.rows[0].run, *(finding.message for finding in file.findings)]
        assert all(text.isprintable() and len(text) < 1100 for text in texts)


def test_score_files_of_a_run(tmp_path):
    for name in ("all_results.json", "train_results.json", "eval_results.json", "trainer_state.json"):
        written(tmp_path, name, {})
    written(tmp_path / "checkpoint-5", "eval_results.json", {})
    below = tmp_path / "lm_eval" / "runs__imax__checkpoint-50"
    below.mkdir(parents=True)
    shutil.copy(HARNESS, below / "results_2026-11-25T05-05-42.371965.json")
    assert [str(path.relative_to(tmp_path)) for path in score_files(tmp_path)] == [
        "all_results.json",
        "checkpoint-5/eval_results.json",
        "eval_results.json",
        "lm_eval/runs__imax__checkpoint-50/results_2026-11-25T05-05-42.371965.json",
    ]
