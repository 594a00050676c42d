"""Reading whole runs: order, names, laziness, notes about the run."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamics.checkpoints import MatrixShape, NotARun, Trajectory, open_trajectory
from dynamics.checkpoints import files as weight_files_module
from dynamics.findings import Finding
from tests.runs import NAMES, adapter_config, adapter_tensors, random_factors, write_adapter, write_run, write_state

WEIGHTS = "adapter_model.safetensors"


def only(trajectory: Trajectory | NotARun, code: str) -> Finding:
    (finding,) = [finding for finding in trajectory.findings if finding.code == code]
    return finding


def test_steps_are_sorted_by_number(tmp_path: Path, codes: Any) -> None:
    write_run(tmp_path, (100, 20, 3))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (3, 20, 100)
    assert codes(trajectory.findings) == []


def test_matrices_are_in_natural_order(tmp_path: Path) -> None:
    write_adapter(tmp_path, random_factors(["h.10.q", "h.2.q", "h.2.k"]))
    assert open_trajectory(tmp_path).matrices == ("h.2.k", "h.2.q", "h.10.q")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("binary", [False, True])
def test_factors_are_given_as_stored(dtype: torch.dtype, binary: bool, tmp_path: Path) -> None:
    factors = random_factors(dtype=dtype)
    write_adapter(tmp_path, factors, binary=binary)

    checkpoint = open_trajectory(tmp_path).checkpoints[0]

    with checkpoint.open() as matrices:
        for name in NAMES:
            matrix = matrices[name]
            assert torch.equal(matrix.left_factor, factors[name][0])
            assert torch.equal(matrix.right_factor, factors[name][1])
            assert matrix.left_factor.dtype == dtype
            assert matrix.scale == 2.0
    assert checkpoint.shapes[NAMES[0]].rank == 4


def test_shapes_come_from_the_header(tmp_path: Path) -> None:
    left, right = random_factors(["q"], dtype=torch.float32)["q"]
    write_adapter(tmp_path, {"q": (left, right.to(torch.bfloat16))})
    assert open_trajectory(tmp_path).checkpoints[0].shapes == {"q": MatrixShape(out=12, in_=10, rank=4, dtype="BF16")}


def test_opening_a_run_loads_no_factor_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, (10, 20))
    loaded: list[str] = []

    real = weight_files_module._view

    def counting(*arguments: Any) -> torch.Tensor:
        loaded.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(weight_files_module, "_view", counting)

    trajectory = open_trajectory(tmp_path)
    assert all("lora_B" in key for key in loaded)  # the few that tell duplicates apart
    loaded.clear()
    with trajectory.checkpoints[0].open() as matrices:
        assert loaded == []
        assert len(matrices) == 4
        matrices[NAMES[1]]
    assert sorted(loaded) == [f"base_model.model.{NAMES[1]}.lora_{part}.weight" for part in "AB"]


def test_a_closed_checkpoint_says_so(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    with open_trajectory(tmp_path).checkpoints[0].open() as matrices:
        pass
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        matrices[NAMES[0]]


def test_nothing_keeps_the_mapping_when_closed(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("memory maps cannot be listed here")
    write_run(tmp_path, (10, 20), out=2000, in_=2000)
    trajectory = open_trajectory(tmp_path)

    for checkpoint in trajectory.checkpoints:
        with checkpoint.open() as matrices:
            norm = sum(matrix.left_factor.norm() for matrix in matrices.values())
            assert norm > 0
            assert str(tmp_path) in maps.read_text()
        gc.collect()
        assert str(tmp_path) not in maps.read_text()


def test_unknown_matrix_is_a_key_error(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    with open_trajectory(tmp_path).checkpoints[0].open() as matrices, pytest.raises(KeyError):
        matrices["nothing"]


def test_only_watched_matrices(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert open_trajectory(tmp_path, matrices=r"layers\.1.*q_proj$").matrices == ("model.layers.1.self_attn.q_proj",)


def test_unwatched_refusals_are_not_reported(tmp_path: Path, codes: Any) -> None:
    tensors = adapter_tensors(random_factors())
    del tensors[f"base_model.model.{NAMES[0]}.lora_B.weight"]
    write_adapter(tmp_path, tensors=tensors)
    assert codes(open_trajectory(tmp_path, matrices="v_proj").findings) == []
    assert codes(open_trajectory(tmp_path).findings) == ["OD104"]


def test_fingerprints(tmp_path: Path) -> None:
    write_run(tmp_path, (10, 20))
    first, second = (one.inputs for one in open_trajectory(tmp_path).checkpoints)
    assert [sorted(one) for one in first] == [["bytes", "header_sha256", "path"]]
    assert first[0]["path"] == "checkpoint-10/adapter_model.safetensors"
    assert first[0]["bytes"] == (tmp_path / "checkpoint-10" / WEIGHTS).stat().st_size
    assert first[0]["header_sha256"] == second[0]["header_sha256"]


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.base_model.model.", "_orig_mod.base_model.model.", ""])
def test_wrappers_around_the_model(prefix: str, tmp_path: Path) -> None:
    tensors = adapter_tensors(random_factors(), prefix)
    write_adapter(tmp_path, tensors=tensors)
    assert open_trajectory(tmp_path).matrices == tuple(sorted(NAMES))


def test_adapter_name_in_the_keys(tmp_path: Path) -> None:
    tensors = {
        key.replace(".weight", ".default.weight"): tensor for key, tensor in adapter_tensors(random_factors()).items()
    }
    write_adapter(tmp_path, tensors=tensors, binary=True)
    assert open_trajectory(tmp_path).matrices == tuple(sorted(NAMES))


def test_compiled_blocks_and_a_module_called_module(tmp_path: Path) -> None:
    write_adapter(tmp_path, random_factors(["layers.0._orig_mod.q", "module.q", "q"]))
    assert open_trajectory(tmp_path).matrices == ("layers.0.q", "module.q", "q")


def test_names_that_would_merge_stay_apart(tmp_path: Path) -> None:
    factors = random_factors(["layers.0._orig_mod.q", "layers.0.q"])
    write_adapter(tmp_path, factors)
    trajectory = open_trajectory(tmp_path)
    assert len(trajectory.matrices) == 2
    with trajectory.checkpoints[0].open() as matrices:
        assert torch.equal(matrices["base_model.model.layers.0.q"].left_factor, factors["layers.0.q"][0])


# --- one folder, and adapters beside checkpoints -----------------------------------------------


def test_lone_adapter_is_step_zero(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    assert open_trajectory(tmp_path).steps == (0,)


def test_lone_adapter_takes_the_step_of_its_state(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    write_state(tmp_path, 7)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (7,)
    assert {entry.name for entry in trajectory.log} == {"loss", "learning_rate"}


def test_lone_checkpoint_takes_the_step_of_its_name(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    trajectory = open_trajectory(run / "checkpoint-20")
    assert trajectory.steps == (20,)
    assert trajectory.checkpoints[0].inputs[0]["path"] == WEIGHTS


@pytest.mark.parametrize(("link", "step"), [("checkpoint-7", 7), ("best", 20)])
def test_linked_checkpoint_takes_the_step_of_its_own_name_first(link: str, step: int, tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint-20" / "trainer_state.json").unlink()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / link).symlink_to(tmp_path / "checkpoint-20")
    assert open_trajectory(tmp_path / "links" / link).steps == (step,)


def test_a_linked_run_is_called_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "imax").symlink_to(tmp_path / "a")
    assert open_trajectory(tmp_path / "imax").name == "imax"
    monkeypatch.chdir(tmp_path)
    assert open_trajectory("imax/").name == "imax"
    monkeypatch.chdir(tmp_path / "a")
    assert open_trajectory(".").name == "a"
    assert open_trajectory("../imax/../a").name == "a"


def test_final_adapter_like_the_last_checkpoint_is_left_out(tmp_path: Path) -> None:
    last = random_factors(seed=5)
    write_run(tmp_path, {10: random_factors(), 20: last})
    write_adapter(tmp_path, last)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    assert "same weights as the last checkpoint" in only(trajectory, "OD110").message


def test_final_adapter_with_a_step_of_its_own_is_used(tmp_path: Path) -> None:
    write_run(tmp_path, (10, 20))
    write_adapter(tmp_path, random_factors(seed=5))
    write_state(tmp_path, 25)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20, 25)
    assert [one.segment for one in trajectory.checkpoints] == [0, 0, 0]
    assert "is step 25" in only(trajectory, "OD110").message


@pytest.mark.parametrize(("step", "why"), [(None, "its step is unknown"), (20, "step 20 has a checkpoint")])
def test_final_adapter_without_a_place_is_left_out(step: int | None, why: str, tmp_path: Path) -> None:
    write_run(tmp_path, (10, 20))
    write_adapter(tmp_path, random_factors(seed=5))
    if step is not None:
        write_state(tmp_path, step)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    assert why in only(trajectory, "OD110").message


def test_final_adapter_that_cannot_be_read_is_reported(tmp_path: Path, codes: Any) -> None:
    write_run(tmp_path, (10, 20))
    write_adapter(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    assert codes(trajectory.findings) == ["OD110", "OD101"]


# --- notes about the run -----------------------------------------------------------------------


def test_duplicate_checkpoints(tmp_path: Path) -> None:
    same = random_factors(seed=3)
    write_run(tmp_path, {10: random_factors(), 20: same, 30: same, 40: random_factors(seed=4)})
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20, 30, 40)
    assert only(trajectory, "OD114").evidence == {"steps": [20, 30]}


def test_frozen_factors_are_no_duplicates(tmp_path: Path, codes: Any) -> None:
    start = random_factors()
    later = {name: (left, right) for name, (left, right) in start.items()}
    later[NAMES[3]] = (later[NAMES[3]][0], later[NAMES[3]][1] + 1)
    write_run(tmp_path, {10: start, 20: later})
    assert codes(open_trajectory(tmp_path).findings) == []


def test_matrix_that_is_not_in_every_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path, {10: random_factors(NAMES[:3], seed=1), 20: random_factors(seed=2)})
    trajectory = open_trajectory(tmp_path)
    finding = only(trajectory, "OD115")
    assert finding.matrix == NAMES[3]
    assert finding.evidence == {"matrices": [NAMES[3]], "missing_at": [10]}
    assert finding.message == (
        f"Missing at step 10: {NAMES[3]}. Increments need the matrix in two consecutive checkpoints of one training."
    )
    assert finding.remedy == "Check that these checkpoints belong to one training with one choice of matrices."


def test_rank_that_changes(tmp_path: Path) -> None:
    changed = random_factors(seed=2) | random_factors([NAMES[0]], rank=2)
    write_run(tmp_path, {10: random_factors(seed=1)})
    write_adapter(tmp_path / "checkpoint-20", changed, adapter_config(rank_pattern={NAMES[0]: 2}))
    trajectory = open_trajectory(tmp_path)
    finding = only(trajectory, "OD116")
    assert finding.matrix == NAMES[0]
    assert finding.evidence["ranks"] == {"10": 4, "20": 2}


def test_every_run_says_that_names_are_as_on_disk(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    assert [finding.code for finding in open_trajectory(tmp_path).findings] == ["OD117"]


# --- the log -----------------------------------------------------------------------------------


def test_log_as_real_ones_are(tmp_path: Path) -> None:
    checkpoint = write_adapter(tmp_path / "checkpoint-20")
    log = [
        {"step": 5, "loss": 1.5, "epoch": 0.1},
        {"step": 10, "loss": math.nan, "grad_norm": math.inf},
        {"step": 10, "eval_set/accuracy": 0.5},
        {"step": 20, "train_runtime": 3.0, "note": "text", "flag": True},
        {"loss": 1.0},
        "not an entry",
    ]
    write_state(checkpoint, 20, best_model_checkpoint="C:\\runs\\checkpoint-10")
    content = json.loads((checkpoint / "trainer_state.json").read_text())
    content["log_history"] = log
    (checkpoint / "trainer_state.json").write_text(json.dumps(content))
    assert "NaN" in (checkpoint / "trainer_state.json").read_text()

    trajectory = open_trajectory(tmp_path)

    entries = {(entry.step, entry.name): entry.value for entry in trajectory.log}
    assert math.isnan(entries.pop((10, "loss")))
    assert entries == {
        (5, "loss"): 1.5,
        (10, "grad_norm"): math.inf,
        (10, "eval_set/accuracy"): 0.5,
        (20, "train_runtime"): 3.0,
    }
    assert [finding.code for finding in trajectory.findings] == ["OD117"]


def test_a_relative_run_and_the_run_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert open_trajectory("run").steps == (10, 20, 30)
    monkeypatch.chdir(tmp_path / "run" / "checkpoint-20")
    assert open_trajectory(".").steps == (20,)


def test_size_that_changes_within_a_training(tmp_path: Path) -> None:
    write_run(tmp_path, {10: random_factors(seed=1), 20: random_factors(seed=2) | random_factors([NAMES[0]], out=13)})
    finding = only(open_trajectory(tmp_path), "OD104")
    assert finding.matrix == NAMES[0]
    assert finding.message == "Its size is (12, 10) at step 10 and (13, 10) at step 20."


def test_a_copy_of_the_best_run_is_no_second_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path, random_factors(["q"]))
    write_state(write_adapter(tmp_path / "best", random_factors(["q"])), 10)
    assert open_trajectory(tmp_path).matrices == ("q",)
