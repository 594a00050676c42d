"""Several trainings in one folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dynamics.checkpoints import open_trajectory
from dynamics.checkpoints.trainings import Clues, compare_clues, find_segments, parse_training_state
from tests.runs import adapter_config, log_history, random_factors, write_adapter, write_run, write_state


def clues(step: int, loss: float | None = 2.0, **changes: Any) -> Clues:
    """A checkpoint whose log falls from ``loss``; no log at all for ``None``."""
    matrices = {name: changes.pop(name) for name in ("ranks", "sizes", "settings") if name in changes}
    content = {
        "global_step": step,
        "log_history": [] if loss is None else log_history(step, loss=loss),
        "max_steps": 100,
        "train_batch_size": 4,
        "total_flos": 1e6 * step,
        **changes,
    }
    return Clues(step, parse_training_state(content), **matrices)


def silent(step: int, **matrices: Any) -> Clues:
    """A checkpoint without training state."""
    return Clues(step, None, **matrices)


def numbers(*checkpoints: Clues) -> tuple[int, ...]:
    return find_segments(checkpoints).numbers


def codes_of(*checkpoints: Clues) -> list[str]:
    return [finding.code for finding in find_segments(checkpoints).findings]


def test_one_training() -> None:
    run = [clues(step) for step in (10, 20, 30)]
    assert numbers(*run) == (0, 0, 0)
    assert codes_of(*run) == []


def test_interleaved_rerun() -> None:
    run = [clues(10), clues(15, 3.0), clues(20), clues(30, 3.0), clues(40)]
    assert numbers(*run) == (0, 1, 0, 1, 0)
    (finding,) = find_segments(run).findings
    assert finding.code == "OD112"
    assert "training 0 at steps 10, 20, 40; training 1 at steps 15, 30" in finding.message
    assert "loss at step 5 is" in finding.message
    assert finding.evidence["steps"] == {"0": [10, 20, 40], "1": [15, 30]}


def test_three_trainings() -> None:
    run = [clues(10, 2.0), clues(11, 3.0), clues(12, 4.0), clues(20, 3.0), clues(21, 2.0), clues(22, 4.0)]
    assert numbers(*run) == (0, 1, 2, 1, 0, 2)


def test_rerun_that_overwrote_the_first_checkpoints() -> None:
    assert numbers(clues(10, 3.0), clues(20, 3.0), clues(30), clues(40)) == (0, 0, 1, 1)


def test_extended_training_is_one() -> None:
    run = [clues(10), clues(20, max_steps=400, num_train_epochs=9, train_batch_size=8)]
    assert numbers(*run) == (0, 0)
    assert codes_of(*run) == []


def test_nan_in_both_logs_agrees() -> None:
    log = [{"step": 5, "loss": math.nan, "grad_norm": 1.0}]
    assert numbers(clues(10, log_history=log), clues(20, log_history=log)) == (0, 0)


def test_log_that_started_over_at_another_interval() -> None:
    run = [clues(10), clues(21, log_history=[{"step": 7, "loss": 1.0}, {"step": 14, "loss": 0.9}])]
    assert numbers(*run) == (0, 1)
    assert "lacks step 5" in find_segments(run).findings[0].message


def test_times_and_names_that_were_dropped_do_not_matter() -> None:
    first = [{"step": 5, "loss": 1.0, "eval_runtime": 3.0, "old_name": 1.0}]
    second = [{"step": 5, "loss": 1.0, "eval_runtime": 4.0}, {"step": 15, "loss": 0.5}]
    assert numbers(clues(10, log_history=first), clues(20, log_history=second)) == (0, 0)


def test_equal_learning_rates_alone_decide_nothing() -> None:
    log = [{"step": 5, "learning_rate": 1e-4}]
    assert compare_clues(clues(10, log_history=log), clues(20, log_history=log)).answer == "unknown"


def test_log_that_became_empty_is_reported_and_not_split() -> None:
    run = [clues(10), clues(20, None)]
    assert numbers(*run) == (0, 0)
    assert codes_of(*run) == ["OD113"]


def test_other_max_steps_alone_is_reported_and_not_split() -> None:
    run = [clues(10, None), clues(20, None, max_steps=200)]
    assert numbers(*run) == (0, 0)
    (finding,) = find_segments(run).findings
    assert finding.code == "OD113"
    assert "max_steps is 100 at step 10 and 200 at step 20" in finding.message


def test_other_plan_in_two_ways_is_another_training() -> None:
    assert numbers(clues(10, None), clues(20, None, max_steps=200, train_batch_size=8)) == (0, 1)


def test_max_steps_and_epochs_change_together() -> None:
    first = clues(10, None, num_train_epochs=1)
    assert numbers(first, clues(20, None, max_steps=200, num_train_epochs=2)) == (0, 0)


def test_operations_that_go_down() -> None:
    assert numbers(clues(10, None), clues(20, None, total_flos=1e6)) == (0, 1)


@pytest.mark.parametrize("state", [silent, lambda step, **matrices: clues(step, None, **matrices)])
def test_other_ranks_or_matrices(state: Any) -> None:
    assert numbers(state(10, ranks={"q": 8, "v": 8}), state(20, ranks={"q": 8, "v": 16})) == (0, 0)
    assert numbers(state(10, ranks={"q": 8, "k": 8}), state(20, ranks={"q": 8, "v": 8})) == (0, 1)
    assert numbers(state(10, ranks={"q": 8, "v": 8}), state(20, ranks={"q": 8})) == (0, 0)
    assert numbers(state(10, sizes={"q": (8, 4)}), state(20, sizes={"q": (8, 6)})) == (0, 1)


@pytest.mark.parametrize("state", [silent, lambda step, **matrices: clues(step, None, **matrices)])
def test_ranks_alone_are_reported_and_not_split(state: Any) -> None:
    growth = [state(10, ranks={"q": 4, "v": 4}), state(20, ranks={"q": 8, "v": 8}), state(30, ranks={"q": 8, "v": 8})]
    assert numbers(*growth) == (0, 0, 0)
    (finding,) = find_segments(growth).findings
    assert finding.code == "OD113"
    assert "all ranks differ, e.g. q: 4 at step 10, 8 at step 20" in finding.message


def test_all_ranks_with_one_more_piece_of_evidence_are_another_training() -> None:
    before, after = {"default": {"lora_alpha": 8}}, {"default": {"lora_alpha": 16}}
    run = [silent(10, ranks={"q": 4}, settings=before), silent(20, ranks={"q": 8}, settings=after)]
    assert numbers(*run) == (0, 1)
    assert numbers(silent(10, ranks={"q": 4, "k": 4}), silent(20, ranks={"q": 8})) == (0, 1)
    assert numbers(clues(10, ranks={"q": 4}), silent(20, ranks={"q": 8})) == (0, 1)


def test_continued_log_outweighs_other_ranks() -> None:
    assert numbers(clues(10, ranks={"q": 8}), clues(20, ranks={"q": 16})) == (0, 0)


def test_checkpoint_without_evidence_goes_with_the_one_before() -> None:
    assert numbers(clues(10), clues(15, 3.0), silent(17), clues(20), clues(30, 3.0)) == (0, 1, 1, 0, 1)


def test_state_that_is_missing_in_between_does_not_hide_a_rerun() -> None:
    assert numbers(clues(10), silent(15), clues(20, 3.0)) == (0, 0, 1)


def test_interleaved_run_on_disk(tmp_path: Path) -> None:
    write_run(tmp_path, (10, 20, 30))
    for step in (15, 25):
        checkpoint = write_adapter(tmp_path / f"checkpoint-{step}", random_factors(seed=step))
        write_state(checkpoint, step, log_history(step, loss=5.0, eval_accuracy=0.5))

    trajectory = open_trajectory(tmp_path)

    assert [(one.step, one.segment) for one in trajectory.checkpoints] == [(10, 0), (15, 1), (20, 0), (25, 1), (30, 0)]
    assert sum(finding.code == "OD112" for finding in trajectory.findings) == 1
    losses = {(entry.segment, entry.step): entry.value for entry in trajectory.log if entry.name == "loss"}
    assert losses[1, 25] == pytest.approx(5.0 * 0.99**25)
    assert sorted(step for segment, step in losses if segment == 0) == [5, 10, 15, 20, 25, 30]
    assert {entry.segment for entry in trajectory.log if entry.name == "eval_accuracy"} == {1}


def test_rerun_with_another_configuration_and_no_states(tmp_path: Path) -> None:
    write_run(tmp_path, (10, 20), states=False)
    write_adapter(tmp_path / "checkpoint-15", random_factors(rank=2), adapter_config(rank=2, alpha=16))

    trajectory = open_trajectory(tmp_path)

    assert [one.segment for one in trajectory.checkpoints] == [0, 1, 0]
    codes = [finding.code for finding in trajectory.findings]
    assert "OD112" in codes
    assert "OD116" in codes


def test_rank_that_grows_in_every_matrix_is_one_training(tmp_path: Path) -> None:
    write_run(tmp_path, (10, 20), states=False)
    write_adapter(tmp_path / "checkpoint-30", random_factors(rank=8), adapter_config(rank=8))

    trajectory = open_trajectory(tmp_path)

    assert [one.segment for one in trajectory.checkpoints] == [0, 0, 0]
    assert [finding.code for finding in trajectory.findings] == ["OD113", "OD116", "OD117"]


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"lora_alpha": 16}, "lora_alpha"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    ],
)
def test_no_increment_crosses_a_change_of_scale(change: dict[str, Any], setting: str, tmp_path: Path) -> None:
    """The log goes on, so that it is one training; its updates before and after have two scales."""
    for step in (10, 20, 30, 40):
        config = adapter_config(**(change if step > 20 else {}))
        write_state(write_adapter(tmp_path / f"checkpoint-{step}", random_factors(seed=step), config), step)
    trajectory = open_trajectory(tmp_path)
    assert [checkpoint.segment for checkpoint in trajectory.checkpoints] == [0, 0, 1, 1]
    (warning,) = [finding for finding in trajectory.findings if finding.code == "OD140"]
    assert (warning.severity, warning.step) == ("warning", 30)
    assert warning.message.startswith(f"{setting} is ")
    assert "No increment crosses the change" in warning.message
    assert not [finding for finding in trajectory.findings if finding.code in ("OD112", "OD113")]
