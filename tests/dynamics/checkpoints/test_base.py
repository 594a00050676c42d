"""The weights before training: under the names of the run, and what they lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamics.checkpoints import NotARun, open_trajectory
from dynamics.checkpoints.alignment import aligned
from tests.runs import NAMES, adapter_config, random_factors, write_adapter, write_run
from tests.whole_models import MATRICES, model_tensors, write_dense_run, write_model

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("style", ["safetensors", "bin", "sharded", "distributed"])
def test_every_format_can_be_a_base(style: str, tmp_path: Path, codes: Any) -> None:
    before = model_tensors(seed=1)
    trajectory = open_trajectory(write_dense_run(tmp_path / "run"), base=write_model(tmp_path / "base", before, style))
    assert trajectory.base is not None
    assert (trajectory.base.step, tuple(trajectory.base.shapes)) == (0, MATRICES)
    assert all(trajectory.start_of(one) is trajectory.base for one in trajectory.checkpoints)
    with trajectory.base.open() as matrices:
        assert all(torch.equal(matrices[name], before[f"{name}.weight"]) for name in MATRICES)
    assert codes(trajectory.findings) == ["OD109", "OD123"]
    assert trajectory.findings[-1].message == "Updates of dense weights are counted from the base 'base'."
    assert trajectory.base.inputs
    assert set(trajectory.base.inputs[0]) == {"path", "bytes", "header_sha256"}


def test_a_base_may_be_in_another_format_and_dtype(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", model_tensors(dtype=torch.bfloat16), "sharded bin")
    trajectory = open_trajectory(write_dense_run(tmp_path / "run", style="distributed"), base=base)
    assert trajectory.base is not None
    assert {shape.dtype for shape in trajectory.base.shapes.values()} == {"BF16"}
    assert {shape.dtype for shape in trajectory.checkpoints[0].shapes.values()} == {"F32"}


def test_a_single_checkpoint_with_a_base_is_a_run(tmp_path: Path) -> None:
    run = write_model(tmp_path / "final", model_tensors(seed=3))
    trajectory = open_trajectory(run, base=write_model(tmp_path / "base"))
    assert trajectory.steps == (0,)
    assert trajectory.start_of(trajectory.checkpoints[0]) is trajectory.base


def test_what_the_base_lacks_is_named(tmp_path: Path) -> None:
    before = model_tensors()
    del before["lm_head.weight"]
    before["model.embed_tokens.weight"] = torch.zeros(19, 8)
    trajectory = open_trajectory(write_dense_run(tmp_path / "run"), base=write_model(tmp_path / "base", before))
    missing, resized = [finding for finding in trajectory.findings if finding.code == "OD124"]
    assert (missing.severity, missing.matrix) == ("warning", "lm_head")
    assert missing.message.startswith("The base has no lm_head. Only updates between checkpoints are analysed, not")
    assert resized.matrix == "model.embed_tokens"
    assert "model.embed_tokens is (19, 8) in the base and (20, 8) in the run" in resized.message
    assert trajectory.base is not None
    assert tuple(trajectory.base.shapes) == MATRICES[2:]
    assert trajectory.matrices == MATRICES


def test_a_dense_weight_is_never_turned(tmp_path: Path) -> None:
    """A base that holds the transpose is another model, not another orientation."""
    before = model_tensors()
    before["model.embed_tokens.weight"] = torch.zeros(8, 20)
    trajectory = open_trajectory(write_dense_run(tmp_path / "run"), base=write_model(tmp_path / "base", before))
    assert "model.embed_tokens" not in (trajectory.base.shapes if trajectory.base else ())


@pytest.mark.parametrize(
    ("names", "base_names", "pairs"),
    [
        (["a.q", "a.v"], ["a.q", "a.v"], {"a.q": "a.q", "a.v": "a.v"}),
        (["t.h.0.q", "score"], ["h.0.q", "h.1.q"], {"t.h.0.q": "h.0.q"}),
        (["h.0.q", "h.1.q"], ["t.h.0.q", "lm_head"], {"h.0.q": "t.h.0.q"}),
        (["a.q@x", "a.q@y"], ["a.q"], {"a.q@x": "a.q", "a.q@y": "a.q"}),
        (["a.q"], ["b.v"], {}),
        ([], [], {}),
    ],
)
def test_names_of_base_and_run(names: list[str], base_names: list[str], pairs: dict[str, str]) -> None:
    sizes = dict.fromkeys(base_names, (4, 3))
    assert aligned(dict.fromkeys(names, (4, 3)), sizes) == pairs


# --- adapters ------------------------------------------------------------------------------------


def adapted(folder: Path, **weights: torch.Tensor) -> Path:
    """A base of the matrices that the adapters of ``tests.runs`` change, (12, 10) each."""
    generator = torch.Generator().manual_seed(5)
    tensors = {f"{name}.weight": torch.randn(12, 10, generator=generator) for name in NAMES}
    return write_model(folder, {**tensors, **weights})


def test_adapters_have_their_base_weights_too(tmp_path: Path, codes: Any) -> None:
    trajectory = open_trajectory(write_run(tmp_path / "run"), base=adapted(tmp_path / "base"))
    assert trajectory.base is not None
    assert set(trajectory.base.shapes) == set(NAMES)
    assert {shape.holds for shape in trajectory.checkpoints[0].shapes.values()} == {"update"}
    assert codes(trajectory.findings) == []


def test_a_transposed_base_of_an_adapter_is_turned(tmp_path: Path) -> None:
    stored = torch.randn(10, 12)
    base = adapted(tmp_path / "base", **{f"{Q}.weight": stored})
    trajectory = open_trajectory(write_run(tmp_path / "run"), base=base)
    assert trajectory.base is not None
    with trajectory.base.open() as matrices:
        assert torch.equal(matrices[Q], stored.T)


@pytest.mark.parametrize("transposed", [True, False])
def test_a_square_base_is_turned_where_the_adapter_says_so(transposed: bool, tmp_path: Path) -> None:
    stored = torch.randn(6, 6)
    factors = random_factors((Q,), out=6, in_=6)
    run = write_adapter(tmp_path / "run", factors, adapter_config(fan_in_fan_out=transposed))
    trajectory = open_trajectory(run, base=write_model(tmp_path / "base", {f"{Q}.weight": stored}))
    assert trajectory.base is not None
    with trajectory.base.open() as matrices:
        assert torch.equal(matrices[Q], stored.T if transposed else stored)


SAVED = {
    "base_model.model.classifier.modules_to_save.dense.weight": torch.full((5, 5), 2.0),
    "base_model.model.classifier.original_module.dense.weight": torch.zeros(5, 5),
    "base_model.model.score.weight": torch.full((3, 5), 3.0),
    "base_model.model.score.bias": torch.zeros(3),
    f"base_model.model.{Q}.base_layer.weight": torch.zeros(12, 10),
}


def test_saved_modules_are_dense_matrices_with_a_base(tmp_path: Path) -> None:
    run = write_adapter(tmp_path / "run", extra=SAVED)
    base = adapted(tmp_path / "base", **{"classifier.dense.weight": torch.ones(5, 5)})
    trajectory = open_trajectory(run, base=base)
    assert set(trajectory.matrices) == {*NAMES, "classifier.dense", "score"}
    shape = trajectory.checkpoints[0].shapes["score"]
    assert (shape.out, shape.in_, shape.rank, shape.holds) == (3, 5, 0, "weight")
    with trajectory.checkpoints[0].open() as matrices:
        assert torch.equal(matrices["score"], torch.full((3, 5), 3.0))
        assert torch.equal(matrices["classifier.dense"], torch.full((5, 5), 2.0))
    lacking, listed = ([one for one in trajectory.findings if one.code == code] for code in ("OD124", "OD109"))
    assert [one.matrix for one in lacking] == ["score"]
    assert listed[0].evidence["counts"] == {"bias": 1, "modules_to_save": 1, "saved weights": 1}


def test_saved_modules_are_listed_without_a_base(tmp_path: Path) -> None:
    trajectory = open_trajectory(write_adapter(tmp_path / "run", extra=SAVED))
    assert set(trajectory.matrices) == set(NAMES)
    (listed,) = [one for one in trajectory.findings if one.code == "OD109"]
    assert listed.evidence["counts"] == {"bias": 1, "modules_to_save": 2, "saved weights": 2}


# --- what is no base -----------------------------------------------------------------------------


def test_no_such_base(tmp_path: Path) -> None:
    with pytest.raises(
        NotARun, match=r"^The base '.*missing' cannot be read: .* Pass the folder that holds the weights"
    ):
        open_trajectory(write_dense_run(tmp_path / "run"), base=tmp_path / "missing")


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(NotARun, match=r"^No weights of a whole model in the base '.*' \(looked for model.safetensors"):
        open_trajectory(write_dense_run(tmp_path / "run"), base=write_adapter(tmp_path / "adapter"))


def test_a_broken_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", style="sharded")
    (base / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(
        NotARun, match=r"cannot be read: OD101 model.safetensors.index.json: It names a shard"
    ) as raised:
        open_trajectory(write_dense_run(tmp_path / "run"), base=base)
    assert [finding.code for finding in raised.value.findings] == ["OD101"]


def test_a_base_without_matrices(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"norm.weight": torch.ones(3)})
    with pytest.raises(NotARun, match=r"holds no weight matrix that can be read"):
        open_trajectory(write_dense_run(tmp_path / "run"), base=base)
