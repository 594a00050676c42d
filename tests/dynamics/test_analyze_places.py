"""Where the command line writes, what it leaves alone there, and which folders it takes for runs."""

import json
import os

import pytest

from dynamics import open_run
from dynamics.pipeline import named_runs
from tests.command import analyze, assert_refused
from tests.runs import write_run, write_state


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_an_output_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    message = f"The output folder '{out}' cannot be written (Not a directory). Choose another with --out.\n"
    assert analyze(run, "--out", out).stderr == message


def names_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["analysis", "analysis/summary.json", "analysis/analysis.zarr"])
def test_what_somebody_else_put_there_is_refused_before_computing(run, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    before = names_of(out)
    monkeypatch.setattr("dynamics.pipeline.measure", lambda *_: pytest.fail("it was computed"))
    assert_refused(analyze(run, "--out", out), 2, str(out / "analysis"), "Move it away, or choose another folder")
    assert names_of(out) == before


@pytest.mark.parametrize("name", ["report.html", "figures", "summary.json", "run.yaml"])
def test_what_lies_beside_the_result_is_left_alone(run, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert analyze(run, "--out", tmp_path / "out", "--quiet", "--no-report").returncode == 0
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == sorted(["analysis", name])


@pytest.mark.usefixtures("one_figure")
def test_the_users_own_figures_stay(run):
    (run / "figures").mkdir()
    (run / "figures" / "mine.txt").write_text("x")
    for _ in range(2):
        assert analyze(run, "--out", run, "--quiet").returncode == 0
    assert (run / "figures" / "mine.txt").read_text() == "x"
    assert (run / "analysis" / "figures" / "spectra.svg").exists()


@pytest.mark.usefixtures("one_figure")
def test_what_an_earlier_analysis_left_over_is_removed(run, tmp_path):
    out = tmp_path / "out"
    other = write_run(tmp_path / "other", seed=5)
    assert analyze(run, other, "--out", out, "--quiet").returncode == 0
    assert (out / "analysis" / "figures" / "other" / "spectra.svg").exists()
    assert analyze(run, "--out", out, "--quiet", "--no-report").returncode == 0
    left = sorted(entry.name for entry in (out / "analysis").iterdir())
    assert left == ["analysis.zarr", "rank_pattern.json", "run.yaml", "summary.json"]


def test_nothing_is_left_where_nothing_was_analysed(tmp_path):
    write_state(tmp_path / "run" / "checkpoint-5", 5)
    assert analyze(tmp_path / "run", "--out", tmp_path / "out").returncode == 2
    assert not (tmp_path / "out").exists()


def test_several_runs_go_to_a_folder_of_their_own(run, tmp_path, monkeypatch):
    (tmp_path / "clone" / "dynamics").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone")
    assert analyze(run, write_run(tmp_path / "other", [1]), "--no-report", "--quiet").returncode == 0
    assert names_of(tmp_path / "clone" / "dynamics") == []
    assert list(open_run("dynamics-comparison")["runs"].children) == ["other", "run"]


def test_a_run_from_somebody_else_touches_nothing_outside(run, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("secret.txt", "summary.json", "report.html"):
        (victim / name).write_text("precious")
    staging = run / "dynamics" / ".staging"
    for stage in (f"old-{os.uname().nodename}-4194303-deadbeef", "old-localhost-4194303-deadbeef"):
        (staging / stage).mkdir(parents=True)
        (staging / stage / "plan.json").write_text(json.dumps(["../../victim", str(victim), 1, None]))
        (staging / stage / "was").symlink_to(victim)
    (run / "dynamics" / "x").symlink_to("../../victim")
    (staging / "written.json").write_text(json.dumps({"names": ["x/secret.txt", "x/summary.json"], "commit": "c"}))
    (run / "dynamics" / ".analysis-0123").symlink_to(victim)
    (run / "dynamics" / "analysis.previous").symlink_to(victim)
    for _ in range(2):
        analyze(run, "--quiet", "--no-report")
        assert {path.name: path.read_text() for path in victim.iterdir()} == dict.fromkeys(
            ("secret.txt", "summary.json", "report.html"), "precious"
        )
    (run / "dynamics" / "analysis.previous").unlink()
    assert analyze(run, "--quiet", "--no-report").returncode == 0
    assert open_run(run)["update"].sizes["step"] == 3


def test_results_of_the_first_edition_are_named(run):
    assert analyze(run, "--quiet", "--no-report").returncode == 0
    for path in (run / "dynamics" / "analysis").iterdir():
        path.rename(run / "dynamics" / path.name)  # as the first edition had them
    (run / "dynamics" / "analysis").rmdir()
    assert open_run(run)["update"].sizes["step"] == 3
    result = analyze(run, "--no-report")
    (line,) = [line for line in result.stderr.splitlines() + result.stdout.splitlines() if "OD602" in line][:1]
    assert "OD602" in line
    assert (run / "dynamics" / "summary.json").exists()
    assert "OD602" in [finding["code"] for finding in json.loads(open_run(run).attrs["findings"])]


def test_an_output_folder_that_is_a_link_nobody_named_is_refused(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run / "dynamics").symlink_to("../elsewhere")
    message = f"The output folder '{run / 'dynamics'}' is a link to '../elsewhere', which is not followed. "
    assert_refused(analyze(run), 2, message, "If results belong there, name that folder with --out.")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert analyze(run, "--quiet", "--no-report", "--out", run / "dynamics").returncode == 0
    assert (tmp_path / "elsewhere" / "analysis" / "summary.json").exists()


def test_a_run_that_is_a_link_is_analysed(run, tmp_path):
    (tmp_path / "latest").symlink_to(run)
    assert analyze(tmp_path / "latest", "--quiet", "--no-report").returncode == 0
    assert (run / "dynamics" / "analysis" / "summary.json").exists()


@pytest.mark.parametrize("given", ["", "x="])
def test_no_folder_is_not_this_folder(run, monkeypatch, given):
    monkeypatch.chdir(run)
    message = f"Expected [LABEL=]RUN with RUN a folder, got {given!r}. For this folder, pass a dot.\n"
    result = analyze(given)
    assert (result.returncode, result.stderr) == (2, message)
    assert not (run / "dynamics").exists()


def test_a_link_to_a_run_has_its_own_name(run, tmp_path):
    (tmp_path / "best").symlink_to(run)
    assert list(named_runs([("", tmp_path / "best"), ("", run)]).folders) == ["best", "run"]
