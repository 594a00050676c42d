import os
import signal
import subprocess
import sys
import textwrap

import pytest

from dynamics.store.staging import complete, staged, write_text


def fill(folder, text):
    (folder / "table.json").write_text(text)
    (folder / "store.zarr").mkdir()
    (folder / "store.zarr" / "chunk").write_text(text)


def contents(out):
    return (out / "table.json").read_text(), (out / "store.zarr" / "chunk").read_text()


def test_entries_appear_together_and_nothing_else(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as partial:
        fill(partial, "new")
        assert not (out / "table.json").exists()
    assert contents(out) == ("new", "new")
    assert sorted(entry.name for entry in out.iterdir()) == ["store.zarr", "table.json"]


def test_a_second_result_replaces_the_first_and_spares_what_is_not_its_own(tmp_path):
    (tmp_path / "capture.zarr").mkdir()
    for text in ("old", "new"):
        with staged(tmp_path) as partial:
            fill(partial, text)
    assert contents(tmp_path) == ("new", "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["capture.zarr", "store.zarr", "table.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_result(tmp_path, error):
    with staged(tmp_path) as partial:
        fill(partial, "old")

    def interrupted():
        with staged(tmp_path) as partial:
            fill(partial, "new")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert contents(tmp_path) == ("old", "old")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["store.zarr", "table.json"]


def test_a_killed_process_leaves_the_old_result_and_its_remains_are_swept(tmp_path):
    with staged(tmp_path) as partial:
        fill(partial, "old")
    script = f"""
        import os, pathlib, signal
        from dynamics.store.staging import staged
        with staged(pathlib.Path({str(tmp_path)!r})) as partial:
            (partial / "table.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode == -signal.SIGKILL
    assert contents(tmp_path) == ("old", "old")
    with staged(tmp_path) as partial:
        fill(partial, "new")
    assert contents(tmp_path) == ("new", "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["store.zarr", "table.json"]


def test_a_process_killed_between_two_names_is_undone(tmp_path):
    with staged(tmp_path) as partial:
        fill(partial, "old")
    moved = tmp_path / f".old-{2**22 + 1}-store.zarr"  # above Linux's largest process id
    (tmp_path / "store.zarr").rename(moved)
    assert complete(tmp_path / "store.zarr") == moved
    with staged(tmp_path):
        pass
    assert contents(tmp_path) == ("old", "old")


def test_what_a_running_process_stages_is_left_alone(tmp_path):
    other = tmp_path / f".partial-{os.getppid()}"
    other.mkdir()
    with staged(tmp_path):
        pass
    assert other.exists()


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "run.yaml"
    write_text(path, "first")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "second")
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["run.yaml"]
