"""Formats that are not read are named, with what makes them readable; what lies beside the weights is never silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dynamics.checkpoints import NotARun, open_trajectory
from tests.dynamics.checkpoints.test_folders import FIRST, LAST, assert_updates, products, with_code
from tests.runs import adapter_config, adapter_tensors, random_factors, write_adapter, write_run, write_state
from tests.whole_models import write_distributed, write_model

A, B = torch.randn(4, 16), torch.randn(24, 4)


def refused(run: Path) -> NotARun:
    with pytest.raises(NotARun) as raised:
        open_trajectory(run)
    return raised.value


def _deepspeed(folder: Path) -> None:
    (folder / "global_step10").mkdir(parents=True)
    torch.save({"module": {}}, folder / "global_step10" / "mp_rank_00_model_states.pt")
    (folder / "zero_to_fp32.py").write_text("")


def _deepspeed_without_script(folder: Path) -> None:
    (folder / "global_step10").mkdir(parents=True)
    torch.save({}, folder / "global_step10" / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def _verl(folder: Path) -> None:
    (folder / "actor").mkdir(parents=True)
    torch.save({}, folder / "actor" / "model_world_size_2_rank_0.pt")


def _megatron(folder: Path) -> None:
    (folder / "mp_rank_00").mkdir(parents=True)
    torch.save({}, folder / "mp_rank_00" / "model_optim_rng.pt")


def _nemo(folder: Path) -> None:
    key = "module.decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight"
    write_distributed(folder / "weights", {key: torch.ones(2, 4, 16)})


def _litgpt(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.save({"model": {"transformer.h.0.attn.qkv.lora_A": torch.ones(4, 16)}}, folder / "lit_model.pth.lora")


def _lightning(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.save({"state_dict": {}, "epoch": 1}, folder / "last.ckpt")


def _nested(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.save({"state_dict": {"q.weight": torch.ones(2, 2)}, "meta": 1}, folder / "model.pth")


def _gguf(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "ggml-lora-f16.gguf").write_bytes(b"GGUF" + bytes(60))


def _numpy(folder: Path) -> None:
    folder.mkdir(parents=True)
    np.savez(folder / "adapters.npz", **{"q.lora_a": np.zeros((4, 4), np.float32)})


FORMATS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "DeepSpeed": (
        _deepspeed,
        "OD127",
        "run `python zero_to_fp32.py . .` in checkpoint-10, which writes pytorch_model.bin",
    ),
    "DeepSpeed without its script": (_deepspeed_without_script, "OD127", "python -m deepspeed.utils.zero_to_fp32 . ."),
    "verl": (_verl, "OD127", "python -m verl.model_merger merge --backend fsdp --local_dir checkpoint-10/actor"),
    "Megatron": (_megatron, "OD127", "`swift export --to_hf true`"),
    "NeMo": (_nemo, "OD127", "llm.export_ckpt with target='hf', of an adapter 'hf-peft'"),
    "litgpt": (_litgpt, "OD127", "`litgpt convert_from_litgpt checkpoint-10 OUT/step-10`"),
    "Lightning": (_lightning, "OD127", "['state_dict'], 'checkpoint-10/pytorch_model.bin')"),
    "a state in a state": (_nested, "OD101", "['state_dict'], 'checkpoint-10/pytorch_model.bin')"),
    "GGUF": (_gguf, "OD127", "Pass the adapter or model that it was converted from"),
    "NumPy": (_numpy, "OD127", "dict(numpy.load('checkpoint-10/adapters.npz')), 'checkpoint-10/adapters.safetensors')"),
}


@pytest.mark.parametrize(("write", "code", "remedy"), FORMATS.values(), ids=FORMATS.keys())
def test_other_formats_are_named_with_their_remedy(
    write: Callable[[Path], None], code: str, remedy: str, tmp_path: Path
) -> None:
    write(tmp_path / "checkpoint-10")
    (finding,) = refused(tmp_path).findings
    assert (finding.code, finding.step) == (code, 10)
    assert remedy in finding.remedy


@pytest.mark.parametrize("write", [_litgpt, _lightning, _gguf, _numpy], ids=["litgpt", "Lightning", "GGUF", "NumPy"])
def test_a_folder_of_another_format_is_told_so(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "final")
    error = refused(tmp_path / "final")
    (finding,) = error.findings
    assert finding.code == "OD127"
    assert finding.remedy in str(error)


def test_the_step_of_a_remedy_is_that_of_the_file(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "epoch=0-step=100.ckpt")
    assert "'checkpoint-100/pytorch_model.bin'" in refused(tmp_path).findings[0].remedy


def test_remedies_that_make_a_state_readable_do(tmp_path: Path) -> None:
    """What Lightning's remedy says to do makes a run that is read; so do litgpt's conversion and NumPy's."""
    lightning, litgpt, mlx = (tmp_path / name for name in ("lightning", "litgpt", "mlx"))
    weight = {"layers.0.q.weight": torch.ones(4, 3)}
    for step in (1, 2):
        (lightning / f"checkpoint-{step}").mkdir(parents=True)
        state = {"state_dict": {key: step * tensor for key, tensor in weight.items()}}
        torch.save(state["state_dict"], lightning / f"checkpoint-{step}" / "pytorch_model.bin")
        (litgpt / f"step-{step}").mkdir(parents=True)
        torch.save({key: step * tensor for key, tensor in weight.items()}, litgpt / f"step-{step}" / "model.pth")
    mlx.mkdir()
    save_file({"q.lora_a": torch.ones(3, 1), "q.lora_b": torch.ones(1, 2)}, mlx / "adapters.safetensors")
    (mlx / "adapter_config.json").write_text('{"lora_parameters": {"scale": 20.0}}')
    for run in (lightning, litgpt):
        assert products(open_trajectory(run).checkpoints[1])["layers.0.q"].unique().tolist() == [2.0]
    assert products(open_trajectory(mlx).checkpoints[0])["q"].unique().tolist() == [20.0]


