import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from dynamics.store import OutputError, staged, write_text, writing
from dynamics.store.replace import _machine, complete, read_written, replace_result

GONE = f"{socket.gethostname()}-{_machine()}-{2**22 + 1}-00000000"  # above Linux's largest process id
ELSEWHERE = f"{socket.gethostname()}-000000000000-1-00000000"  # of the same name


def fill(folder, text):
    (folder / "summary.json").write_text(text)
    (folder / "analysis.zarr").mkdir()
    (folder / "analysis.zarr" / "chunk").write_text(text)
    write_text(folder / "figures" / "a.svg", text)


def contents(out):
    return [(out / name).read_text() for name in ("summary.json", "analysis.zarr/chunk", "figures/a.svg")]


def visible(out):
    return sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))


def hidden(out):
    return sorted(entry.name for entry in (out / ".staging").iterdir())


@pytest.fixture
def old(tmp_path):
    """An output folder with a result."""
    with staged(tmp_path / "out") as partial:
        fill(partial, "old")
    return tmp_path / "out"


def replace(out, text="new"):
    with staged(out) as partial:
        fill(partial, text)


def test_entries_appear_together_and_nothing_else(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as partial:
        fill(partial, "new")
        assert visible(out) == []
    assert contents(out) == ["new"] * 3
    assert visible(out) == ["analysis.zarr", "figures", "summary.json"]
    assert hidden(out) == ["lock", "written.json"]


def test_a_second_result_replaces_the_first_and_spares_what_is_not_its_own(old):
    (old / "capture.zarr").mkdir()
    (old / "notes.txt").write_text("mine")
    (old / "figures" / "mine.svg").write_text("mine")
    replace(old)
    assert contents(old) == ["new"] * 3
    assert visible(old) == ["analysis.zarr", "capture.zarr", "figures", "notes.txt", "summary.json"]
    assert (old / "figures" / "mine.svg").read_text() == "mine"


def test_what_an_earlier_result_has_beyond_the_new_one_is_removed(old):
    (old / "kept.json").write_text("mine")
    with staged(old) as partial:
        (partial / "run.yaml").write_text("new")
    assert visible(old) == ["kept.json", "run.yaml"]


def stand(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if kind == "folder" else path.write_text("mine")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("summary.json", "file"),
        ("summary.json", "folder"),
        ("analysis.zarr", "folder"),
        ("analysis.zarr", "file"),
        ("figures", "file"),
        ("figures/a.svg", "folder"),
        ("figures/a.svg", "file"),
    ],
)
def test_what_no_analysis_wrote_is_refused_and_stays(tmp_path, name, kind):
    stand(tmp_path / name, kind)
    message = (
        f"'{tmp_path / name}' stands where a result must go, and no analysis wrote it. "
        "Move it away, or choose another folder with --out."
    )
    with pytest.raises(OutputError) as error:
        replace(tmp_path)
    assert str(error.value) == message
    assert [path for path in tmp_path.rglob("*") if path.name != "lock" and ".staging" not in path.name] == [
        *([tmp_path / "figures"] if "/" in name else []),
        tmp_path / name,
    ]


