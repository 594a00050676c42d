from io import StringIO

import pytest
from rich.console import Console

from dynamics.findings import Finding
from dynamics.report import finding_lines, summarise, terminal_answers, terminal_numbers
from dynamics.report.answers import answers_of_runs
from dynamics.report.answers.answer import QUESTIONS
from dynamics.report.terminal import ROWS
from tests.answers import answered
from tests.fishers import with_fisher
from tests.trees import example_runs, example_tree, matrix_names


def shown(summary, width=80):
    out = StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    console.print(terminal_answers(summary))
    console.print(terminal_numbers(summary))
    return out.getvalue()


def printed(tree, width=80):
    return shown(summarise(tree), width)


def words(text):
    return " ".join(text.split())


def test_says_what_was_analysed_and_what_came_out():
    text = " ".join(printed(example_tree(run="imax")).split())
    assert "imax: 6 checkpoints (steps 100 to 600); 14 weight matrices with LoRA updates of rank 8." in text
    assert "At step 600 the update has Frobenius norm" in text
    assert "a random LoRA of the same shape has" in text


def test_every_answer_has_its_verdict_and_the_others_one_line():
    summary = answered(summarise(example_tree(run="imax")))
    text = shown(summary)
    lines = text.splitlines()
    for question, verdict in (("trained", "Yes"), ("rank", "Mixed"), ("stable", "No")):
        place = lines.index(f"{QUESTIONS[question]} {verdict}")
        assert lines[place + 1].strip() == f"The answer to {question}."
    assert (
        f"{QUESTIONS['concentration']} Undecided The answer to concentration. Confidence 95 %. To be surer: probe more "
        "samples."
    ) in words(text)
    unasked = f"Not asked {QUESTIONS['tasks']} {QUESTIONS['recipe']} To ask: pass --probe MODULE:FUNCTION."
    assert unasked in words(text)
    assert "The answer to tasks." not in text


def test_the_answers_come_before_the_findings_and_the_table():
    text = shown(answered(summarise(example_tree(findings=[Finding("OD204", "First.")]))))
    assert text.index("Did it train") < text.index("Findings: ") < text.index("12 largest of 14 updates")


def test_what_the_fisher_told_is_left_to_the_page():
    text = words(printed(with_fisher(example_tree(run="imax"))))
    assert "The empirical Fisher was measured" not in text


@pytest.mark.parametrize("matrices", [1, 12, 13, 224])
def test_table_is_short(matrices):
    text = printed(example_tree(steps=2, matrices=matrices))
    table = text[text.index("updates at step" if matrices > ROWS else "Updates at step") :]
    assert table.count("model.layers.") == min(matrices, ROWS)
    assert (f"The {ROWS} largest of {matrices} updates at step 200" in text) == (matrices > ROWS)


@pytest.mark.parametrize("names", [matrix_names(20), [f"{'very_long.' * 20}{n}.q_proj" for n in range(3)]])
def test_fits_eighty_columns_without_cutting_a_heading_or_a_number(names):
    lines = printed(example_tree(matrices=names)).splitlines()
    assert max(map(len, lines)) <= 80
    heading = next(line for line in lines if "Frobenius eff" in line)
    assert heading.split() == ["Frobenius", "eff.", "rank", "adapter", "deficit", "rank", "for"]
    table = lines[lines.index(heading) :]
    rows = [line for line in table if line.strip().endswith(tuple("0123456789")) and "proj" in line]
    assert len(rows) == min(len(names), ROWS)
    assert all(len(row.split()) == 6 for row in rows)


def test_findings_are_counted_and_notes_folded():
    findings = [Finding("OD101", f"Number {n}.", "Copy it again.", file=f"c-{n}") for n in range(9)]
    notes = [Finding("OD204", "First."), Finding("OD202", "Zero."), Finding("OD202", "Zero, too.")]
    text = words(printed(example_tree(steps=1, findings=[*notes, *findings, Finding("OD115", "Gone.")])))
    assert "Findings: 9 errors, 1 warning; notes OD202, OD204. They are explained in report.html." in text
    assert "No findings." in printed(example_tree(steps=1))


