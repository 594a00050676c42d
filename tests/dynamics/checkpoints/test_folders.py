"""Which folders are the checkpoints of a run, under the names and in the layouts of many trainers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dynamics.checkpoints import Checkpoint, NotARun, open_trajectory
from dynamics.findings import Finding
from tests.runs import NAMES, adapter_config, adapter_tensors, random_factors, write_adapter, write_run, write_state
from tests.whole_models import MATRICES, model_tensors, write_dense_run, write_distributed, write_model, write_shards

FIRST, LAST = random_factors(seed=1), random_factors(seed=2)


def products(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every matrix of a checkpoint, dense, in float64."""
    with checkpoint.open() as opened:
        return {
            name: matrix.double() if isinstance(matrix, Tensor) else matrix.to_dense()
            for name, matrix in opened.items()
        }


def assert_updates(checkpoint: Checkpoint, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float = 2.0) -> None:
    """The checkpoint holds s B A of the factors, and nothing else."""
    held = products(checkpoint)
    assert set(held) == set(factors)
    for name, (left, right) in factors.items():
        torch.testing.assert_close(held[name], scale * left.double() @ right.double(), rtol=1e-14, atol=1e-14)


def with_code(findings: Any, code: str) -> list[Finding]:
    return [finding for finding in findings if finding.code == code]


def worst(findings: Any) -> str:
    severities = {finding.severity for finding in findings}
    return next(severity for severity in ("error", "warning", "note") if severity in severities)


# --- names of steps ------------------------------------------------------------------------------

#: Layout → path of the adapter at step 10 or 20, the steps that are read, as the trainer named writes them.
LAYOUTS: dict[str, tuple[Callable[[int], str], tuple[int, int]]] = {
    "transformers": (lambda step: f"checkpoint-{step}", (10, 20)),
    "accelerate": (lambda step: f"step_{step}", (10, 20)),
    "accelerate, in a folder of its own": (lambda step: f"checkpoints/checkpoint_{step}", (10, 20)),
    "litgpt's names": (lambda step: f"step-{step:06d}", (10, 20)),
    "torchtune": (lambda step: f"epoch_{step // 10}", (1, 2)),
    "epochs with a hyphen": (lambda step: f"epoch-{step // 10}", (1, 2)),
    "epochs without a separator": (lambda step: f"20250101_10-00-00/epoch{step // 10}", (1, 2)),
    "steps without a separator": (lambda step: f"step{step}", (10, 20)),
    "Megatron-SWIFT": (lambda step: f"iter_{step:07d}", (10, 20)),
    "verl": (lambda step: f"global_step_{step}/actor/lora_adapter", (10, 20)),
    "SkyRL": (lambda step: f"global_step_{step}/policy/adapter", (10, 20)),
    "NeMo AutoModel": (lambda step: f"epoch_0_step_{step}/model", (10, 20)),
    "Composer": (lambda step: f"ep0-ba{step}", (10, 20)),
    "AReaL": (lambda step: f"epoch0epochstep{step}globalstep{step}", (10, 20)),
    "Lightning's names": (lambda step: f"checkpoints/epoch={step // 10}-step={step}", (10, 20)),
    "a metric in the name": (lambda step: f"step={step}-val_loss=0.{step}", (10, 20)),
    "the unit after the number": (lambda step: f"checkpoint-{step}step", (10, 20)),
    "a model's word": (lambda step: f"model-step-{step}", (10, 20)),
    "ms-swift, one level": (lambda step: f"v0-20250101-101010/checkpoint-{step}", (10, 20)),
    "ms-swift, two levels": (lambda step: f"Qwen2.5-7B-Instruct/v0-20250101-101010/checkpoint-{step}", (10, 20)),
    "a seed": (lambda step: f"run/seed1/checkpoint-{step}", (10, 20)),
    "an adapter below its step": (lambda step: f"checkpoints/step_{step}/adapter", (10, 20)),
    "bare numbers": (lambda step: f"checkpoints/{step:06d}", (10, 20)),
    "a training's name": (lambda step: f"imax_step_{step}", (10, 20)),
}


