"""The command line as a user meets it: its output, its exit status, and processes that are killed or interrupted."""

import itertools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dynamics import open_run, plot, schema
from dynamics.analyze import _labels_and_folders, app
from dynamics.pipeline import analyze_run, named_runs, resolve_device
from dynamics.store import result_path
from tests.command import analyze
from tests.forks import finished
from tests.runs import NAMES, adapter_config, random_factors, write_adapter, write_run, write_state

ROOT = Path(__file__).parents[2]
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n"


def command(*arguments):
    """The command as a program begins it, for a process of its own."""
    return lambda: app([str(argument) for argument in arguments])


def python(script):
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def assert_refused(result, status, *words):
    """A line on stderr has the words; there is no traceback."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert any(all(word in line for word in words) for line in result.stderr.splitlines()), result.stderr


def test_a_clean_run(run):
    program = [sys.executable, "-m", "dynamics.analyze", str(run)]
    result = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
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
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("report", "needless"),
    [
        (False, {"transformers", "peft", "scipy.stats", "scipy.sparse", "zarr", "matplotlib", "seaborn", "jinja2"}),
        (True, {"transformers", "peft", "scipy.stats", "scipy.sparse", "zarr", "matplotlib.pyplot", "seaborn"}),
    ],
)
def test_analysis_imports_only_what_it_needs(run, report, needless):
    script = f"""
        import sys
        from dynamics.analyze import _analyze
        print(_analyze([{str(run)!r}], {{"report": {report}}}, None, False, None, True))
        print({needless!r} & set(sys.modules))
    """
    assert python(script).stdout.splitlines() == ["0", "set()"]


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


def test_no_such_folder(tmp_path):
    assert_refused(analyze(tmp_path / "nowhere"), 2, "nowhere")


def test_an_empty_folder(tmp_path):
    assert_refused(analyze(tmp_path), 2, "is empty", "Pass a Trainer output folder, or one checkpoint.")


def test_a_folder_without_checkpoints(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert_refused(analyze(tmp_path), 2, "No checkpoints in", "Pass a Trainer output folder, or one checkpoint.")


def test_no_matrix_has_the_name(run):
    assert_refused(analyze(run, "--matrices", "k_proj"), 2, "k_proj")


def damage_truncated(checkpoint):
    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])


def damage_empty(checkpoint):
    (checkpoint / "adapter_model.safetensors").write_bytes(b"")


def damage_lfs(checkpoint):
    (checkpoint / "adapter_model.safetensors").write_text(LFS)


def damage_header(checkpoint):
    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:])


def damage_config(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{not json")


def damage_no_config(checkpoint):
    (checkpoint / "adapter_config.json").unlink()


def damage_no_weights(checkpoint):
    (checkpoint / "adapter_model.safetensors").unlink()


def damage_kind(checkpoint):
    (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))


def damage_unknown_kind(checkpoint):
    (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "SOMETHING_NEW"}))


def damage_rank(checkpoint):
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter_config(rank=3)))


def damage_dora(checkpoint):
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter_config(use_dora=True)))


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_one_damaged_checkpoint_is_named_and_the_rest_is_saved(run, damage):
    damage(run / "checkpoint-20")
    result = analyze(run, "--quiet", "--no-report")
    assert_refused(result, 1, "checkpoint-20")
    tree = open_run(run)
    schema.check(tree)
    assert {10, 30} <= set(tree["update"]["step"].values.tolist())
    assert np.isfinite(tree["update"]["frobenius_norm"].sel(step=[10, 30], kind="total")).all()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_a_damaged_adapter_alone(tmp_path, damage):
    damage(write_adapter(tmp_path / "adapter"))
    result = analyze(tmp_path / "adapter")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert all(len(line) < 600 for line in result.stderr.splitlines())
    assert not (tmp_path / "adapter" / "dynamics").exists()


def test_a_number_that_is_not_finite_is_exit_status_1(tmp_path):
    factors = random_factors()
    factors[NAMES[0]][0][0, 0] = torch.nan
    result = analyze(write_run(tmp_path / "run", {1: factors}), "--quiet")
    assert_refused(result, 1, NAMES[0], "checkpoint-1/adapter_model.safetensors")


def test_zero_updates_are_no_failure(tmp_path):
    factors = {name: (torch.zeros_like(left), right) for name, (left, right) in random_factors().items()}
    result = analyze(write_run(tmp_path / "run", {0: factors}))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "dynamics" / "analysis" / "report.html").exists()


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_execute_code_is_not_executed(tmp_path):
    run, mark = write_run(tmp_path / "run", [1]), tmp_path / "executed"
    checkpoint = run / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter_config()))
    torch.save({"x": Payload(mark)}, checkpoint / "adapter_model.bin")
    (checkpoint / "trainer_state.json").write_text("{}")
    assert_refused(analyze(run, "--quiet", "--no-report"), 1, "checkpoint-2/adapter_model.bin")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))  # the payload works
    assert mark.exists()


def test_text_from_files_is_escaped_in_the_page(tmp_path):
    name = "model.layers.0.<script>alert(1)</script>"
    run = write_run(tmp_path / "run", {1: random_factors([name])}, config=adapter_config(target_modules=["<script>"]))
    assert analyze(run).returncode == 0
    page = (run / "dynamics" / "analysis" / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_an_output_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    message = f"The output folder '{out}' cannot be written (Not a directory). Choose another with --out.\n"
    assert analyze(run, "--out", out).stderr == message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' /dev/full")
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
def test_killed_at_any_moment_the_old_result_or_the_new_stands(run):
    """Each process is killed at a later call that moves a file."""
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


def test_states_alone_are_not_a_run(tmp_path):
    write_state(tmp_path / "checkpoint-5", 5)
    assert_refused(analyze(tmp_path), 2, "checkpoint-5")


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


@pytest.fixture
def one_figure(monkeypatch):
    """Of the figures only one is written, where what matters is the place of the files."""
    all_of = plot.drawings

    def spectra(tree):
        return {name: draw for name, draw in all_of(tree).items() if name.endswith("spectra")}

    monkeypatch.setattr(plot, "drawings", spectra)


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


NAMES_OF_FOLDERS = (b"caf\xe9", "gr\u00fcn".encode(), b".hidden", b"x" * 255)


@pytest.mark.parametrize(
    ("names", "options"), [(NAMES_OF_FOLDERS, ["--json", "--no-report"]), (NAMES_OF_FOLDERS[1:2], [])]
)
def test_no_folder_name_loses_the_run(tmp_path, names, options):
    try:
        runs = [write_run(tmp_path / os.fsdecode(name), [1]) for name in names]
    except OSError:
        pytest.skip("this file system takes only names that are UTF-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, "-m", "dynamics.analyze", *runs, *options, "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    result.stdout.decode("ascii")
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


def damaged_run(folder):
    """An error, and a warning about another checkpoint."""
    run = write_run(folder)
    damage_truncated(run / "checkpoint-20")
    (run / "checkpoint-30" / "trainer_state.json").write_text("{")
    return run


@pytest.mark.parametrize(
    ("how", "told"), [([], ["error", "warning"]), (["--json"], ["error", "warning"]), (["--quiet"], ["error"])]
)
def test_errors_and_warnings_are_lines_on_stderr(tmp_path, how, told):
    run = damaged_run(tmp_path / "run")
    lines = analyze(run, "--no-report", *how).stderr.splitlines()
    assert [line.split(" ")[1] for line in lines] == told
    assert lines[0].startswith("OD101 error checkpoint-20/adapter_model.safetensors: ")
    remedies = {finding["code"]: finding["remedy"] for finding in json.loads(open_run(run).attrs["findings"])}
    assert all(line.endswith(remedies[line[:5]]) for line in lines)


def test_of_several_runs_each_line_names_its_run(tmp_path):
    run, other = damaged_run(tmp_path / "run"), write_run(tmp_path / "other", [1])
    lines = analyze(run, other, "--no-report", "--quiet", "--out", tmp_path / "out").stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["OD101 error run, checkpoint-20/adapter_model.safetensors"]


def test_several_runs_go_to_a_folder_of_their_own(run, tmp_path, monkeypatch):
    (tmp_path / "clone" / "dynamics").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone")
    assert analyze(run, write_run(tmp_path / "other", [1]), "--no-report", "--quiet").returncode == 0
    assert names_of(tmp_path / "clone" / "dynamics") == []
    assert list(open_run("dynamics-comparison")["runs"].children) == ["other", "run"]


def test_the_label_of_a_single_run(run):
    assert analyze(f"lab={run}", "--no-report", "--quiet").returncode == 0
    assert open_run(run).attrs["label"] == "lab"


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