def test_what_goes_to_stderr_is_not_told_here():
    findings = [Finding("OD101", f"Number {n}.", "Copy it again.") for n in range(3)]
    summary = answered(summarise(example_tree(steps=1, findings=findings)))
    for line in finding_lines(summary, ("error", "warning")):
        assert line not in words(shown(summary))
    assert "Number" not in shown(summary)


def test_markup_in_names_is_shown_as_it_is():
    tree = example_tree(steps=1, matrices=["[red]x[/red]", "[/]"], run="[bold]")
    text = shown(answered(summarise(tree), {"trained": "[/x] moved."}))
    for each in ("[red]x[/red]", "[/]", "[bold]:", "[/x] moved."):
        assert each in text


def test_zero_updates_say_so():
    assert "At step 600 no matrix has moved: every update is exactly zero." in printed(
        example_tree(zero=matrix_names(14))
    )


def test_several_runs_have_a_line_each_and_one_answer():
    tree = example_tree(steps=1, matrices=2, findings=[Finding("OD117", "Names.")])
    trees = {f"run_{n}": tree.copy() for n in range(64)}
    tree = example_runs(**trees)
    summary = answered(summarise(tree))
    summary["answers"] = [answer.to_json() for answer in answers_of_runs(tree, summary)]
    text = shown(summary)
    assert len(text.splitlines()) <= 64 + 40
    assert words(text).startswith("64 runs. ")
    assert words(text).count("Yes in all 64 runs: The answer to trained.") == 1
    assert text.count("OD117") == 1
    assert all(sum(line.startswith(f"{run} ") for line in text.splitlines()) == 1 for run in trees)


def test_several_runs_begin_with_the_recipe():
    tree = example_runs(first=example_tree(steps=1), second=example_tree(steps=1))
    for run in tree["runs"].children.values():
        run.attrs["label"] = "imax"
    summary = answered(summarise(tree))
    summary["answers"][-1] |= {"verdict": "undecided", "answer": "imax may be better."}
    text = words(shown(summary))
    assert text.startswith(f"2 runs: 2 of imax. {QUESTIONS['recipe']} Undecided imax may be better.")
    assert text.index("imax may be better") < text.index(QUESTIONS["trained"]) < text.index("1 error")


def test_names_of_runs_and_groups_keep_their_ends_within_eighty_columns():
    names = [f"{'seed_' * 20}{n}" for n in range(3)]
    tree = example_runs(**{name: example_tree(steps=1) for name in names})
    for run in tree["runs"].children.values():
        run.attrs["label"] = "a_group_with_a_long_name"
    text = printed(tree)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"seed_{n} " in text for n in range(3))


def test_a_captured_training_says_what_its_gradients_were():
    text = " ".join(printed(example_tree(matrices=4, gradients=[100, 200])).split())
    assert "Recorded at 6 steps, without checkpoints (steps 100 to 600)" in text
    assert "At step 200 the median gradient norm of a matrix is" in text
    assert "gradient" not in printed(example_tree(steps=1))


HOSTILE = "x\x1b[31m\x1b]0;title\x07\n\r\u202ey\x9b2J"


def hostile(value):
    """Every text of a summary with control characters in it."""
    if isinstance(value, dict):
        return {
            key: part if key in ("severity", "code", "id", "verdict") else hostile(part) for key, part in value.items()
        }
    if isinstance(value, list):
        return [hostile(part) for part in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_no_text_of_a_result_is_obeyed_by_the_terminal():
    summary = hostile(answered(summarise(with_fisher(example_tree(run="imax")))))
    summary["findings"] = [hostile(Finding("OD101", "It is empty.", "Copy it.", file="f", matrix="m").to_dict())]
    several = answered(summarise(example_runs(a=example_tree(run="a"), b=example_tree(run="b"))))
    several["answers"] = hostile(several["answers"])
    several["runs"] = {f"{name}{HOSTILE}": hostile(run) for name, run in several["runs"].items()}
    for text in (shown(summary), shown(several)):
        assert not [sign for sign in text if not sign.isprintable() and sign != "\n"]
        assert "x\\x1b[31m" in text