def test_the_trainer_s_state_is_no_weights(tmp_path: Path) -> None:
    write_run(tmp_path, {10: FIRST, 20: LAST})
    states = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "optimizer.bin", "scaler.pt")
    for step in (10, 20):
        for name in (*states, "random_states_0.pkl", "sampler.bin"):
            torch.save({"state": torch.ones(3, 3)}, tmp_path / f"checkpoint-{step}" / name)
        write_distributed(tmp_path / f"checkpoint-{step}" / "optimizer_0", {"state": torch.ones(3, 3)})
    trajectory = open_trajectory(tmp_path)
    assert_updates(trajectory.checkpoints[1], LAST)
    assert {finding.code for finding in trajectory.findings} == {"OD117"}


# --- weights beside those that are analysed --------------------------------------------------------


def write_llava(folder: Path, step: int, name: str = "non_lora_trainables.bin") -> Path:
    write_adapter(folder, FIRST if step == 10 else LAST)
    write_state(folder, step)
    tensors = {
        "base_model.model.model.mm_projector.0.weight": torch.full((6, 4), float(step)),
        "base_model.model.model.mm_projector.0.bias": torch.ones(6),
    }
    save_file(tensors, folder / name) if name.endswith(".safetensors") else torch.save(tensors, folder / name)
    return folder


NAMES_BESIDE = ("non_lora_trainables.bin", "mm_projector.bin", "non_lora_state_dict.bin", "vit.safetensors", "score.pt")


@pytest.mark.parametrize("name", NAMES_BESIDE)
def test_trained_weights_beside_an_adapter_are_named(name: str, tmp_path: Path) -> None:
    for step in (10, 20):
        write_llava(tmp_path / f"checkpoint-{step}", step, name)
    trajectory = open_trajectory(tmp_path)
    assert_updates(trajectory.checkpoints[1], LAST)
    (warning,) = with_code(trajectory.findings, "OD128")
    assert (warning.file, warning.severity) == (f"checkpoint-10/{name}", "warning")
    assert warning.evidence == {"matrices": ["model.mm_projector.0"], "tensors": 2, "steps": [10, 20]}
    assert "(--base)" in warning.remedy


@pytest.mark.parametrize("name", NAMES_BESIDE)
def test_trained_weights_beside_an_adapter_are_read_with_the_base(name: str, tmp_path: Path) -> None:
    for step in (10, 20):
        write_llava(tmp_path / "run" / f"checkpoint-{step}", step, name)
    write_model(tmp_path / "base", {"model.mm_projector.0.weight": torch.ones(6, 4)})
    trajectory = open_trajectory(tmp_path / "run", base=tmp_path / "base")
    assert with_code(trajectory.findings, "OD128") == []
    held = products(trajectory.checkpoints[1])
    assert held["model.mm_projector.0"].unique().tolist() == [20.0]
    assert trajectory.checkpoints[1].shapes["model.mm_projector.0"].holds == "weight"
    assert trajectory.base is not None
    assert products(trajectory.base)["model.mm_projector.0"].unique().tolist() == [1.0]
    paths = {str(entry["path"]) for entry in trajectory.checkpoints[1].inputs}
    assert paths == {"checkpoint-20/adapter_model.safetensors", f"checkpoint-20/{name}"}


