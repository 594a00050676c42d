"""Output folders that came from somebody else: whatever links and lists are in them, nothing outside is touched."""

import json
import os
import socket
from pathlib import Path

import pytest

from dynamics.store import OutputError, result_path, staged
from dynamics.store.replace import _machine, interrupted_elsewhere, is_result

#: Above Linux's largest process id, so that of no process; of this machine as nobody else can name it, and as anybody.
GONE = f"{socket.gethostname()}-{_machine()}-{2**22 + 1}-deadbeef"
FORGED = f"{socket.gethostname()}-{2**22 + 1}-deadbeef"
OWNERS = pytest.mark.parametrize("owner", [GONE, FORGED, f"{socket.gethostname()}--1-x", "a-b-c", ""])


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
    for name in ("secret.txt", "summary.json", "deep/report.html", "analysis.zarr/.zattrs", "figures/a.svg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    return folder


@pytest.fixture
def out(tmp_path, victim):
    """The output folder of a run made by somebody else."""
    (tmp_path / "run" / "dynamics" / ".staging").mkdir(parents=True)
    return tmp_path / "run" / "dynamics"


def fill(partial):
    (partial / "summary.json").write_text("new")
    (partial / "analysis.zarr").mkdir()
    (partial / "analysis.zarr" / ".zattrs").write_text("{}")
    (partial / "figures").mkdir()
    (partial / "figures" / "a.svg").write_text("new")


def analyse(out):
    """Write a result, whatever came before; tell whether it was refused."""
    try:
        with staged(out, ["summary.json", "analysis.zarr"], ["figures"]) as partial:
            fill(partial)
    except OutputError:
        return True
    return False


def write_list(out, names):
    (out / ".staging" / "written.json").write_text(json.dumps({"names": names, "commit": "c"}))


LINKS = pytest.mark.parametrize("kind", ["relative", "absolute"])


def link(path, target, kind="relative"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target if kind == "absolute" else os.path.relpath(target, path.parent))


@LINKS
@pytest.mark.parametrize(
    "name", ["x/secret.txt", "x/summary.json", "figures/a.svg", "figures/x/a.svg", "analysis.zarr"]
)
def test_a_list_removes_nothing_behind_a_link(out, victim, name, kind):
    before = files(victim)
    linked = Path(name).parts[0]
    link(out / linked, victim / "figures" if linked == "figures" else victim, kind)
    write_list(out, [name, "summary.json"])
    analyse(out)
    assert files(victim) == before


@pytest.mark.parametrize("name", ["figures/a.svg", "figures/x/a.svg"])
def test_an_earlier_figure_is_not_removed_behind_a_link(out, victim, name):
    """Without a report nothing is written into ``figures``, so that nothing else refuses the link."""
    before = files(victim)
    if name == "figures/a.svg":
        link(out / "figures", victim / "figures")
    else:
        link(out / "figures" / "x", victim / "figures")
    write_list(out, [name])
    with staged(out, ["summary.json"]) as partial:
        (partial / "summary.json").write_text("new")
    assert files(victim) == before
    assert (out / "summary.json").read_text() == "new"


@pytest.mark.parametrize(
    "name",
    ["../../victim/secret.txt", "/etc/hostname", "figures/../../../victim/secret.txt", "notes.txt", "x/y.svg", ".", ""],
)
def test_a_list_removes_no_other_file(out, victim, name):
    (out / "notes.txt").write_text("mine")
    (out / "x").mkdir()
    (out / "x" / "y.svg").write_text("mine")
    before = files(victim)
    write_list(out, [name, str(victim / "secret.txt"), 3, None, ["a"]])
    assert not analyse(out)
    assert files(victim) == before
    assert (out / "notes.txt").read_text() == (out / "x" / "y.svg").read_text() == "mine"


@pytest.mark.parametrize("content", ["[1, null]", "null", '{"names": 3}', "[" * 10**5, '"\\ud800"', ""])
def test_a_list_or_plan_that_is_none_is_no_traceback(out, content):
    (out / ".staging" / "written.json").write_text(content)
    old = out / ".staging" / f"old-{GONE}"
    old.mkdir()
    (old / "plan.json").write_text(content)
    assert not analyse(out)
    assert (out / "summary.json").read_text() == "new"


@OWNERS
@pytest.mark.parametrize(
    "names", [["../../victim"], ["ABSOLUTE"], ["x"], ["x/summary.json"], ["figures/../../../victim/secret.txt"], [".."]]
)
def test_a_plan_removes_nothing_outside(out, victim, owner, names):
    before = files(victim)
    old = out / ".staging" / f"old-{owner}"
    old.mkdir()
    link(out / "x", victim)
    (old / "plan.json").write_text(json.dumps([str(victim) if name == "ABSOLUTE" else name for name in names]))
    analyse(out)
    assert files(victim) == before


@OWNERS
@LINKS
def test_nothing_is_moved_out_of_a_folder_that_was_is_a_link_to(out, victim, owner, kind):
    before = files(victim)
    link(out / ".staging" / f"old-{owner}" / "was", victim, kind)
    analyse(out)
    assert files(victim) == before


@OWNERS
@pytest.mark.parametrize("name", ["figures", "analysis.zarr", "summary.json", "figures/b.svg"])
def test_nothing_is_moved_through_a_link_below_was(out, victim, owner, name):
    before = files(victim)
    target = victim / ("figures/a.svg" if name.endswith("svg") else name)
    link(out / ".staging" / f"old-{owner}" / "was" / name, target)
    analyse(out)
    assert files(victim) == before


@OWNERS
def test_nothing_is_put_back_through_a_link(out, victim, owner):
    before = files(victim)
    link(out / "figures", victim / "figures")
    for name in ("a.svg", "b.svg", "inner/c.svg"):
        path = out / ".staging" / f"old-{owner}" / "was" / "figures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("forged")
    analyse(out)
    assert files(victim) == before


@OWNERS
@pytest.mark.parametrize("prefix", ["old-", "partial-"])
def test_a_stage_that_is_a_link_is_not_swept(out, victim, owner, prefix):
    before = files(victim)
    link(out / ".staging" / f"{prefix}{owner}", victim)
    analyse(out)
    assert files(victim) == before


@LINKS
@pytest.mark.parametrize(
    "name", [".staging", "summary.json", "analysis.zarr", "figures", "figures/a.svg", ".staging/lock"]
)
def test_what_a_result_needs_is_refused_where_it_is_a_link(out, victim, name, kind):
    before = files(victim)
    if name == ".staging":
        (out / ".staging").rmdir()
    target = {"figures/a.svg": "figures/a.svg", ".staging/lock": "secret.txt", ".staging": "."}.get(name, name)
    link(out / name, victim / target, kind)
    write_list(out, []) if name == ".staging/lock" else None
    (out / ".staging" / "partial-x-y").mkdir() if name == ".staging/lock" else None  # so that the lock is taken
    assert analyse(out)
    assert files(victim) == before


def test_a_lock_that_is_a_link_to_nothing_makes_nothing(out, victim):
    link(out / ".staging" / "lock", victim / "new.txt")
    assert analyse(out)
    assert not (victim / "new.txt").exists()


def test_a_list_that_is_a_link_is_not_read(out, victim):
    (victim / "list.json").write_text(json.dumps({"names": ["summary.json"], "commit": "c"}))
    link(out / ".staging" / "written.json", victim / "list.json")
    (out / "summary.json").write_text("mine")
    assert analyse(out)
    assert (out / "summary.json").read_text() == "mine"


def test_loops_end(out):
    (out / "figures").symlink_to("figures")
    (out / ".staging" / f"old-{GONE}").symlink_to(f"old-{GONE}")
    (out / ".staging" / "partial-x").symlink_to("..")
    assert analyse(out)
    assert result_path(out) is None


def test_a_store_set_aside_is_not_opened_through_a_link(out, victim):
    link(out / ".staging" / "old-a" / "was" / "analysis.zarr", victim / "analysis.zarr")
    link(out / ".staging" / "old-b", victim)
    assert result_path(out) is None
    link(out / "analysis.zarr", victim / "analysis.zarr")
    assert result_path(out) is None


def test_what_another_machine_left_is_named_and_left_alone(out):
    old = out / ".staging" / f"old-{FORGED}"
    (old / "was").mkdir(parents=True)
    (old / "was" / "summary.json").write_text("theirs")
    (old / "plan.json").write_text('["report.html"]')
    (out / "report.html").write_text("mine")
    before = files(old)
    analyse(out)
    assert files(old) == before
    assert (out / "report.html").read_text() == "mine"
    assert interrupted_elsewhere(out) == [f"old-{FORGED}"]


def test_names_of_results():
    names = ["run.yaml", "summary.json", "report.html", "analysis.zarr", "rank_pattern.json", "rank_pattern.a b.json"]
    assert all(is_result(name) for name in [*names, "figures/a.svg", "figures/run 1/a.svg"])
    others = [
        "capture.zarr",
        "figures",
        "figures/.svg",
        "figures/a/b/c.svg",
        "figures/..svg/a.svg",
        "rank_pattern..json",
    ]
    assert not any(is_result(name) for name in [*others, "/summary.json", "./summary.json", "summary.json/", "a\0.svg"])
