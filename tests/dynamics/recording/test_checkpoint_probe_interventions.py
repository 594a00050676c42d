"""Increments between checkpoints are taken apart as in a training, and their parts are adapters that others load."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import dynamics
from dynamics import DynamicsCallback, analyze_run, schema
from probes import Task, gradient_gram, watched_matrices
from probes.additions import added
from tests.command import analyze, assert_refused
from tests.runs import llama, trainer
from tests.updates import probe_tasks, small_llama

ARMS = ("on", "off", "random")
CHOICE = {"intervene": True, "arms": ARMS, "k": 2}


def load(folder: str):
    return PeftModel.from_pretrained(llama(), folder, is_trainable=True), probe_tasks(), 4


def of_three_groups(folder: str):
    return load(folder)[0], probe_tasks(groups=3)


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Path:
    """A training with checkpoints at 1, 2 and 3, which was intervened on at 2 and 3."""
    folder = tmp_path_factory.mktemp("captured") / "run"
    callback = DynamicsCallback(folder, probe_tasks(), at=[1], intervene=[2, 3], arms=ARMS, k=2)
    trainer(folder, [callback], small_llama(), save_strategy="steps", save_steps=1, max_steps=3).train()
    return folder


@pytest.fixture(scope="module")
def analysed(captured, tmp_path_factory) -> tuple[Path, xr.DataTree, list[tuple[str, int, int]]]:
    """Its checkpoints alone, analysed; and the progress told."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(captured, folder, ignore=shutil.ignore_patterns("dynamics"))
    told: list[tuple[str, int, int]] = []
    tree = analyze_run(
        folder, probe=load, **CHOICE, export=folder / "arms", report=False, progress=lambda *call: told.append(call)
    )
    return folder, tree, told


@pytest.fixture
def run(captured, tmp_path) -> Path:
    """Its last two checkpoints."""
    ignored = shutil.ignore_patterns("dynamics", "checkpoint-1")
    return shutil.copytree(captured, tmp_path / "run", ignore=ignored)


@pytest.fixture
def searched(analysed, monkeypatch) -> None:
    """In place of the search for critical sharpness, which takes most of the time, what it found in the first run."""
    found = analysed[1]["sharpness"].to_dataset().load().isel(step=[0])
    monkeypatch.setattr(
        "dynamics.recording.fisher.critical_sharpness", lambda *_, step, **options: found.assign_coords(step=[step])
    )


def codes(tree: xr.DataTree) -> list[str]:
    return [finding["code"] for finding in json.loads(tree.attrs["findings"])]


def test_it_tells_what_the_callback_recorded(captured, analysed):
    _, tree, _ = analysed
    schema.check(tree)
    assert "OD415" not in codes(tree)
    found, expected = (each["intervention"].to_dataset().load() for each in (tree, dynamics.open_run(captured)))
    for name in ("step", "from_step", "arm", "k", "scale", "task", "headline"):
        assert found[name].values.tolist() == expected[name].values.tolist(), name
    assert not found["recorded"].any()
    for name in ("effect", "effect_low", "effect_high", "predicted_effect", "interaction", "excess"):
        size = float(np.abs(expected["effect"]).max())
        np.testing.assert_allclose(found[name], expected[name], atol=2e-3 * size, err_msg=name)
    np.testing.assert_allclose(found["captured"], expected["captured"], rtol=1e-3)


def test_a_result_is_opened_as_it_was_made(analysed):
    folder, tree, _ = analysed
    xr.testing.assert_identical(
        dynamics.open_run(folder)["intervention"].to_dataset().load(), tree["intervention"].to_dataset()
    )
    configuration = json.loads(tree.attrs["configuration"])
    assert {name: configuration[name] for name in ("intervene", "arms", "k")} == {
        "intervene": True,
        "arms": ["full", *ARMS],
        "k": [2],
    }


def test_progress_ends(analysed):
    """Two increments of three arms and their lengths, and the last checkpoint's directions, all estimated as one."""
    told = [call[1:] for call in analysed[2] if call[0] == "run: interventions"]
    passes, of_directions = 16 * (3 + 2 + 2 * (2 * 3 + 1 + 1)), 16 * (1 + 6 + 3)
    sharpness = analysed[1]["sharpness"]
    searched = 8 * float(sharpness["passes"].sum() + sharpness["relative_passes"].sum())  # samples of a task a pass
    assert told[0] == (0, 5)
    assert told[1] == (0, 5 * passes)
    assert told[-1][0] == told[-1][1]
    assert 0 < told[-1][0] - (2 * passes + of_directions) <= 2 * searched
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_last_checkpoints_directions_are_ranked(analysed):
    folder, tree, _ = analysed
    found = tree["sensitivity"].to_dataset()
    model, tasks, _ = load(str(folder / "checkpoint-3"))
    expected = dynamics.sensitivity(model, tasks, step=3)
    xr.testing.assert_allclose(found.load(), expected, rtol=1e-5)
    ranks = json.loads((folder / "dynamics" / "analysis" / "rank_pattern_by_effect.json").read_text())
    assert set(ranks) == set(found["matrix"].values.tolist())