def test_weights_beside_an_adapter_at_the_end_of_the_run_are_named(tmp_path: Path) -> None:
    """Also where the adapter itself is left out, since it is that of the last checkpoint."""
    write_run(tmp_path, {10: FIRST, 20: LAST})
    write_llava(tmp_path, 20)
    (warning,) = with_code(open_trajectory(tmp_path).findings, "OD128")
    assert warning.file == "non_lora_trainables.bin"


def test_a_training_of_the_projector_alone(tmp_path: Path) -> None:
    for step in (10, 20):
        write_state(tmp_path / f"checkpoint-{step}", step)
        tensors = {
            "model.mm_projector.0.weight": torch.full((6, 4), float(step)),
            "model.mm_projector.0.bias": torch.ones(6),
        }
        torch.save(tensors, tmp_path / f"checkpoint-{step}" / "mm_projector.bin")
    trajectory = open_trajectory(tmp_path)
    assert (trajectory.steps, trajectory.matrices) == ((10, 20), ("model.mm_projector.0",))
    assert products(trajectory.checkpoints[1])["model.mm_projector.0"].unique().tolist() == [20.0]


def test_copies_beside_an_adapter_are_notes(tmp_path: Path) -> None:
    write_adapter(tmp_path, FIRST)
    torch.save({"layers.0.q.lora_a.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.pt")
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "model_ema.safetensors")
    notes = with_code(open_trajectory(tmp_path).findings, "OD126")
    assert [note.file for note in notes] == ["adapter_model.pt", "model_ema.safetensors"]
    assert "in another format" in notes[0].message
    assert "an average of weights (EMA)" in notes[1].message


def test_weights_beside_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, FIRST)
    torch.save({"model": {"v_head.weight": torch.ones(1, 4)}}, tmp_path / "value_head.pt")
    (warning,) = with_code(open_trajectory(tmp_path).findings, "OD128")
    assert warning.file == "value_head.pt"
    assert "It does not hold a dictionary of tensors." in warning.message


@pytest.mark.parametrize("form", ["short", "with the adapter's name", "twice"])
def test_a_saved_module_under_each_of_its_keys(form: str, tmp_path: Path) -> None:
    head = torch.randn(20, 8)
    prefix = "base_model.model.lm_head"
    tensors = adapter_tensors(random_factors(["q"]))
    extra = {
        "short": {f"{prefix}.modules_to_save.weight": head},
        "with the adapter's name": {f"{prefix}.modules_to_save.default.weight": head},
        "twice": {
            f"{prefix}.modules_to_save.weight": head,
            f"{prefix}.weight": head.clone(),
            f"{prefix}.original_module.weight": torch.zeros(20, 8),
        },
    }[form]
    if form == "with the adapter's name":
        tensors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    write_adapter(tmp_path / "run", tensors={**tensors, **extra}, config=adapter_config())
    write_model(tmp_path / "base", {"lm_head.weight": torch.zeros(20, 8)})
    trajectory = open_trajectory(tmp_path / "run", base=tmp_path / "base")
    assert set(trajectory.matrices) == {"lm_head", "q"}
    assert torch.equal(products(trajectory.checkpoints[0])["lm_head"], head.double())


def test_layers_of_a_saved_module_stay_apart(tmp_path: Path) -> None:
    layers = {
        f"base_model.model.classifier.modules_to_save.{name}.weight": torch.ones(3, 3) for name in ("dense", "out")
    }
    write_adapter(tmp_path / "run", random_factors(["q"]), extra=layers)
    write_model(tmp_path / "base", {f"classifier.{name}.weight": torch.zeros(3, 3) for name in ("dense", "out")})
    trajectory = open_trajectory(tmp_path / "run", base=tmp_path / "base")
    assert set(trajectory.matrices) == {"classifier.dense", "classifier.out", "q"}


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_of_diffusers_needs_no_configuration(has_config: bool, tmp_path: Path) -> None:
    save_file({"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B}, tmp_path / "pytorch_lora_weights.safetensors")
    if has_config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(rank=8)))
    assert_updates(open_trajectory(tmp_path).checkpoints[0], {"unet.q": (B, A)}, scale=1.0)


