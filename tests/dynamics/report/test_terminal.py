from io import StringIO

import pytest
from rich.console import Console

from dynamics.findings import Finding
from dynamics.report import summarise, terminal_summary
from dynamics.report.terminal import ROWS
from tests.fishers import with_fisher
from tests.trees import example_runs, example_tree, matrix_names


def printed(tree, width=80):
    out = StringIO()
    Console(file=out, width=width, force_terminal=False).print(terminal_summary(summarise(tree)))
    return out.getvalue()


def test_says_what_was_analysed_and_what_came_out():
    text = " ".join(printed(example_tree(run="imax")).split())
    assert "imax: 6 checkpoints (steps 100 to 600); 14 weight matrices with LoRA updates of rank 8." in text
    assert "At step 600 the update has Frobenius norm" in text
    assert "a random LoRA of the same shape has" in text


def test_says_what_the_fisher_told():
    text = " ".join(printed(with_fisher(example_tree(run="imax"))).split())
    assert "The empirical Fisher was measured at step 300 with 40 probe samples in 40 groups, in tangent space" in text
    assert "Tasks chart and grounding fight:" in text


@pytest.mark.parametrize("matrices", [1, 12, 13, 224])
def test_table_is_short(matrices):
    text = printed(example_tree(steps=2, matrices=matrices))
    assert text.count("model.layers.") == min(matrices, ROWS)
    assert (f"The {ROWS} largest of {matrices} updates at step 200" in text) == (matrices > ROWS)


@pytest.mark.parametrize("names", [matrix_names(20), [f"{'very_long.' * 20}{n}.q_proj" for n in range(3)]])
def test_fits_eighty_columns_without_cutting_a_heading_or_a_number(names):
    lines = printed(example_tree(matrices=names)).splitlines()
    assert max(map(len, lines)) <= 80
    heading = next(line for line in lines if "Frobenius eff" in line)
    assert heading.split() == ["Frobenius", "eff.", "rank", "adapter", "deficit", "rank", "for"]
    rows = [line for line in lines if line.strip().endswith(tuple("0123456789")) and "proj" in line]
    assert len(rows) == min(len(names), ROWS)
    assert all(len(row.split()) == 6 for row in rows)


def test_findings_are_grouped_and_counted():
    findings = [Finding("OD101", f"Number {n}.", "Copy it again.", file=f"c-{n}") for n in range(9)]
    text = " ".join(printed(example_tree(steps=1, findings=[Finding("OD204", "First."), *findings])).split())
    title = Finding("OD101", "").title
    assert f"error OD101: {title} (9 times) c-0: Number 0. And 8 more. Copy it again." in text
    assert text.index("OD101") < text.index("OD204")
    assert "Number 1." not in text


def test_markup_in_names_is_shown_as_it_is():
    text = printed(
        example_tree(steps=1, matrices=["[red]x[/red]", "[/]"], run="[bold]", findings=[Finding("OD202", "[/x]")])
    )
    for each in ("[red]x[/red]", "[/]", "[bold]:", "[/x]"):
        assert each in text


def test_zero_updates_say_so():
    assert "At step 600 no matrix has moved: every update is exactly zero." in printed(
        example_tree(zero=matrix_names(14))
    )


def test_several_runs_have_their_own_names():
    text = printed(example_runs(first=example_tree(steps=1), second=example_tree(steps=1)))
    assert text.index("first: 1 checkpoint") < text.index("second: 1 checkpoint") < text.index("OD100")


def test_a_captured_training_says_what_its_gradients_were():
    text = " ".join(printed(example_tree(matrices=4, gradients=[100, 200])).split())
    assert "Recorded at 6 steps, without checkpoints (steps 100 to 600)" in text
    assert "At step 200 the median gradient norm of a matrix is" in text
    assert "gradient" not in printed(example_tree(steps=1))


HOSTILE = "x\x1b[31m\x1b]0;title\x07\n\r\u202ey\x9b2J"


def shown(summary):
    out = StringIO()
    Console(file=out, width=80, force_terminal=False).print(terminal_summary(summary))
    return out.getvalue()


def hostile(value):
    """Every text of a summary with control characters in it."""
    if isinstance(value, dict):
        return {key: part if key in ("severity", "code") else hostile(part) for key, part in value.items()}
    if isinstance(value, list):
        return [hostile(part) for part in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_no_text_of_a_result_is_obeyed_by_the_terminal():
    summary = hostile(summarise(with_fisher(example_tree(run="imax"))))
    summary["findings"] = [hostile(Finding("OD101", "It is empty.", "Copy it.", file="f", matrix="m").to_dict())]
    several = summarise(example_runs(a=example_tree(run="a"), b=example_tree(run="b")))
    several["runs"] = {f"{name}{HOSTILE}": hostile(run) for name, run in several["runs"].items()}
    for text in (shown(summary), shown(several)):
        assert not [sign for sign in text if not sign.isprintable() and sign != "\n"]
        assert "x\\x1b[31m" in text