@pytest.mark.parametrize(("folder", "steps"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_steps_have_many_names(folder: Callable[[int], str], steps: tuple[int, int], tmp_path: Path) -> None:
    write_adapter(tmp_path / folder(10), FIRST)
    write_adapter(tmp_path / folder(20), LAST)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == steps
    assert_updates(trajectory.checkpoints[0], FIRST)
    assert_updates(trajectory.checkpoints[1], LAST)
    assert worst(trajectory.findings) == "note"
    assert {checkpoint.segment for checkpoint in trajectory.checkpoints} == {0}


def test_the_folder_of_the_steps_may_be_passed_itself(tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoints" / "000010", FIRST)
    write_adapter(tmp_path / "checkpoints" / "000020", LAST)
    assert open_trajectory(tmp_path / "checkpoints").steps == (10, 20)


def test_where_checkpoints_lie_below_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "v0-20250101" / "inner", (10, 20))
    (note,) = with_code(open_trajectory(tmp_path).findings, "OD125")
    assert note.message == "The checkpoints are read from v0-20250101/inner/."


def test_epochs_are_said_to_be_counted(tmp_path: Path) -> None:
    write_adapter(tmp_path / "epoch_0", FIRST)
    write_adapter(tmp_path / "epoch_1", LAST)
    notes = [finding.message for finding in with_code(open_trajectory(tmp_path).findings, "OD121")]
    assert notes == ["Steps are the epochs in the folder names (epoch_N, where N is the epoch)."]


@pytest.mark.parametrize("inner", ["", "actor/lora_adapter"])
def test_one_checkpoint_takes_the_step_of_the_folder_around_it(inner: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "global_step_30" / inner, FIRST)
    assert open_trajectory(folder).steps == (30,)


@pytest.mark.parametrize("names", [("imax_step_10", "dmax_step_10"), ("r8-step-10", "r16-step-10")])
def test_steps_of_several_trainings_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        write_adapter(tmp_path / name, FIRST)
    with pytest.raises(
        NotARun, match=r"holds checkpoints of 2 trainings, going by their names: .*Put the folders of each"
    ):
        open_trajectory(tmp_path)


def test_several_runs_below_are_named(tmp_path: Path) -> None:
    for version in ("v0", "v1"):
        write_run(tmp_path / "model" / version, (10, 20))
    with pytest.raises(NotARun, match=r"Pass one of the runs inside it: model/v0, model/v1\.$"):
        open_trajectory(tmp_path)


def test_runs_three_levels_below_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "team" / "model" / "v0", (10, 20))
    with pytest.raises(NotARun, match=r"Pass one of the runs inside it: team/model/v0\.$"):
        open_trajectory(tmp_path)


@pytest.mark.parametrize("name", ["epochs_3", "llama-3-8b", "checkpoint-0.5", "seed1", "steps_100"])
def test_names_that_tell_no_step(name: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / name, FIRST)
    with pytest.raises(NotARun, match="Pass that subfolder"):
        open_trajectory(tmp_path)


def test_names_of_the_trainer_go_first_and_the_rest_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, (10, 20))
    write_adapter(tmp_path / "epoch_1", FIRST)
    write_model(tmp_path / "checkpoint-20-merged")
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    (note,) = with_code(trajectory.findings, "OD126")
    assert note.evidence == {"folders": ["checkpoint-20-merged", "epoch_1"]}
    assert note.message == (
        "The checkpoints of this run are named checkpoint-N. Left out: checkpoint-20-merged, epoch_1."
    )


def test_the_last_step_under_two_names(tmp_path: Path) -> None:
    write_adapter(tmp_path / "step=10", FIRST)
    write_adapter(tmp_path / "step=20", LAST)
    write_adapter(tmp_path / "step=20-last", LAST)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    assert [finding.file for finding in with_code(trajectory.findings, "OD111")] == ["step=20-last"]


