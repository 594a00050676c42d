"""Units are separate processes, and what is done is not done again."""

from __future__ import annotations

import sys

import pytest

from examples.imax import run


@pytest.fixture
def worker(monkeypatch):
    """In place of a training: a process that writes what a complete unit leaves, and fails for seed 1 of 'broken'."""
    code = (
        "import pathlib, sys; what, seed, out = sys.argv[1:]; "
        "print('cannot') or sys.exit(3) if (what, seed) == ('broken', '1') else None; "
        "folder = pathlib.Path(out, 'base' if what == 'base' else what + '-' + seed); folder.mkdir(parents=True); "
        "(folder / ('taught.json' if what == 'base' else 'scores.json')).write_text('{}')"
    )
    monkeypatch.setattr(
        run, "unit_command", lambda what, seed, out, smoke: [sys.executable, "-c", code, what, str(seed), str(out)]
    )


def test_all_units_run_after_the_base(worker, tmp_path):
    run.run_units(tmp_path, ["imax", "dmax-plain"], range(2), 2, smoke=True)
    assert run.pending(tmp_path, ["imax", "dmax-plain"], range(2)) == []
    assert (tmp_path / "base" / "taught.json").exists()


def test_what_is_done_is_not_done_again(worker, tmp_path):
    run.run_units(tmp_path, ["imax"], range(1), 1, smoke=True)
    run.run_units(tmp_path, ["imax"], range(2), 1, smoke=True)  # a folder that is there would be an error of the worker
    assert run.pending(tmp_path, ["imax"], range(2)) == []


def test_a_unit_that_fails_is_told_and_is_still_pending(worker, tmp_path):
    with pytest.raises(RuntimeError, match=r"^Expected broken-1 to end well, got exit status 3; .*\ncannot$"):
        run.run_units(tmp_path, ["broken"], range(2), 1, smoke=True)
    assert run.pending(tmp_path, ["broken"], range(2)) == [("broken", 1)]


def test_units_come_seed_by_seed(tmp_path):
    assert run.pending(tmp_path, ["a", "b"], range(2)) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_unit_is_a_command_of_its_own(tmp_path):
    command = run.unit_command("imax", 3, tmp_path, smoke=True)
    assert command[1:] == ["-m", "examples.imax.run", "--out", str(tmp_path), "--unit", "imax", "3", "--smoke"]
