"""Output folders that came from somebody else: whatever links and names are in them, nothing outside is touched."""

import os

import pytest

from dynamics.store import OutputError, result_path, staged


def files(folder):
    """Every path below a folder, with what is in it; links are not followed."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def victim(tmp_path):
    """A folder beside the run, with what a result has, too."""
    folder = tmp_path / "victim"
    for name in ("secret.txt", "summary.json", "deep/report.html", "figures/a.svg", "analysis.zarr/update/0.0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    (folder / "analysis.zarr" / ".zattrs").write_text('{"findings": "[]"}')
    return folder


@pytest.fixture
def out(tmp_path, victim):
    """The output folder of a run made by somebody else."""
    (tmp_path / "run" / "dynamics").mkdir(parents=True)
    return tmp_path / "run" / "dynamics"


def fill(folder):
    (folder / "analysis.zarr").mkdir(parents=True)
    (folder / "analysis.zarr" / ".zattrs").write_text('{"findings": "[]"}')
    (folder / "summary.json").write_text("new")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.svg").write_text("new")


def analyse(out):
    """Write a result, whatever came before; tell whether it was refused."""
    try:
        with staged(out) as stage:
            fill(stage)
    except OutputError:
        return True
    return False


def link(path, target, kind="relative"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target if kind == "absolute" else os.path.relpath(target, path.parent))


LINKS = pytest.mark.parametrize("kind", ["relative", "absolute"])
FOLDERS = pytest.mark.parametrize("name", ["analysis", "analysis.previous", ".analysis-0123456789abcdef"])


@LINKS
@FOLDERS
def test_nothing_behind_a_folder_that_is_a_link_is_touched(out, victim, name, kind):
    before = files(victim)
    link(out / name, victim, kind)
    assert analyse(out) == (name == "analysis")
    analyse(out)
    assert files(victim) == before
    assert (out / name).is_symlink()


@LINKS
@FOLDERS
@pytest.mark.parametrize(
    "inner", ["figures", "figures/x", "figures/a.svg", "summary.json", "analysis.zarr/update", "x"]
)
def test_nothing_behind_a_link_in_a_folder_of_results_is_touched(out, victim, name, inner, kind):
    """A result with such a link is not removed, so that nobody need follow it."""
    before = files(victim)
    fill(out / name)
    path = out / name / inner
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    path.unlink(missing_ok=True)
    link(path, victim / inner if (victim / inner).exists() else victim, kind)
    for _ in range(2):  # what was moved once is refused then
        analyse(out)
        assert files(victim) == before
    kept = [folder for folder in out.iterdir() if (folder / inner).is_symlink()]
    assert len(kept) == 1


@LINKS
@FOLDERS
def test_a_store_that_is_a_link_is_no_result(out, victim, name, kind):
    before = files(victim)
    (out / name).mkdir()
    link(out / name / "analysis.zarr", victim / "analysis.zarr", kind)
    assert result_path(out) is None
    analyse(out)
    analyse(out)
    assert files(victim) == before
    assert (out / name / "analysis.zarr").is_symlink()


@FOLDERS
@pytest.mark.parametrize("inner", ["notes.txt", "figures/photo.png", "analysis.zarr/x.py", "analysis.zarr/.git/config"])
def test_no_folder_with_a_file_of_somebody_is_removed(out, name, inner):
    fill(out / name)
    (out / name / inner).parent.mkdir(parents=True, exist_ok=True)
    (out / name / inner).write_text("mine")
    for _ in range(2):
        analyse(out)
        kept = [folder for folder in out.iterdir() if (folder / inner).is_file()]
        assert [(folder / inner).read_text() for folder in kept] == ["mine"]


@pytest.mark.parametrize("name", ["analysis", "analysis.previous"])
@pytest.mark.parametrize("inner", ["summary.json", "figures/a.svg", "analysis.zarr/0.0"])
def test_a_named_pipe_is_not_removed(out, name, inner):
    fill(out / name)
    (out / name / inner).unlink(missing_ok=True)
    os.mkfifo(out / name / inner)
    analyse(out)
    assert [folder for folder in out.iterdir() if (folder / inner).is_fifo()]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("inner", ["summary.json", "figures", "analysis.zarr/.zattrs"])
def test_a_file_of_another_user_is_not_removed(out, inner):
    fill(out / "analysis")
    os.chown(out / "analysis" / inner, 12345, 12345)
    assert not analyse(out)
    assert (out / "analysis.previous" / inner).exists()


def test_lists_of_the_first_edition_are_not_believed(out, victim):
    before = files(victim)
    (out / ".staging" / "old-host-1-x").mkdir(parents=True)
    (out / ".staging" / "written.json").write_text('{"names": ["../../victim/secret.txt", "x/secret.txt"]}')
    (out / ".staging" / "old-host-1-x" / "plan.json").write_text('["../../victim"]')
    link(out / ".staging" / "old-host-1-x" / "was", victim)
    link(out / "x", victim)
    assert not analyse(out)
    assert files(victim) == before
    assert (out / ".staging" / "written.json").exists()


def test_loops_end(out):
    (out / "analysis.previous").symlink_to("analysis.previous")
    (out / ".analysis-x").symlink_to("..")
    assert result_path(out) is None
    assert not analyse(out)
    (out / "analysis" / "figures" / "loop").symlink_to("..")
    assert analyse(out)  # the link is in the way of the result before