@pytest.mark.parametrize("target", ["elsewhere", "run"])
def test_a_link_between_the_run_and_its_steps_is_not_followed(target: str, tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere", (10, 20))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "inner").symlink_to(tmp_path / target)
    with pytest.raises(NotARun, match="No checkpoints in"):
        open_trajectory(tmp_path / "run")


def test_a_link_from_a_step_to_its_weights_is_not_followed(tmp_path: Path) -> None:
    write_adapter(tmp_path / "elsewhere" / "lora_adapter", FIRST)
    (tmp_path / "run" / "global_step_10").mkdir(parents=True)
    (tmp_path / "run" / "global_step_10" / "actor").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotARun):
        open_trajectory(tmp_path / "run")


# --- a folder is what its weights are ------------------------------------------------------------


@pytest.mark.parametrize("style", ["safetensors", "bin", "sharded", "sharded bin", "distributed"])
def test_a_stray_configuration_makes_no_adapter(style: str, tmp_path: Path) -> None:
    run = write_dense_run(tmp_path, (10, 20), style)
    for step in (10, 20):
        (run / f"checkpoint-{step}" / "adapter_config.json").write_text(json.dumps(adapter_config()))
    trajectory = open_trajectory(run)
    assert (trajectory.steps, trajectory.matrices) == ((10, 20), MATRICES)
    assert worst(trajectory.findings) == "note"
    assert "the weights beside it are a model, not an adapter" in with_code(trajectory.findings, "OD125")[0].message


@pytest.mark.parametrize("has_state", [False, True])
def test_a_merged_model_beside_checkpoints_of_adapters(has_state: bool, tmp_path: Path) -> None:
    write_run(tmp_path, {10: FIRST, 20: LAST})
    write_model(tmp_path, style="sharded")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config()))
    if has_state:
        write_state(tmp_path, 25)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    assert_updates(trajectory.checkpoints[1], LAST)
    assert worst(trajectory.findings) == "note"
    (note,) = with_code(trajectory.findings, "OD110")
    assert note.message == (
        "The model saved beside the checkpoints is left out: it is a whole model, the checkpoints are adapters."
    )


@pytest.mark.parametrize("config_in", ["run", "checkpoint"])
@pytest.mark.parametrize(
    "style", ["distributed", "gathered", "sharded", "sharded as a model", "with the adapter's name"]
)
def test_weights_that_are_all_of_an_adapter_are_one(style: str, config_in: str, tmp_path: Path) -> None:
    for step, factors in ((10, FIRST), (20, LAST)):
        folder = tmp_path / f"checkpoint-{step}"
        write_state(folder, step)
        tensors = adapter_tensors(factors)
        if style == "distributed":
            write_distributed(folder / "pytorch_model_fsdp_0", {"model": tensors})
        elif style == "gathered":
            torch.save(tensors, folder / "pytorch_model_fsdp.bin")
        elif style == "with the adapter's name":
            named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
            torch.save(named, folder / "pytorch_model.bin")
        else:
            index = write_shards(folder, tensors)
            if style == "sharded":
                index.rename(folder / "adapter_model.safetensors.index.json")
        config = tmp_path if config_in == "run" else folder
        (config / "adapter_config.json").write_text(json.dumps(adapter_config()))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    assert_updates(trajectory.checkpoints[0], FIRST)
    assert_updates(trajectory.checkpoints[1], LAST)
    assert worst(trajectory.findings) == "note"