def test_it_tells_how_long_each_increment_may_be(analysed):
    folder, tree, _ = analysed
    found = tree["sharpness"].to_dataset().load()
    assert found["step"].values.tolist() == [2, 3]
    assert found["from_step"].values.tolist() == [1, 2]
    model, tasks, _ = load(str(folder / "checkpoint-2"))
    after = watched_matrices(load(str(folder / "checkpoint-3"))[0])
    change = {name: after[name].to_dense() - matrix.to_dense() for name, matrix in watched_matrices(model).items()}
    expected = dynamics.critical_sharpness(model, tasks, change, start=found.sel(step=[2]), step=3)
    for name in ("critical_step", "relative_sharpness"):
        np.testing.assert_allclose(found[name].sel(step=3), expected[name].sel(step=3), rtol=1e-2, err_msg=name)
    for name in ("reason", "relative_reason"):
        assert found[name].sel(step=3).values.tolist() == expected[name].sel(step=3).values.tolist()
    xr.testing.assert_identical(dynamics.open_run(folder)["sharpness"].to_dataset().load(), found)


def losses(model: nn.Module, tasks: list[Task]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([task.losses(model, batch) for task in tasks for batch in task.batches()])


@pytest.fixture(scope="module")
def by_hand(captured) -> dict[str, torch.Tensor]:
    """Losses at the weights of step 2 with each part of the next increment added, directions from all samples."""
    model, tasks, _ = load(str(captured / "checkpoint-2"))
    change = {
        name: after.to_dense() - before.to_dense()
        for (name, before), after in zip(
            watched_matrices(model).items(),
            watched_matrices(load(str(captured / "checkpoint-3"))[0]).values(),
            strict=True,
        )
    }
    gram = gradient_gram(model, tasks, update=change)
    arms = dynamics.counterfactuals(model, tasks, gram, change, arms=ARMS, k=2)
    with_arms = {}
    for arm in ("full", *ARMS):
        with added(model.eval(), arms.whole[arm]):
            with_arms[arm] = losses(model, tasks)
    return with_arms


@pytest.mark.parametrize("arm", ["full", *ARMS])
def test_an_exported_arm_is_an_adapter_with_its_losses(analysed, by_hand, arm):
    folder = analysed[0] / "arms" / arm
    model = PeftModel.from_pretrained(llama(), folder).eval()
    torch.testing.assert_close(losses(model, probe_tasks()), by_hand[arm], rtol=1e-5, atol=0)
    assert "lm_eval --model hf" in (folder / "README.md").read_text()
    base = losses(load(str(analysed[0] / "checkpoint-2"))[0].eval(), probe_tasks())
    assert not torch.allclose(by_hand[arm], base, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("searched")
def test_records_win_and_come_again(captured, tmp_path):
    """As long as the record of step 3 is away, the checkpoint's effects stand there; both are kept apart."""
    folder = shutil.copytree(captured, tmp_path / "run")
    record = folder / "dynamics" / "records" / "step-000000000003.safetensors"
    shutil.move(record, tmp_path / record.name)
    tree = analyze_run(folder, probe=load, **CHOICE, report=False)
    assert tree["intervention"]["recorded"].values.tolist() == [True, False]
    shutil.move(tmp_path / record.name, record)
    again = dynamics.open_run(folder)
    assert again["intervention"]["recorded"].values.tolist() == [True, True]
    schema.check(again)
    record.unlink()
    assert dynamics.open_run(folder)["intervention"]["recorded"].values.tolist() == [True, False]


@pytest.mark.usefixtures("searched")
def test_an_intervention_that_fails_costs_neither_k_nor_the_others(captured, tmp_path):
    folder = shutil.copytree(captured, tmp_path / "run", ignore=shutil.ignore_patterns("dynamics"))

    def fails_at_two(path):
        def loss(model, batch):
            if path.endswith("-2") and not torch.is_grad_enabled():
                raise RuntimeError("no loss today.")  # whose full stop is not doubled
            return model(**batch).logits.flatten(1).square().mean(1)

        model, tasks, batch_size = load(path)
        return model, [Task(task.name, task.samples, group="image", loss=loss) for task in tasks], batch_size

    tree = analyze_run(folder, probe=fails_at_two, **CHOICE, report=False)
    (told,) = [finding for finding in json.loads(tree.attrs["findings"]) if finding["code"] == "OD415"]
    assert (told["severity"], told["step"], told["file"]) == ("error", 2, "checkpoint-2")
    assert "The intervention on the increment since step 1 failed (RuntimeError: no loss today)." in told["message"]
    assert tree["intervention"]["step"].values.tolist() == [3]
    assert np.isfinite(tree["fisher"]["update_product"].sel(step=[2, 3])).all()
    schema.check(tree)


def test_one_checkpoint_has_no_increment(captured, tmp_path):
    shutil.copytree(captured / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    tree = analyze_run(tmp_path / "run", probe=load, intervene=True, export=tmp_path / "arms", report=False)
    assert "There is no increment to intervene on" in tree.attrs["findings"]
    assert os.listdir(tmp_path / "arms") == []


@pytest.mark.usefixtures("searched")
def test_without_the_last_checkpoint_nothing_is_exported(captured, tmp_path):
    folder = shutil.copytree(captured, tmp_path / "run", ignore=shutil.ignore_patterns("dynamics"))

    def fails_at_three(path):
        return None if path.endswith("-3") else load(path)

    tree = analyze_run(folder, probe=fails_at_three, **CHOICE, export=tmp_path / "arms", report=False)
    assert tree["intervention"]["step"].values.tolist() == [2]
    assert "No part is exported: the last checkpoint, step 3, could not be probed" in tree.attrs["findings"]


# ---- command line ----


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """The name of a function for --probe."""
    (tmp_path / "arms_probe.py").write_text(
        "from tests.dynamics.recording.test_checkpoint_probe_interventions import load, of_three_groups\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "arms_probe"
    sys.modules.pop("arms_probe", None)


@pytest.mark.usefixtures("searched")
def test_command_line(run, probe, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    command = [run, other, "--no-report", "--probe", f"{probe}:load", "--intervene", "--arms", "on, sigma_top"]
    done = analyze(*command, "--k", "2,1", "--export", tmp_path / "arms", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["runs"]) == {"run", "other"}
    files = {path.relative_to(tmp_path / "arms").as_posix() for path in (tmp_path / "arms").glob("*/*")}
    assert files == {f"{name}/{arm}" for name in ("run", "other") for arm in ("full", "on", "off", "sigma_top")}
    tree = dynamics.open_run(tmp_path / "out")
    for name in ("run", "other"):
        group = tree[f"runs/{name}/intervention"]
        assert group["arm"].values.tolist() == ["full", "on", "off", "sigma_top"]
        assert group["k"].values.tolist() == [1, 2]
        assert group["headline"].values.tolist() == [[False, True]]
    assert_refused(analyze(*command, "--export", tmp_path / "arms"), 2, "export: expected a new or empty folder, got")


@pytest.mark.usefixtures("searched")
def test_full_fine_tuning_has_no_directions_but_parts(tmp_path):
    torch.manual_seed(0)
    first, second = (llama(attention_bias=True) for _ in range(2))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    for step, model in ((1, first), (2, second)):
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")

    def whole(folder):
        return type(first).from_pretrained(folder), probe_tasks()

    choice = {"intervene": True, "arms": ["on"], "k": 2, "matrices": "up_proj|norm"}
    tree = analyze_run(tmp_path / "run", probe=whole, **choice, export=tmp_path / "arms", report=False)
    assert "OD415" not in codes(tree)
    assert "sensitivity" not in tree.children
    assert np.isfinite(tree["intervention"]["effect"]).all()
    differences = load_file(tmp_path / "arms" / "full" / "differences.safetensors")
    assert set(differences) == {"model.layers.0.mlp.up_proj.weight"} | {
        name for name, p in first.named_parameters() if "norm" in name
    }
    moved = second.get_parameter("model.layers.0.mlp.up_proj.weight") - first.get_parameter(
        "model.layers.0.mlp.up_proj.weight"
    )
    torch.testing.assert_close(differences["model.layers.0.mlp.up_proj.weight"], moved.detach())


def test_too_few_groups_are_told_by_the_exit_status(run, probe):
    failed = analyze(run, "--no-report", "--probe", f"{probe}:of_three_groups", "--intervene")
    assert_refused(failed, 1, "OD415", "ValueError: Expected at least 4 groups, half for directions and half for loss")
    tree = dynamics.open_run(run)
    assert "intervention" not in tree.children
    assert np.isfinite(tree["fisher"]["update_product"].sel(step=3)).all()
