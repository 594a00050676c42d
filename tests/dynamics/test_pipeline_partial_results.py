"""One part that fails costs only itself: the rest is written, the failure is named, the exit status says so."""

import json

import pytest
from typer.testing import CliRunner

from dynamics import open_run, pipeline, plot
from dynamics.analyze import app
from dynamics.report import page
from tests.runs import write_run

PARTS = {
    "/path": (pipeline, "training_path"),
    "/base": (pipeline, "compare_with_base"),
    "figures/": (plot, "drawings"),
    "report.html": (page, "page"),
}
#: One place takes all that a part raises: each part fails once, and one of them in each way.
FAILURES = [
    ("/path", OSError("Too many open files")),
    ("/path", ValueError("a\x1b[31mb")),
    ("/path", MemoryError()),
    ("/base", OSError("Too many open files")),
    ("figures/", ValueError("a\x1b[31mb")),
    ("report.html", ValueError("a\x1b[31mb")),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("partial") / "run")


@pytest.mark.usefixtures("one_figure")
@pytest.mark.parametrize(("part", "error"), FAILURES)
def test_a_part_that_fails_is_named_and_the_rest_is_written(run, tmp_path, monkeypatch, part, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(*PARTS[part], fail)
    result = CliRunner().invoke(app, [str(run), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert f"OD209 error {part} could not be made ({type(error).__name__}" in result.stderr
    assert "\x1b" not in result.stderr + result.stdout
    tree = open_run(tmp_path)
    assert tree["update"]["frobenius_norm"].notnull().any()
    assert "OD209" in [
        finding["code"] for finding in json.loads((tmp_path / "analysis" / "summary.json").read_text())["findings"]
    ]
    assert (tmp_path / "analysis" / "report.html").exists() == (part != "report.html")
    assert (tmp_path / "analysis" / "figures").exists() == (part != "figures/")
    if part != "report.html":
        assert "OD209" in (tmp_path / "analysis" / "report.html").read_text()
        assert "\x1b" not in (tmp_path / "analysis" / "report.html").read_text()


@pytest.mark.usefixtures("one_figure")
def test_without_a_report_help_says_that_the_last_one_goes(run, tmp_path):
    assert CliRunner().invoke(app, [str(run), "--out", str(tmp_path)]).exit_code == 0
    result = CliRunner().invoke(app, [str(run), "--out", str(tmp_path), "--no-report"])
    assert result.exit_code == 0
    assert not (tmp_path / "analysis" / "report.html").exists()
    assert result.stdout.rstrip().endswith("summary.json")
    assert "Without, earlier ones are removed." in " ".join(CliRunner().invoke(app, ["--help"]).stdout.split()).replace(
        "│ │ ", ""
    )