def test_a_whole_state_with_its_adapter_gives_the_adapter(tmp_path: Path) -> None:
    """As zero_to_fp32 and FSDP's full state write it: base layers, factors, saved modules and their originals."""
    base, head = model_tensors(), torch.randn(20, 8, dtype=torch.float64)
    write_model(tmp_path / "base", base)
    target = "model.layers.0.self_attn.q_proj"
    factors = random_factors([target], out=8, in_=8)
    for step in (10, 20):
        state = {f"base_model.model.{key}": tensor for key, tensor in base.items() if target not in key}
        state |= {key.replace(".weight", ".default.weight"): t for key, t in adapter_tensors(factors).items()}
        state[f"base_model.model.{target}.base_layer.weight"] = base[f"{target}.weight"]
        state["base_model.model.lm_head.original_module.weight"] = state.pop("base_model.model.lm_head.weight")
        state["base_model.model.lm_head.modules_to_save.default.weight"] = (step * head).float()
        folder = tmp_path / "run" / f"checkpoint-{step}"
        empty = {key: torch.zeros(0) for key in adapter_tensors(factors)}
        write_adapter(folder, tensors=empty, config=adapter_config())
        torch.save(state, folder / "pytorch_model.bin")
    trajectory = open_trajectory(tmp_path / "run", base=tmp_path / "base")
    assert trajectory.steps == (10, 20)
    held = products(trajectory.checkpoints[1])
    assert set(held) == {target, "lm_head"}
    left, right = factors[target]
    torch.testing.assert_close(held[target], 2 * left.double() @ right.double(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(held["lm_head"], (20 * head).float().double(), rtol=0, atol=0)
    assert worst(trajectory.findings) == "note"
    assert "pytorch_model.bin beside it was read instead" in with_code(trajectory.findings, "OD126")[0].message
    frozen = [note.message for note in with_code(trajectory.findings, "OD121")]
    assert frozen == ["The file holds the whole model: 8 tensors beside the adapter are assumed to be frozen."]


def test_a_damaged_adapter_is_not_replaced_by_a_merged_model(tmp_path: Path) -> None:
    write_run(tmp_path, (10, 20, 30))
    write_model(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-20" / "adapter_model.safetensors").write_bytes(b"")
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 30)
    assert [finding.step for finding in with_code(trajectory.findings, "OD101")] == [20]


def test_an_adapter_and_a_model_in_one_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path, {10: FIRST, 20: LAST})
    names = {f"{name}.weight": torch.ones(12, 10) for name in NAMES}
    for step in (10, 20):
        write_model(tmp_path / f"checkpoint-{step}", names)
    trajectory = open_trajectory(tmp_path)
    assert_updates(trajectory.checkpoints[1], LAST)
    (note,) = with_code(trajectory.findings, "OD126")
    assert (note.file, note.evidence["steps"]) == ("checkpoint-10/model.safetensors", [10, 20])


def test_the_adapter_of_the_run_where_no_checkpoint_can_be_read(tmp_path: Path) -> None:
    write_adapter(tmp_path, LAST)
    write_state(tmp_path, 25)
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}" / f"global_step{step}"
        folder.mkdir(parents=True)
        torch.save({}, folder / "mp_rank_00_model_states.pt")
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (25,)
    assert_updates(trajectory.checkpoints[0], LAST)
    assert {finding.step for finding in with_code(trajectory.findings, "OD127")} == {10, 20}


# --- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [10, 20, 30])
def test_a_configuration_that_others_have_is_missed(missing: int, tmp_path: Path) -> None:
    """An error also where the run's folder has one: the training wrote one for each checkpoint."""
    write_run(tmp_path, (10, 20, 30), states=False)
    (tmp_path / f"checkpoint-{missing}" / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config()))
    trajectory = open_trajectory(tmp_path)
    assert missing not in trajectory.steps
    assert [finding.step for finding in with_code(trajectory.findings, "OD102")] == [missing]


