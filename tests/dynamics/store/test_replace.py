"""A result takes the place of the one before whole, or not at all, whatever ends the process."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from dynamics.store import OutputError, result_path, staged, write_text, writing
from dynamics.store.replace import is_result, notes_before
from tests.forks import finished

#: How often a process is killed at each place.
ROUNDS = int(os.environ.get("DYNAMICS_KILL_ROUNDS", "20"))
ROOT = Path(__file__).parents[3]


def fill(stage, text):
    (stage / "analysis.zarr" / "update").mkdir(parents=True)
    (stage / "analysis.zarr" / ".zattrs").write_text('{"findings": "[]"}')
    (stage / "analysis.zarr" / "update" / "0.0").write_text(text)
    (stage / "summary.json").write_text(text)
    write_text(stage / "figures" / "a.svg", text)


def contents(folder):
    return [(folder / name).read_text() for name in ("summary.json", "analysis.zarr/update/0.0", "figures/a.svg")]


def names(out):
    return sorted(entry.name for entry in out.iterdir())


def replace(out, text="new"):
    with staged(out) as stage:
        fill(stage, text)


@pytest.fixture
def old(tmp_path):
    """An output folder with a result."""
    replace(tmp_path / "out", "old")
    return tmp_path / "out"


def test_a_result_is_one_folder_and_nothing_beside_it(old):
    assert names(old) == ["analysis"]
    assert contents(old / "analysis") == ["old"] * 3


def test_a_result_is_replaced_whole(old):
    (old / "notes.txt").write_text("mine")
    with staged(old) as stage:
        assert contents(old / "analysis") == ["old"] * 3
        (stage / "analysis.zarr").mkdir()
        (stage / "analysis.zarr" / ".zattrs").write_text('{"findings": "[]"}')
    assert names(old) == ["analysis", "notes.txt"]
    assert names(old / "analysis") == ["analysis.zarr"]  # what the new one does not have is gone


def test_an_exception_leaves_the_result_before(old):
    for problem in (ValueError, KeyboardInterrupt):
        with pytest.raises(problem), staged(old) as stage:  # noqa: PT012
            fill(stage, "new")
            raise problem
        assert names(old) == ["analysis"]
        assert contents(old / "analysis") == ["old"] * 3


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    with pytest.raises(ValueError, match="no"), staged(tmp_path / "a" / "b"):
        raise ValueError("no")
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", range(3))
def test_a_rename_that_fails_leaves_one_result_whole(old, monkeypatch, call):
    """Of the result before, of the new one, and of what is to be removed: by then, the new one counts."""
    rename, calls = os.rename, []

    def fail(source, target):
        calls.append(source)
        if len(calls) == call + 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        message = r"Stale file handle while writing .* run again when it is back"
        with pytest.raises(OutputError, match=message) if call < 2 else nullcontext():
            replace(old)
    assert contents(old / "analysis") == (["old"] if call < 2 else ["new"]) * 3
    replace(old, "newer")
    assert contents(old / "analysis") == ["newer"] * 3
    assert names(old) == ["analysis"]


# What may be in the folder already


@pytest.mark.parametrize(
    "name", ["notes.txt", "figures/photo.png", "analysis.zarr/update/notes.txt", "figures/b.svg/c"]
)
def test_a_result_with_a_file_of_the_user_is_kept_and_named(old, name):
    write_text(old / "analysis" / name, "mine")
    (finding,) = notes_before(old)
    assert finding.code == "OD603"
    assert finding.file.startswith("analysis.previous/")
    replace(old)
    assert contents(old / "analysis") == ["new"] * 3
    assert contents(old / "analysis.previous") == ["old"] * 3
    assert (old / "analysis.previous" / name).read_text() == "mine"
    with pytest.raises(OutputError, match=r"is not a result file of this user, and 'analysis\.previous' is needed"):
        replace(old, "newer")
    assert contents(old / "analysis") == ["new"] * 3


def test_a_result_with_a_link_is_kept(old, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.0").write_text("precious")
    (old / "analysis" / "analysis.zarr" / "linked").symlink_to(tmp_path / "elsewhere")
    replace(old)
    assert (old / "analysis.previous" / "analysis.zarr" / "linked" / "0.0").read_text() == "precious"


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("mine"),
        lambda path: path.mkdir(),
        lambda path: write_text(path / "notes.txt", "mine"),
        lambda path: write_text(path / "summary.json", "mine"),
        lambda path: write_text(path / "analysis.zarr" / ".zattrs", '{"kind": "mine"}'),
        lambda path: path.symlink_to("elsewhere"),
    ],
)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_no_analysis_wrote_is_refused(tmp_path, make, when):
    out = tmp_path / "out"
    write_text(out / "elsewhere" / "analysis.zarr" / ".zattrs", '{"findings": "[]"}')
    if when == "before":
        make(out / "analysis")
    before = sorted(out.rglob("*"))
    message = "stands where the result must go, and (is a link, which is not followed|was not written by an analysis)"
    with pytest.raises(OutputError, match=message), staged(out) as stage:  # noqa: PT012
        assert when == "meanwhile", "the block was entered"
        fill(stage, "new")
        make(out / "analysis")
        before = sorted(path for path in out.rglob("*") if stage not in (path, *path.parents))
    assert sorted(out.rglob("*")) == before


def test_results_of_the_first_edition_are_named_and_left_alone(first_edition, tmp_path):
    out = tmp_path / "out"
    for name in ("summary.json", "run.yaml", "rank_pattern.json"):
        write_text(out / name, "old")
    write_text(out / "notes.txt", "mine")
    write_text(out / "analysis.zarr" / ".zattrs", '{"findings": "[]"}')
    (finding,) = notes_before(out)
    assert (finding.code, finding.evidence) == (
        "OD602",
        {"names": ["analysis.zarr", "rank_pattern.json", "run.yaml", "summary.json"]},
    )
    assert result_path(out) == out / "analysis.zarr"
    replace(out)
    assert result_path(out) == out / "analysis" / "analysis.zarr"
    assert (out / "summary.json").read_text() == "old"
    assert [finding.code for finding in notes_before(first_edition / "dynamics")] == ["OD602"]


def test_names_of_results():
    ours = ["run.yaml", "summary.json", "report.html", "findings.sarif", "rank_pattern.json", "rank_pattern.a b.json"]
    ours += ["rank_pattern_by_effect.json", "rank_pattern_by_effect.a b.json"]
    ours += ["checkpoint_choice.json", "checkpoint_choice.a b.json"]
    store = [f"analysis.zarr/{name}" for name in (".zgroup", ".zmetadata", "runs/a b/update/count/0.0.12", "x/.zarray")]
    assert all(is_result(name) for name in [*ours, *store, "figures/a.svg", "figures/run 1/a.svg"])
    others = ["records/run.json", "figures", "figures/.svg", "figures/a/b/c.svg", "figures/..svg/a.svg"]
    others += [
        "rank_pattern..json",
        "rank_pattern_by_hand.json",
        "analysis.zarr",
        "analysis.zarr/notes.txt",
        "analysis.zarr/../0",
        "analysis.zarr/.x/0",
    ]
    assert not any(is_result(name) for name in [*others, "/summary.json", "./summary.json", "summary.json/", "a\0.svg"])


# Killed

# One process that has imported everything, and a child for each round: it replaces the result, and is killed at a call
# that moves or removes a folder, or in the middle of removing one.
SCRIPT = """
    import json, os, pathlib, signal, sys
    from dynamics.store import replace, result_path, staged
    from tests.dynamics.store.test_replace import contents, fill, names

    def mortal(call, calls, when, half):
        def wrapped(*arguments, **how):
            calls.append(call)
            if len(calls) == when:
                if half:
                    (pathlib.Path(arguments[0]) / "summary.json").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **how)
        return wrapped

    def replace_and_die(out, when, half):
        calls = []
        os.rename = mortal(os.rename, calls, when, half)
        replace.shutil.rmtree = mortal(replace.shutil.rmtree, calls, when, half)
        with staged(out) as stage:
            fill(stage, "new")
            if when == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    folder, rounds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    for when, half in [(0, False), (1, False), (2, False), (3, False), (4, False), (4, True)]:
        for number in range(rounds):
            out = folder / f"{when}-{half}-{number}"
            with staged(out) as stage:
                fill(stage, "old")
            child = os.fork()
            if child == 0:
                try:
                    replace_and_die(out, when, half)
                finally:
                    os._exit(1)
            killed = os.waitpid(child, 0)[1] == signal.SIGKILL
            opened = contents(result_path(out).parent)
            try:
                with staged(out):
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                repaired = contents(out / "analysis"), names(out)
            with staged(out) as stage:
                fill(stage, "newest")
            print(json.dumps([when, killed, opened, *repaired, contents(out / "analysis"), names(out)]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_process_that_is_killed_leaves_one_result_whole(tmp_path):
    """While making it; before the old one moves, the new one moves, the old one is hidden, and while it is removed."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), str(ROUNDS)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == 6 * ROUNDS
    for when, killed, opened, repaired, left, final, rest in rounds:
        assert killed
        assert opened == repaired == ["old" if when < 3 else "new"] * 3
        assert left == rest == ["analysis"]
        assert final == ["newest"] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_signal_while_the_result_takes_its_place_is_put_off(old, number):
    rename = os.rename

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        rename(*arguments)

    def replace_it():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            with staged(old) as stage:
                fill(stage, "new")
                os.rename = interrupted
        except KeyboardInterrupt as error:
            print(error)

    result = finished(replace_it)
    expected = (0, "the new result is complete and in its place\n") if number == signal.SIGINT else (-number, "")
    assert (result.returncode, result.stdout) == expected
    assert contents(old / "analysis") == ["new"] * 3
    assert names(old) == ["analysis"]


def test_two_at_once_do_not_disturb_each_other(tmp_path):
    out, both, failed = tmp_path / "out", threading.Barrier(2), []

    def work(text):
        try:
            for _ in range(20):
                with staged(out) as stage:
                    both.wait()
                    fill(stage, text)
        except BaseException as error:
            failed.append(error)
            both.abort()

    threads = [threading.Thread(target=work, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert contents(out / "analysis") in (["one"] * 3, ["two"] * 3)
    assert names(out) == ["analysis"]


def test_a_result_in_the_making_is_not_swept_by_another(old):
    with staged(old) as stage:
        replace(old, "other")
        fill(stage, "new")
    assert contents(old / "analysis") == ["new"] * 3


def test_where_there_are_no_locks_results_are_replaced_too(old, monkeypatch):
    from dynamics.store import replace as module

    monkeypatch.setattr(module, "lock", lambda descriptor, *, wait: None)
    (old / ".analysis-0123").mkdir()  # it may be another's
    replace(old)
    assert contents(old / "analysis") == ["new"] * 3
    assert names(old) == [".analysis-0123", "analysis"]


# Errors of the system


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    message = f"The output folder '{tmp_path / 'file' / 'out'}' cannot be written (Not a directory). Choose another"
    with pytest.raises(OutputError) as error, staged(tmp_path / "file" / "out"):
        pytest.fail("the block was entered")
    assert str(error.value) == f"{message} with --out."


def test_errors_of_the_system_say_where_and_what_to_do():
    message = "No space left on device while writing 'o{}'; an earlier result is as it was."
    with pytest.raises(OutputError, match=f"^{re.escape(message)}"), writing(Path("o{}")):
        raise OSError(28, "No space left on device", "chunk")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Make room, or choose another folder with --out."),
        (errno.EROFS, "Make it writable, or choose another folder with --out."),
        (errno.ESTALE, "Its file system went away: run again when it is back, or choose another folder with --out."),
        (errno.ENOTDIR, "Check the folder, or choose another with --out."),
    ],
)
def test_the_remedy_is_that_of_the_error(number, remedy):
    with pytest.raises(OutputError) as error, writing(Path("o")):
        raise OSError(number, "")
    assert str(error.value) == f"{os.strerror(number)} while writing 'o'; an earlier result is as it was. {remedy}"


def test_half_a_surrogate_pair_does_not_lose_a_file(tmp_path):
    write_text(tmp_path / "x.txt", "caf\udce9")
    assert (tmp_path / "x.txt").read_text() == "caf\\udce9"


def test_a_store_that_names_findings_in_no_object_is_not_ours(tmp_path):
    write_text(tmp_path / "analysis" / "analysis.zarr" / ".zattrs", json.dumps(3))
    with pytest.raises(OutputError, match="was not written by an analysis"):
        replace(tmp_path)
