"""The command line as a user meets it: its output, its exit status, and processes that are killed or interrupted."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from dynamics import open_run, schema
from dynamics.analyze import _labels_and_folders, app
from dynamics.pipeline import analyze_run, named_runs, resolve_device
from dynamics.store import result_path
from tests.command import analyze, assert_refused
from tests.forks import finished
from tests.runs import NAMES, random_factors, write_run, write_state

ROOT = Path(__file__).parents[2]
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


def command(*arguments):
    """The command as a program begins it, for a process of its own."""
    return lambda: app([str(argument) for argument in arguments])


def python(script):
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@FORKS
def test_a_clean_run(run):
    """As a program of its own it runs in :func:`in_a_c_locale`."""
    result = finished(command(run))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.rstrip().endswith(str(run / "dynamics" / "analysis" / "report.html"))
    written = sorted(entry.name for entry in (run / "dynamics" / "analysis").iterdir())
    assert written == ["analysis.zarr", "figures", "rank_pattern.json", "report.html", "run.yaml", "summary.json"]
    tree = open_run(run)
    schema.check(tree)
    assert tree["update"]["step"].values.tolist() == [10, 20, 30]
    assert [file["path"] for file in json.loads(tree.attrs["inputs"])] == [
        f"checkpoint-{step}/adapter_model.safetensors" for step in (10, 20, 30)
    ]


@FORKS
def test_json_is_json_and_nothing_else(tmp_path):
    names = [f"model.layers.{layer}.{role}" for layer in range(30) for role in ("q_proj", "v_proj")]
    factors = random_factors(names)
    factors[names[0]] = (torch.zeros(12, 4), factors[names[0]][1])  # has NaN among its measures
    result = finished(command(write_run(tmp_path / "run", {1: factors}), "--json", "--no-report"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads(result.stdout, parse_constant=refuse)
    assert summary["matrices"] == 60
    written = (tmp_path / "run" / "dynamics" / "analysis" / "summary.json").read_text()
    assert json.loads(written, parse_constant=refuse) == summary


def test_only_the_matrices_asked_for(run):
    assert analyze(run, "--matrices", r"layers\.0\.", "--no-report", "--quiet").returncode == 0
    assert open_run(run)["update"]["matrix"].values.tolist() == [name for name in NAMES if "layers.0." in name]


def test_quiet_and_no_report(run, tmp_path):
    result = analyze(run, "--quiet", "--no-report", "--out", tmp_path / "elsewhere")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not (tmp_path / "elsewhere" / "analysis" / "report.html").exists()
    assert not (run / "dynamics").exists()


def test_several_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "other" / "run", seed=5)
    result = analyze(f"imax={run}", f"dmax={tmp_path / 'other' / 'run'}", "--no-report")
    assert result.returncode == 0, result.stderr
    tree = open_run(tmp_path / "dynamics-comparison")
    schema.check(tree)
    assert {name: child.attrs["label"] for name, child in tree["runs"].children.items()} == {
        "run": "imax",
        "run-2": "dmax",
    }


def test_one_of_several_runs_is_not_one(run, tmp_path):
    result = analyze(run, tmp_path / "nowhere", "--no-report", "--quiet", "--out", tmp_path / "out")
    assert_refused(result, 1, "nowhere")
    assert list(open_run(tmp_path / "out")["runs"].children) == ["run"]


def test_help_needs_no_torch():
    script = """
        import atexit, runpy, sys
        atexit.register(lambda: print({"torch", "numpy", "xarray"} & set(sys.modules)))
        sys.argv = ["analyze", "--help"]
        runpy.run_module("dynamics.analyze", run_name="__main__")
    """
    result = python(script)
    assert "[LABEL=]RUN" in result.stdout
    assert "\n  python -m dynamics.analyze runs/imax\n  python -m dynamics.analyze imax=runs/a " in result.stdout
    assert result.stdout.splitlines()[-1] == "set()"


def test_analysis_imports_only_what_it_needs(run):
    """First without a report, then with one, which leaves the settings of matplotlib as they are."""
    needless = {"transformers", "peft", "scipy.stats", "scipy.sparse", "matplotlib.pyplot", "seaborn"}
    script = f"""
        import sys
        from dynamics.analyze import _analyze
        print(_analyze([{str(run)!r}], {{"report": False}}, None, False, None, True))
        print({needless | {"matplotlib", "jinja2"}} & set(sys.modules))
        import matplotlib
        before = dict(dict.items(matplotlib.rcParams))  # reading the backend by its name would choose one
        print(_analyze([{str(run)!r}], {{"report": True}}, None, False, None, True))
        print({needless} & set(sys.modules))
        print(dict(dict.items(matplotlib.rcParams)) == before)
    """
    assert python(script).stdout.splitlines() == [*["0", "set()"] * 2, "True"]


def test_progress_goes_to_stderr(run):
    result = analyze(run, "--progress", "--json", "--no-report")
    json.loads(result.stdout)
    assert "run" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--no-such-option"], ["x", "--device", "tpu"], ["x", "--matrices", "("]])
def test_bad_usage(arguments, run):
    result = analyze(*[run if each == "x" else each for each in arguments])
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' /dev/full")
@pytest.mark.usefixtures("one_figure")
def test_a_full_disk_leaves_the_old_result(run, tmp_path):
    assert analyze(run, "--quiet", "--no-report").returncode == 0
    old = (run / "dynamics" / "analysis" / "summary.json").read_bytes()

    def limited():  # a file size limit fails writes as a full disk does: with an OSError from the system
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        command(run, "--matrices", "layers.0")()

    result = finished(limited)
    assert_refused(result, 2, "File too large while writing", str(run / "dynamics"), "an earlier result is as it was")
    assert (run / "dynamics" / "analysis" / "summary.json").read_bytes() == old
    assert len(open_run(run)["update"]["matrix"]) == len(NAMES)
    assert [entry.name for entry in (run / "dynamics").iterdir()] == ["analysis"]


@FORKS
def test_killed_at_any_moment_the_old_result_or_the_new_stands(tmp_path):
    """Each process is killed at a later call that moves a file."""
    run = write_run(tmp_path / "run", [1])
    assert analyze(run, "--quiet", "--no-report").returncode == 0
    found = []
    killed = True
    while killed:

        def analysed():
            calls = itertools.count()

            def count(event, _):
                if event in ("os.rename", "shutil.rmtree") and next(calls) == len(found):
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            command(run, "--quiet", "--no-report", "--matrices", "layers.0")()

        result = finished(analysed)
        killed = result.returncode == -signal.SIGKILL
        assert killed or (result.returncode, result.stderr) == (0, "")
        summary = json.loads((result_path(run).parent / "summary.json").read_text())
        found.append((summary["matrices"], open_run(run)["update"].sizes["matrix"]))
    assert len(found) > 2
    assert {count for both in found for count in both} == {2, 4}
    assert found[-1] == (2, 2)


@pytest.mark.parametrize("error", [OverflowError("too large"), RuntimeError("CUDA\nbroke"), MemoryError()])
def test_an_error_of_a_library_is_one_line(run, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("dynamics.pipeline.measure", fail)
    result = analyze(run)
    assert result.returncode == 2
    assert result.stderr == (" ".join(str(error).split()) or "MemoryError") + "\n"
    assert not (run / "dynamics").exists()


def test_a_device_beyond_the_last_one(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == "cuda:1"
    message = "The device 'cuda:2' does not exist; the last one is cuda:1. Use --device auto.\n"
    assert analyze(run, "--device", "cuda:2").stderr == message


@pytest.mark.parametrize("name", ["foo[", "foo[bar]", "[red]", "[", "a b"])
def test_names_that_look_like_markup(tmp_path, name):
    run = write_run(tmp_path / name, [1])
    out = tmp_path / "x[" / "bar]"  # x[/bar] is a closing tag
    result = analyze(run, "--no-report", "--out", out, "--progress")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, str(out / "analysis" / "summary.json"))


def in_a_c_locale(*arguments):
    program = [sys.executable, "-m", "dynamics.analyze", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    return subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def writing_ascii(*arguments):
    def work():
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
        command(*arguments)()

    return finished(work)


NAMES_OF_FOLDERS = (b"caf\xe9", "gr\u00fcn".encode(), b".hidden", b"x" * 255)


@FORKS
@pytest.mark.usefixtures("one_figure")  # in processes that fork
@pytest.mark.parametrize(
    ("names", "options", "process"),
    [(NAMES_OF_FOLDERS, ["--json", "--no-report"], in_a_c_locale), (NAMES_OF_FOLDERS[1:2], [], writing_ascii)],
)
def test_no_folder_name_loses_the_run(tmp_path, names, options, process):
    try:
        runs = [write_run(tmp_path / os.fsdecode(name), [1]) for name in names]
    except OSError:
        pytest.skip("this file system takes only names that are UTF-8")
    result = process(*runs, *options, "--out", tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.isascii()
    json.loads((tmp_path / "out" / "analysis" / "summary.json").read_bytes().decode("utf-8"))
    tree = open_run(tmp_path / "out")
    schema.check(tree)
    assert len(tree.children.get("runs", {"one": tree})) == len(names)


def test_metric_names_that_are_paths(tmp_path):
    run = write_run(tmp_path / "run", [1], states=False)
    names = ["..", ".", "", "log_step", ".zgroup", "nul\0", "x" * 300, "a/b", "a__b", "\ud800"]
    log = [{"step": 1, "epoch": 0.1, **dict.fromkeys(names, 1.0), **{f"eval_{name}": 2.0 for name in names}}]
    write_state(run / "checkpoint-1", 1, log)
    result = analyze(run, "--no-report")
    assert result.returncode == 0, result.stderr
    tree = open_run(run)
    assert (tree["training"].sizes["metric"], tree["score"].sizes["task"]) == (len(names), len(names))
    assert "\\ud800" in tree["training"]["metric"].values


def test_the_label_of_a_single_run(run):
    assert analyze(f"lab={run}", "--no-report", "--quiet").returncode == 0
    assert open_run(run).attrs["label"] == "lab"


def test_the_root_of_several_runs_says_where_it_comes_from(run, tmp_path):
    other = write_run(tmp_path / "other", [1])
    arguments = [run, other, tmp_path / "nowhere", "--no-report", "--quiet", "--out", tmp_path / "out"]
    assert analyze(*arguments).returncode == 1
    root = open_run(tmp_path / "out").attrs
    assert set(schema.ROOT_ATTRIBUTES) <= set(root)
    assert [(file["run"], file["step"]) for file in json.loads(root["inputs"])] == [
        *(("run", step) for step in (10, 20, 30)),
        ("other", 1),
    ]
    assert [finding["code"] for finding in json.loads(root["findings"])] == ["OD100"]
    configuration = json.loads(root["configuration"])
    assert configuration["device"] in ("cpu", "cuda")
    assert configuration["runs"] == [str(run), str(other), str(tmp_path / "nowhere")]
    assert yaml.safe_load((tmp_path / "out" / "analysis" / "run.yaml").read_text()) == configuration


@pytest.mark.parametrize("name", ["", ".", "..", ".zgroup", "a/b", "x" * 201])
def test_names_of_runs_are_plain(run, tmp_path, name):
    with pytest.raises(ValueError, match="Expected the name of a run to be a plain name of at most 200 bytes, got"):
        analyze_run({name: run}, out=tmp_path / "out")


@FORKS
def test_interrupted_while_computing(run, monkeypatch):
    monkeypatch.setattr("dynamics.pipeline.measure", lambda *_: os.kill(os.getpid(), signal.SIGINT))

    def interrupted():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
        command(run)()

    result = finished(interrupted)
    assert (result.returncode, result.stderr) == (130, "Interrupted; an earlier result is as it was.\n")
    assert not (run / "dynamics").exists()


@pytest.mark.parametrize(
    ("given", "names", "labels"),
    [
        (["runs/a"], {"a": "runs/a"}, {}),
        (["x=runs/a", "y=other/a"], {"a": "runs/a", "a-2": "other/a"}, {"a": "x", "a-2": "y"}),
        (["x=runs/a=b"], {"a=b": "runs/a=b"}, {"a=b": "x"}),
    ],
)
def test_labels_and_names(given, names, labels):
    runs = named_runs(_labels_and_folders(given))
    assert ({name: str(folder) for name, folder in runs.folders.items()}, runs.labels) == (names, labels)