# --- adapters of further trainers ------------------------------------------------------------------


def test_mistral_finetune(tmp_path: Path) -> None:
    for step in (100, 200):
        folder = tmp_path / "checkpoints" / f"checkpoint_{step:06d}" / "consolidated"
        folder.mkdir(parents=True)
        name = "layers.0.attention.wq"
        save_file({f"{name}.lora_A.weight": step * A, f"{name}.lora_B.weight": B}, folder / "lora.safetensors")
        (folder / "params.json").write_text(json.dumps({"lora": {"enable": True, "rank": 4, "scaling": 2.0}}))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (100, 200)
    assert_updates(trajectory.checkpoints[1], {"layers.0.attention.wq": (B, 200 * A)})


def test_torchtune_s_own_files(tmp_path: Path) -> None:
    for epoch in (0, 1):
        tensors = {"layers.0.attn.q_proj.lora_a.weight": (epoch + 1) * A, "layers.0.attn.q_proj.lora_b.weight": B}
        torch.save(tensors, tmp_path / f"adapter_{epoch}.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12, "peft_type": "LORA"}))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (0, 1)
    assert_updates(trajectory.checkpoints[1], {"layers.0.attn.q_proj": (B, 2 * A)}, scale=3.0)


@pytest.mark.parametrize(
    ("config", "said"),
    [(None, "there is no adapter_config.json beside it"), ({"r": 8, "lora_alpha": 8}, "gives it rank 8")],
)
def test_torchtune_without_its_scale(config: dict[str, int] | None, said: str, tmp_path: Path) -> None:
    torch.save({"q.lora_a.weight": A, "q.lora_b.weight": B}, tmp_path / "adapter_0.pt")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert said in refused(tmp_path).findings[-1].message


@pytest.mark.parametrize("keys", [(".A", ".B"), (".lora_A.default.weight", ".lora_B.default.weight")])
@pytest.mark.parametrize("size", [16, 24])
def test_mlx_vlm(keys: tuple[str, str], size: int, tmp_path: Path) -> None:
    """y + alpha (x A) B: also where the matrix is square, so that shapes do not tell what is transposed."""
    name, right = "language_model.layers.0.q_proj", torch.randn(4, 24)
    left = torch.randn(size, 4)
    save_file({f"{name}{keys[0]}": left, f"{name}{keys[1]}": right}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"rank": 4, "alpha": 0.1, "dropout": 0.0}))
    trajectory = open_trajectory(tmp_path)
    assert_updates(trajectory.checkpoints[0], {name: (right.mT, left.mT)}, scale=0.1)


def test_changes_that_are_stored_whole(tmp_path: Path) -> None:
    """ComfyUI's and LyCORIS' diff: matrices as they are; vectors by name."""
    change, kernel = torch.randn(24, 16), torch.randn(8, 4, 3, 3)
    tensors = {
        "diffusion_model.blocks.0.ffn.lora_down.weight": A,
        "diffusion_model.blocks.0.ffn.lora_up.weight": B,
        "diffusion_model.blocks.0.ffn.diff_b": torch.ones(24),
        "diffusion_model.blocks.0.norm3.diff": torch.ones(16),
        "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 16),
        "diffusion_model.head.diff": change,
        "diffusion_model.patch.diff": kernel,
    }
    save_file(tensors, tmp_path / "wan.safetensors")
    trajectory = open_trajectory(tmp_path)
    held = products(trajectory.checkpoints[0])
    assert set(held) == {f"diffusion_model.{name}" for name in ("blocks.0.ffn", "head", "patch")}
    assert torch.equal(held["diffusion_model.head"], change.double())
    assert torch.equal(held["diffusion_model.patch"], kernel.flatten(1).double())
    assert trajectory.checkpoints[0].shapes["diffusion_model.head"].holds == "update"
    (note,) = with_code(trajectory.findings, "OD109")
    assert note.evidence["counts"] == {
        "changes of biases": 1,
        "changes of modulation tables": 1,
        "changes of norms and other vectors": 1,
    }
    assert not [finding for finding in trajectory.findings if finding.severity == "error"]