@pytest.mark.parametrize(("name", "folders"), [("summary.json", ()), ("figures", ("figures",))])
def test_it_is_refused_before_anything_is_computed(tmp_path, name, folders):
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=name), staged(tmp_path, ["summary.json"], folders):
        pytest.fail("the block was entered")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [name]


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="figures"):
        replace(tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_copied_result_whose_list_was_lost_is_still_known(old):
    (old / "analysis.zarr" / ".zattrs").write_text('{"findings": "[]"}')
    (old / ".staging" / "written.json").unlink()
    replace(old)
    assert (old / "summary.json").read_text() == "new"


def test_a_list_that_points_outside_removes_nothing_there(old):
    (old.parent / "mine.txt").write_text("mine")
    names = ["../mine.txt", str(old.parent / "mine.txt"), "summary.json", 3]
    (old / ".staging" / "written.json").write_text(json.dumps({"commit": "x", "names": names}))
    with staged(old):
        pass
    assert (old.parent / "mine.txt").exists()
    assert not (old / "summary.json").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_result(old, error):
    def interrupted():
        with staged(old) as partial:
            fill(partial, "new")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert contents(old) == ["old"] * 3
    assert hidden(old) == ["lock", "written.json"]


def test_nothing_is_left_where_nothing_was(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "deep" / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", range(4))
def test_a_replacement_that_fails_midway_is_undone(old, monkeypatch, failing):
    """There are three things to put in place, and a list."""
    move, calls = os.replace, []

    def fails_once(source, target):
        calls.append(source)
        if len(calls) == failing + 1:
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    message = (
        f"No space left on device while writing '{old}'; an earlier result is as it was. "
        "Make room, or choose another folder with --out."
    )

    def replace_and_add():
        with staged(old) as partial:
            fill(partial, "new")
            (partial / "summary.json").rename(partial / "run.yaml")

    with pytest.raises(OutputError) as error:
        replace_and_add()
    assert str(error.value) == message
    assert contents(old) == ["old"] * 3
    assert visible(old) == ["analysis.zarr", "figures", "summary.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_replacement_waits_for_its_end(old, number):
    script = f"""
        import os, pathlib, signal
        from dynamics.store import staged
from dynamics.store import replace as staging
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
        replace, out = os.replace, pathlib.Path({str(old)!r})
        def replace_and_signal(source, target):
            os.kill(os.getpid(), {int(number)})
            replace(source, target)
        os.replace = replace_and_signal
        try:
            with staged(out) as partial:
                (partial / "summary.json").write_text("new")
                (partial / "run.yaml").write_text("new")
        except KeyboardInterrupt as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    expected = (0, "the new result is complete and in its place\n") if number == signal.SIGINT else (-number, "")
    assert (result.returncode, result.stdout) == expected
    assert visible(old) == ["run.yaml", "summary.json"]
    assert (old / "summary.json").read_text() == "new"


def killed(old, when):
    """A process that is killed while it writes a second result."""
    script = f"""
        import os, pathlib, signal
        from dynamics.store import staged
        calls, replace = [], os.replace
        def replace_or_die(source, target):
            if len(calls) == {when}:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(source)
            replace(source, target)
        os.replace = replace_or_die
        with staged(pathlib.Path({str(old)!r})) as partial:
            (partial / "run.yaml").write_text("new")
            (partial / "analysis.zarr").mkdir()
            (partial / "analysis.zarr" / "chunk").write_text("new")
            (partial / "summary.json").write_text("new")
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("when", range(4))
def test_a_killed_process_is_undone_by_the_next(old, when):
    killed(old, when)
    assert (complete(old / "analysis.zarr") / "chunk").read_text() in ("old", "new")
    assert (old / "summary.json").read_text() in ("old", "new")
    with pytest.raises(KeyboardInterrupt), staged(old):
        raise KeyboardInterrupt
    assert contents(old) == ["old"] * 3
    assert visible(old) == ["analysis.zarr", "figures", "summary.json"]
    assert hidden(old) == ["lock", "written.json"]


def test_a_process_killed_when_its_result_counts_is_not_undone(old):
    leftover = old / ".staging" / f"old-{GONE}"
    write_text(leftover / "was" / "summary.json", "older")
    content = json.loads((old / ".staging" / "written.json").read_text())
    (old / ".staging" / "written.json").write_text(json.dumps({**content, "commit": GONE}))
    replace(old)
    assert contents(old) == ["new"] * 3
    assert not leftover.exists()


def test_remains_of_this_process_number_are_swept_too(old):
    """In containers each process has the number 1."""
    remains = old / ".staging" / f"partial-{socket.gethostname()}-{_machine()}-{os.getpid()}-00000000"
    remains.mkdir()
    replace(old)
    assert not remains.exists()


@pytest.mark.parametrize("owner", [ELSEWHERE, f"{socket.gethostname()}-{_machine()}-{os.getppid()}-00000000"])
def test_what_may_be_at_work_is_left_alone(old, owner):
    other = old / ".staging" / f"partial-{owner}"
    other.mkdir()
    replace(old)
    assert other.exists()


def test_two_at_once_do_not_disturb_each_other(tmp_path):
    out, both, failed = tmp_path / "out", threading.Barrier(2), []

    def work(text):
        try:
            for _ in range(20):
                with staged(out) as partial:
                    both.wait()
                    fill(partial, text)
        except BaseException as error:
            failed.append(error)
            both.abort()

    threads = [threading.Thread(target=work, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert contents(out) in (["one"] * 3, ["two"] * 3)
    assert hidden(out) == ["lock", "written.json"]


def test_the_list_says_what_was_written(old):
    assert read_written(old).names == {"figures/a.svg", "analysis.zarr", "summary.json"}


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


def test_nothing_is_moved_if_the_plan_cannot_be_written(old, monkeypatch):
    (old.parent / "partial").mkdir()
    (old.parent / "partial" / "summary.json").write_text("new")
    monkeypatch.setattr(json, "dumps", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        replace_result(old, old.parent / "partial", GONE)
    assert contents(old) == ["old"] * 3
