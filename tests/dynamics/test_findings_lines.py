import pytest

from dynamics.findings import Finding
from dynamics.report import finding_lines, summarise
from tests.trees import example_runs, example_tree

FINDINGS = [
    Finding("OD202", "It is zero."),
    Finding("OD115", "It is absent.", matrix="m"),
    Finding("OD101", "It is\nempty.", "Copy it again.", file="c/x.bin"),
]


@pytest.mark.parametrize(
    ("severities", "lines"),
    [
        (("error",), ["OD101 error c/x.bin: It is empty. Copy it again."]),
        (
            ("error", "warning"),
            ["OD101 error c/x.bin: It is empty. Copy it again.", "OD115 warning m: It is absent."],
        ),
        (("note",), ["OD202 note It is zero."]),
    ],
)
def test_a_line_for_each_finding_gravest_first(severities, lines):
    assert list(finding_lines(summarise(example_tree(steps=1, findings=FINDINGS)), severities)) == lines


def test_of_several_runs_each_line_names_its_run():
    tree = example_runs(a=example_tree(steps=1, findings=FINDINGS[2:]), b=example_tree(steps=1))
    assert list(finding_lines(summarise(tree), ("error",))) == [
        "OD100 error runs/c: No checkpoints in 'runs/c'.",
        "OD101 error a, c/x.bin: It is empty. Copy it again.",
    ]


def test_what_a_terminal_would_obey_is_written_out():
    tree = example_tree(steps=1, findings=[Finding("OD101", "\x1b[2J", file="a\u202eb")])
    assert list(finding_lines(summarise(tree), ("error",))) == ["OD101 error a\\u202eb: \\x1b[2J"]


def test_many_findings_of_one_code_can_be_counted():
    findings = [*FINDINGS, *(Finding("OD115", f"Number {number}.") for number in range(4))]
    lines = list(finding_lines(summarise(example_tree(steps=1, findings=findings)), ("error", "warning"), most=2))
    assert lines[1:] == [
        "OD115 warning m: It is absent.",
        "OD115 warning Number 0.",
        "OD115 warning 3 more; all are in summary.json.",
    ]
