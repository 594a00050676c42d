"""One matrix keeps one name through a run, and adapters that are never active together are not added up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamics.checkpoints import open_trajectory
from dynamics.spectra.trajectory_spectra import trajectory_spectra
from tests.runs import adapter_config, random_factors, write_adapter, write_state
from tests.whole_models import write_dense_run

NEW = tuple(f"model.language_model.layers.{layer}.q_proj" for layer in range(2))
OLD = tuple(name.replace("language_model.", "") for name in NEW)


def codes(trajectory: Any, code: str) -> list[Any]:
    return [finding for finding in trajectory.findings if finding.code == code]


def test_checkpoints_before_and_after_an_upgrade_are_one_training(tmp_path: Path) -> None:
    earlier, later = random_factors(OLD, seed=1), random_factors(NEW, seed=2)
    for step, factors in ((10, earlier), (20, later)):
        write_state(write_adapter(tmp_path / f"checkpoint-{step}", factors), step)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.matrices == NEW
    assert not codes(trajectory, "OD115")
    (note,) = codes(trajectory, "OD136")
    assert (note.step, note.evidence) == (10, {"matrices": [*NEW], "called": [*OLD]})
    update, _, _ = trajectory_spectra(trajectory)
    for old, new in zip(OLD, NEW, strict=True):
        change = 2.0 * (
            later[new][0].double() @ later[new][1].double() - earlier[old][0].double() @ earlier[old][1].double()
        )
        values = update["singular_value"].sel(step=20, kind="increment", matrix=new).dropna("index").values
        torch.testing.assert_close(torch.from_numpy(values), torch.linalg.svdvals(change)[: len(values)])


def test_names_of_another_size_stay_apart(tmp_path: Path) -> None:
    write_state(write_adapter(tmp_path / "checkpoint-10", random_factors(OLD, out=14)), 10)
    write_state(write_adapter(tmp_path / "checkpoint-20", random_factors(NEW)), 20)
    assert set(open_trajectory(tmp_path).matrices) == {*OLD, *NEW}


def test_experts_that_were_single_and_are_stacked_now(tmp_path: Path) -> None:
    gate, up, down = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.randn(2, 6, 5)
    single = {
        f"layers.0.mlp.experts.{index}.{role}.weight": tensor[index].clone()
        for index in range(2)
        for role, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
    }
    stacks = {
        "layers.0.mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1) + 1,
        "layers.0.mlp.experts.down_proj": down + 1,
    }
    trajectory = open_trajectory(write_dense_run(tmp_path, {10: single, 20: stacks}))
    assert set(trajectory.matrices) == {f"{key}[{index}]" for key in stacks for index in range(2)}
    with trajectory.checkpoints[0].open() as before, trajectory.checkpoints[1].open() as after:
        for name in trajectory.matrices:
            torch.testing.assert_close(after[name] - before[name], torch.ones(tuple(after[name].shape)))


# --- several adapters ----------------------------------------------------------------------------


def write_adapters(run: Path, *, frozen: bool, names: tuple[str, str]) -> Path:
    for step in (10, 20):
        folder = run / f"checkpoint-{step}"
        for number, name in enumerate(names):
            seed = 0 if number and frozen else 10 * number + step
            write_adapter(folder / name, random_factors(NEW, seed=seed), adapter_config())
        write_state(folder, step)
    return run


@pytest.mark.parametrize(
    ("names", "frozen", "reason"),
    [
        (("policy", "reference"), False, "reference is a reference or another model, going by its name"),
        (("policy", "ref_model"), False, "ref_model is a reference or another model"),
        (("actor", "critic"), False, "critic is a reference or another model"),
        (("train", "start"), True, "start holds the same weights from step 10 to 20"),
    ],
)
def test_adapters_beside_a_reference_have_no_sum(
    names: tuple[str, str], frozen: bool, reason: str, tmp_path: Path
) -> None:
    trajectory = open_trajectory(write_adapters(tmp_path, frozen=frozen, names=names))
    assert set(trajectory.matrices) == {f"{matrix}@{adapter}" for matrix in NEW for adapter in names}
    (note,) = codes(trajectory, "OD121")
    assert reason in note.message


def test_two_trained_adapters_keep_their_sum(tmp_path: Path) -> None:
    trajectory = open_trajectory(write_adapters(tmp_path, frozen=False, names=("vision", "text")))
    assert set(NEW) < set(trajectory.matrices)
