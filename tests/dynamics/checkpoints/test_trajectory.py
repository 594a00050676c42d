"""A run in memory: steps, trainings, what updates are counted from, and matrices that are loaded when asked for."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamics.checkpoints import Checkpoint, MatrixShape, OpenCheckpoint, Trajectory

SHAPE = MatrixShape(3, 2, 0, "F32")


def checkpoint(step: int, segment: int = 0, matrices: tuple[str, ...] = ()) -> Checkpoint:
    return Checkpoint(step, Path("run"), segment, dict.fromkeys(matrices, SHAPE), open=nullcontext)  # type: ignore[arg-type]


def trajectory(*checkpoints: Checkpoint, **fields: Any) -> Trajectory:
    return Trajectory(Path("run"), checkpoints, **fields)


def test_trainings_keep_the_order_of_segments_and_steps() -> None:
    run = trajectory(*(checkpoint(step, segment) for step, segment in ((5, 1), (10, 0), (15, 2), (20, 0), (25, 1))))
    assert [[one.step for one in training] for training in run.trainings] == [[10, 20], [5, 25], [15]]
    assert run.steps == (5, 10, 15, 20, 25)


def test_a_run_without_checkpoints_has_no_trainings() -> None:
    assert trajectory().trainings == []


def test_totals_are_counted_from_the_first_checkpoint_of_the_training() -> None:
    first, other, last = checkpoint(5), checkpoint(6, segment=1), checkpoint(10)
    run = trajectory(first, other, last)
    assert run.start_of(last) is first
    assert run.start_of(first) is None
    assert run.start_of(other) is None


def test_totals_are_counted_from_the_base_if_there_is_one() -> None:
    base, first, other = checkpoint(0, segment=-1), checkpoint(5), checkpoint(6, segment=1)
    run = trajectory(first, other, base=base)
    assert [run.start_of(later) for later in (first, other)] == [base, base]


def test_matrices_are_those_of_all_checkpoints() -> None:
    run = trajectory(checkpoint(5, matrices=("h.0.q", "h.1.q")), checkpoint(10, matrices=("h.1.q", "lm_head")))
    assert run.matrices == ("h.0.q", "h.1.q", "lm_head")


def test_the_name_of_a_link_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imax-7").mkdir()
    (tmp_path / "imax").symlink_to("imax-7")
    monkeypatch.chdir(tmp_path / "imax-7")
    assert Trajectory(tmp_path / "imax", ()).name == "imax"
    assert Trajectory(Path("."), ()).name == "imax-7"


def test_a_matrix_is_loaded_when_asked_for() -> None:
    loads: list[str] = []

    def load(name: str) -> torch.Tensor:
        loads.append(name)
        return torch.ones(3, 2)

    matrices = OpenCheckpoint({"q": SHAPE, "v": SHAPE}, load)
    assert (list(matrices), len(matrices), loads) == (["q", "v"], 2, [])
    assert matrices["v"].shape == (3, 2)
    assert loads == ["v"]
    with pytest.raises(KeyError, match="lm_head"):
        matrices["lm_head"]
    assert loads == ["v"]
