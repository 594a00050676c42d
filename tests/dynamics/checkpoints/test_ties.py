"""Tied weights count once, whatever the configuration says; weights that training untied count as two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamics.checkpoints import Trajectory, open_trajectory
from dynamics.checkpoints.formats.transformers import read_whole_model
from dynamics.checkpoints.ties import equal_keys
from tests.runs import adapter_config, random_factors, write_adapter, write_state
from tests.whole_models import model_tensors, write_dense_run, write_model

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
STYLES = ("safetensors", "bin", "sharded", "sharded bin", "distributed")


def tied(seed: int = 0) -> dict[str, torch.Tensor]:
    """A model whose head is saved as a copy of its embedding."""
    tensors = model_tensors(seed)
    return {**tensors, f"{HEAD}.weight": tensors[f"{EMBEDDING}.weight"].clone()}


def one_name(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same without its head, as transformers saves it."""
    return {key: tensor for key, tensor in tensors.items() if key != f"{HEAD}.weight"}


def totals(trajectory: Trajectory) -> dict[str, torch.Tensor]:
    """Each matrix's update at the last step."""
    checkpoint = trajectory.checkpoints[-1]
    start = trajectory.start_of(checkpoint)
    assert start is not None
    with checkpoint.open() as now, start.open() as before:
        return {name: now[name].double() - before[name].double() for name in now if name in before}  # type: ignore[union-attr]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}])
def test_equal_tensors_are_one_matrix(style: str, config: dict[str, Any], tmp_path: Path) -> None:
    steps = {step: tied(step) for step in (10, 20)}
    for step, tensors in steps.items():
        write_state(write_model(tmp_path / f"checkpoint-{step}", tensors, style, **config), step)
    trajectory = open_trajectory(tmp_path)
    assert HEAD not in trajectory.matrices
    assert EMBEDDING in trajectory.matrices
    (note,) = [finding for finding in trajectory.findings if finding.code == "OD135"]
    assert note.evidence == {"tied": {HEAD: EMBEDDING}}
    norm = sum(float(update.square().sum()) for update in totals(trajectory).values())
    keys = one_name(steps[10])
    truth = sum(
        float((steps[20][key].double() - steps[10][key].double()).square().sum()) for key in keys if "norm" not in key
    )
    assert norm == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("style", ["safetensors", "distributed"])
def test_a_configuration_that_lies_hides_no_head(style: str, tmp_path: Path) -> None:
    for step in (10, 20):
        folder = write_model(tmp_path / f"checkpoint-{step}", model_tensors(step), style, tie_word_embeddings=True)
        write_state(folder, step)
    assert {HEAD, EMBEDDING} <= set(open_trajectory(tmp_path).matrices)


@pytest.mark.parametrize("first", [tied(10), one_name(tied(10))], ids=["both names", "one name"])
def test_a_head_that_training_untied_starts_as_the_embedding(first: dict[str, torch.Tensor], tmp_path: Path) -> None:
    last = model_tensors(20)
    trajectory = open_trajectory(write_dense_run(tmp_path, {10: first, 20: last}))
    assert {HEAD, EMBEDDING} <= set(trajectory.matrices)
    start = first[f"{EMBEDDING}.weight"].double()
    updates = totals(trajectory)
    assert torch.equal(updates[HEAD], last[f"{HEAD}.weight"].double() - start)
    assert torch.equal(updates[EMBEDDING], last[f"{EMBEDDING}.weight"].double() - start)


def test_a_run_that_tied_what_the_base_had_apart_keeps_both(tmp_path: Path) -> None:
    base = model_tensors(1)
    run = write_dense_run(tmp_path / "run", {10: tied(10), 20: tied(20)})
    updates = totals(open_trajectory(run, base=write_model(tmp_path / "base", base)))
    assert torch.equal(updates[HEAD], tied(20)[f"{HEAD}.weight"].double() - base[f"{HEAD}.weight"].double())
    assert torch.equal(
        updates[EMBEDDING], tied(20)[f"{EMBEDDING}.weight"].double() - base[f"{EMBEDDING}.weight"].double()
    )


def test_any_layers_can_be_tied_and_a_constant_tells_nothing(tmp_path: Path) -> None:
    def tensors(step: int) -> dict[str, torch.Tensor]:
        shared = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        gates = {f"block.{i}.gate.weight": torch.zeros(6, 5) for i in range(2)}
        return {"encoder.layer.weight": shared, "decoder.layer.weight": shared.clone(), **gates}

    trajectory = open_trajectory(write_dense_run(tmp_path, {10: tensors(10), 20: tensors(20)}))
    assert set(trajectory.matrices) == {"decoder.layer", "block.0.gate", "block.1.gate"}


def test_equal_keys_are_those_that_comparing_everything_finds(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 50, generator=generator) for _ in range(2))
    late = a.clone()
    late[-1, -1] += 1
    tensors = {"a.weight": a, "b.weight": b, "late.weight": late, "z.weight": a.clone(), "t.weight": a.T.contiguous()}
    for style in ("safetensors", "distributed"):
        folder = write_model(tmp_path / style, tensors, style)
        inner = folder / ("model.safetensors" if style == "safetensors" else "pytorch_model_fsdp_0/.metadata")
        slow = {
            key: first
            for i, key in enumerate(tensors)
            for first in list(tensors)[:i]
            if torch.equal(tensors[first], tensors[key])
        }
        assert equal_keys(read_whole_model(inner), tensors) == slow == {"z.weight": "a.weight"}


def test_the_tied_head_of_the_base_is_its_embedding(tmp_path: Path) -> None:
    """A head saved beside an adapter is counted from the embedding, unless the base says that it is not tied."""
    base = {"model.embed_tokens.weight": torch.randn(9, 4), "model.layers.0.q.weight": torch.randn(12, 10)}
    head = torch.randn(9, 4)
    factors = random_factors(("model.layers.0.q",))
    write_adapter(tmp_path / "run", factors, adapter_config(), extra={"base_model.model.lm_head.weight": head})
    for config, is_known in (
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
    ):
        write_model(tmp_path / "base", base, **config)
        trajectory = open_trajectory(tmp_path / "run", base=tmp_path / "base")
        assert trajectory.base is not None
        assert ("lm_head" in trajectory.base.shapes) == is_known
        if is_known:
            with trajectory.base.open() as matrices:
                assert torch.equal(matrices["lm_head"], base["model.embed_tokens.weight"])
        else:
            (finding,) = [one for one in trajectory.findings if one.code == "OD124"]
            assert "1 of 2 matrices are compared with the base" in finding.message