@pytest.mark.parametrize(("age", "code"), [(0, "OD118"), (7200, "OD102")])
def test_only_what_was_written_lately_may_be_unfinished(age: int, code: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    folder = tmp_path / "checkpoint-30"
    (folder / "adapter_config.json").unlink()
    (folder / "trainer_state.json").unlink()
    os.utime(folder, (time.time() - age, time.time() - age))
    (finding,) = with_code(open_trajectory(tmp_path).findings, code)
    assert finding.step == 30


# --- weights below a checkpoint ------------------------------------------------------------------


@pytest.mark.parametrize("component", ["unet", "transformer", "controlnet", "prior"])
def test_the_trained_component_of_a_pipeline(component: str, tmp_path: Path) -> None:
    weights = {step: {"conv_in.weight": torch.full((8, 4, 3, 3), float(step))} for step in (500, 1000)}
    for step, tensors in weights.items():
        for folder in (component, f"{component}_ema", "vae"):
            (tmp_path / f"checkpoint-{step}" / folder).mkdir(parents=True)
            held = tensors if folder == component else {"conv_in.weight": torch.zeros(8, 4, 3, 3)}
            save_file(held, tmp_path / f"checkpoint-{step}" / folder / "diffusion_pytorch_model.safetensors")
    (tmp_path / "vae").mkdir()
    save_file({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    trajectory = open_trajectory(tmp_path)
    assert (trajectory.steps, trajectory.matrices) == ((500, 1000), ("conv_in",))
    assert torch.equal(products(trajectory.checkpoints[1])["conv_in"], torch.full((8, 36), 1000.0, dtype=torch.float64))
    folders = [finding.evidence["folders"] for finding in with_code(trajectory.findings, "OD126")]
    assert folders == [["vae"], [f"{component}_ema", "vae"]]


def test_adapters_of_two_parts_of_a_pipeline_have_no_sum(tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoint-10" / "unet", random_factors(["q"], seed=1))
    write_adapter(tmp_path / "checkpoint-10" / "text_encoder", random_factors(["q"], seed=2))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.matrices == ("q@text_encoder", "q@unet")
    assert "one part of the pipeline" in with_code(trajectory.findings, "OD121")[0].message


def test_an_actor_beside_its_critic(tmp_path: Path) -> None:
    for step, factors in ((10, FIRST), (20, LAST)):
        write_adapter(tmp_path / f"global_step_{step}" / "actor" / "lora_adapter", factors)
        write_adapter(tmp_path / f"global_step_{step}" / "critic" / "lora_adapter", random_factors(seed=9))
    trajectory = open_trajectory(tmp_path)
    assert_updates(trajectory.checkpoints[1], LAST)
    (note,) = with_code(trajectory.findings, "OD126")
    assert note.evidence == {"folders": ["critic/lora_adapter"], "steps": [10, 20]}


def test_weights_in_the_run_beside_a_folder_of_its_checkpoints_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoints" / "step_10", FIRST)
    write_adapter(tmp_path / "checkpoints" / "step_20", LAST)
    write_adapter(tmp_path, LAST)
    write_adapter(tmp_path / "final", LAST)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    assert [finding.message for finding in with_code(trajectory.findings, "OD126")] == [
        "Other weights beside the checkpoints are left out: final.",
        "Other weights in the run's folder are left out: adapter_model.safetensors.",
    ]


@pytest.mark.parametrize("name", ["final", "best_model", "last"])
def test_weights_beside_the_checkpoints_are_named(name: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "step-10", FIRST)
    write_adapter(tmp_path / "step-20", LAST)
    write_adapter(tmp_path / name, LAST)
    (note,) = with_code(open_trajectory(tmp_path).findings, "OD126")
    assert note.message == f"Other weights beside the checkpoints are left out: {name}."


def test_torchtitan(tmp_path: Path) -> None:
    weights = {step: {"layers.0.wq.weight": torch.full((6, 4), float(step))} for step in (10, 20)}
    for step, tensors in weights.items():
        state = {**tensors, "optimizer.state.layers.0.wq.weight.exp_avg": torch.zeros(6, 4)}
        write_distributed(tmp_path / "checkpoint" / f"step-{step}", state)
    trajectory = open_trajectory(tmp_path)
    assert (trajectory.steps, trajectory.matrices) == ((10, 20), ("layers.0.wq",))
    assert torch.equal(products(trajectory.checkpoints[1])["layers.0.wq"], torch.full((6, 4), 20.0).double())
