"""Formats that are not read are named, with what makes them readable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dynamics.checkpoints import NotARun, open_trajectory
from tests.dynamics.checkpoints.test_folders import products
from tests.whole_models import write_distributed

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
    "GGUF": (_gguf, "OD127", "Pass the adapter or model it was converted from"),
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
