"""Adapter files of other libraries: the update that their own formula gives, or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dynamics.checkpoints import NotARun, Trajectory, open_trajectory
from probes.low_rank import LowRankMatrix
from tests.dynamics.checkpoints import foreign_twins as twins
from tests.dynamics.checkpoints.test_folders import products, with_code


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def opened(folder: Path, tensors: dict[str, Tensor]) -> Trajectory:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "lora.safetensors")
    return open_trajectory(folder)


FILES: dict[str, dict[str, Tensor]] = {
    "kohya": {
        "lora_unet_q.lora_down.weight": random(4, 10),
        "lora_unet_q.lora_up.weight": random(6, 4),
        "lora_unet_q.alpha": torch.tensor(3.0),
    },
    "kohya, no alpha": {"lora_te_q.lora_down.weight": random(4, 10), "lora_te_q.lora_up.weight": random(6, 4)},
    "kohya, kernel": {
        "lora_unet_conv.lora_down.weight": random(4, 5, 3, 3),
        "lora_unet_conv.lora_up.weight": random(6, 4, 1, 1),
        "lora_unet_conv.alpha": torch.tensor(1.0),
    },
    "LoCon with a middle": {
        "lora_unet_conv.lora_down.weight": random(4, 5, 1, 1),
        "lora_unet_conv.lora_mid.weight": random(4, 4, 3, 3),
        "lora_unet_conv.lora_up.weight": random(6, 4, 1, 1),
        "lora_unet_conv.alpha": torch.tensor(2.0),
    },
    "diffusers": {
        "transformer.h.0.to_q.lora_A.weight": random(4, 10),
        "transformer.h.0.to_q.lora_B.weight": random(6, 4),
    },
    "diffusers, old": {
        "unet.mid.processor.to_q_lora.down.weight": random(4, 10),
        "unet.mid.processor.to_q_lora.up.weight": random(6, 4),
    },
    "cloneofsimo": {
        "unet:0:down": random(4, 10),
        "unet:0:up": random(6, 4),
        "unet:1:down": random(2, 3),
        "unet:1:up": random(5, 2),
    },
    "xlabs": {
        "double_blocks.0.processor.qkv_lora1.down.weight": random(4, 10),
        "double_blocks.0.processor.qkv_lora1.up.weight": random(6, 4),
        "double_blocks.0.processor.qkv_lora2.down.weight": random(4, 10),
        "double_blocks.0.processor.qkv_lora2.up.weight": random(6, 4),
    },
    "LoHa": {
        "lora_unet_q.hada_w1_a": random(6, 2),
        "lora_unet_q.hada_w1_b": random(2, 10),
        "lora_unet_q.hada_w2_a": random(6, 2),
        "lora_unet_q.hada_w2_b": random(2, 10),
        "lora_unet_q.alpha": torch.tensor(3.0),
    },
    "LoKr, both whole": {
        "lora_unet_q.lokr_w1": random(2, 3),
        "lora_unet_q.lokr_w2": random(4, 5),
        "lora_unet_q.alpha": torch.tensor(1e10),
    },
    "LoKr, second factored": {
        "lora_unet_q.lokr_w1": random(3, 2),
        "lora_unet_q.lokr_w2_a": random(4, 2),
        "lora_unet_q.lokr_w2_b": random(2, 5),
        "lora_unet_q.alpha": torch.tensor(3.0),
    },
    "LoKr, both factored": {
        "lora_unet_q.lokr_w1_a": random(4, 3),
        "lora_unet_q.lokr_w1_b": random(3, 3),
        "lora_unet_q.lokr_w2_a": random(4, 2),
        "lora_unet_q.lokr_w2_b": random(2, 5),
        "lora_unet_q.alpha": torch.tensor(3.0),
    },
    "LoKr, kernel": {"lora_unet_c.lokr_w1": random(2, 3), "lora_unet_c.lokr_w2": random(4, 5, 3, 3)},
    "LoKr, Tucker": {
        "lora_unet_c.lokr_w1": random(2, 3),
        "lora_unet_c.lokr_t2": random(2, 3, 3, 3),
        "lora_unet_c.lokr_w2_a": random(2, 7),
        "lora_unet_c.lokr_w2_b": random(3, 5),
        "lora_unet_c.alpha": torch.tensor(3.0),
    },
}


@pytest.mark.parametrize("tensors", FILES.values(), ids=FILES.keys())
def test_the_update_is_that_of_the_librarys_formula(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    trajectory = opened(tmp_path, tensors)
    expected = {name: twins.update(parts) for name, parts in twins.modules(tensors).items()}
    assert not [finding for finding in trajectory.findings if finding.severity == "error"]
    with trajectory.checkpoints[0].open() as matrices:
        assert set(matrices) == set(expected)
        for name, matrix in matrices.items():
            assert isinstance(matrix, LowRankMatrix)
            assert matrix.shape == expected[name].shape
            torch.testing.assert_close(matrix.to_dense(), expected[name], rtol=1e-12, atol=1e-12)


def test_factors_that_are_stored_stay_as_they_are(tmp_path: Path) -> None:
    stored = {key: tensor.half() for key, tensor in FILES["kohya"].items()}
    with opened(tmp_path, stored).checkpoints[0].open() as matrices:
        matrix = matrices["lora_unet_q"]
        assert isinstance(matrix, LowRankMatrix)
        assert torch.equal(matrix.right_factor, stored["lora_unet_q.lora_down.weight"])
        assert (matrix.dtype, matrix.scale) == (torch.float16, 0.75)


@pytest.mark.parametrize(("file", "notes"), [("kohya", 0), ("kohya, no alpha", 1), ("LoHa", 1), ("diffusers", 1)])
def test_what_a_reader_must_know_is_said(file: str, notes: int, tmp_path: Path, codes: Any) -> None:
    assert codes(opened(tmp_path, FILES[file]).findings).count("OD121") == notes


REFUSED: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "DoRA": ({"lora_unet_v.dora_scale": torch.ones(6, 1)}, "OD105", "It has a DoRA magnitude"),
    "one factor": ({"lora_unet_v.lora_down.weight": random(4, 10)}, "OD104", "It has only down, one factor of two."),
    "packed": (
        {
            "lora_unet_v.lora_down.weight": torch.ones(4, 10, dtype=torch.uint8),
            "lora_unet_v.lora_up.weight": random(6, 4),
        },
        "OD103",
        "Its down is stored as U8",
    ),
    "not multiplying": (
        {"lora_unet_v.lora_down.weight": random(4, 10), "lora_unet_v.lora_up.weight": random(6, 3)},
        "OD104",
        "Its factors do not multiply: down [4, 10], up [6, 3].",
    ),
    "vectors": (
        {"lora_unet_v.lora_down.weight": random(4), "lora_unet_v.lora_up.weight": random(6, 3)},
        "OD104",
        "Its factors have shapes down [4], up [6, 3]: no matrices.",
    ),
    "alpha of two": (
        {
            "lora_unet_v.lora_down.weight": random(4, 10),
            "lora_unet_v.lora_up.weight": random(6, 4),
            "lora_unet_v.alpha": torch.ones(2),
        },
        "OD104",
        "Its alpha has shape [2], not one number.",
    ),
    "half a LoKr": ({"lora_unet_v.lokr_w1": random(2, 3)}, "OD103", "It has lokr_w1: no factorisation"),
    "LoHa, Tucker": (
        {f"lora_unet_v.hada_{part}": random(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        "OD103",
        "no factorisation that is analysed",
    ),
    "LoHa of two sizes": (
        {
            "lora_unet_v.hada_w1_a": random(6, 2),
            "lora_unet_v.hada_w1_b": random(2, 10),
            "lora_unet_v.hada_w2_a": random(6, 2),
            "lora_unet_v.hada_w2_b": random(2, 9),
        },
        "OD104",
        "Its factors do not multiply",
    ),
    "a whole difference and a factor": (
        {"lora_unet_v.diff": random(6, 10), "lora_unet_v.lora_up.weight": random(6, 2)},
        "OD104",
        "It has only diff, up, one factor of two",
    ),
}


@pytest.mark.parametrize(("tensors", "code", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_costs_one_matrix(tensors: dict[str, Tensor], code: str, said: str, tmp_path: Path) -> None:
    trajectory = opened(tmp_path, {**FILES["kohya"], **tensors})
    (error,) = [finding for finding in trajectory.findings if finding.severity == "error"]
    assert (error.code, error.matrix) == (code, "lora_unet_v")
    assert said in error.message
    assert trajectory.matrices == ("lora_unet_q",)


def test_a_part_that_occurs_twice(tmp_path: Path) -> None:
    twice = {"lora_unet_q.lora_A.weight": random(4, 10)}
    with pytest.raises(NotARun, match="One of its parts occurs twice"):
        opened(tmp_path, {**FILES["kohya"], **twice})


def test_other_tensors_are_listed(tmp_path: Path) -> None:
    trajectory = opened(tmp_path, {**FILES["cloneofsimo"], "<s1>": torch.ones(5)})
    (note,) = [finding for finding in trajectory.findings if finding.code == "OD109"]
    assert note.evidence["examples"] == ["<s1>"]


def test_changes_that_are_stored_whole(tmp_path: Path) -> None:
    """ComfyUI's and LyCORIS' diff: matrices as they are; vectors by name."""
    down, up = random(4, 16), random(24, 4)
    change, kernel = torch.randn(24, 16), torch.randn(8, 4, 3, 3)
    tensors = {
        "diffusion_model.blocks.0.ffn.lora_down.weight": down,
        "diffusion_model.blocks.0.ffn.lora_up.weight": up,
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
