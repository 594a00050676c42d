"""Dense updates are the exact difference of what is stored."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from dynamics.checkpoints import open_trajectory
from dynamics.checkpoints.updates import DenseUpdate, update_since
from probes.low_rank import LowRankMatrix
from tests.runs import NAMES, write_adapter
from tests.whole_models import model_tensors, write_dense_run, write_model

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_difference_is_exact(dtype: torch.dtype) -> None:
    """Also where float32, or the coarser of the two, would round it."""
    some = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = torch.full((5, 4), 1e-5, dtype=torch.float32)
    for now, start in ((some, other), (other, some)):
        pairs = zip(now.flatten().tolist(), start.flatten().tolist(), strict=True)
        update = DenseUpdate(now, start).difference()
        assert list(map(Fraction, update.flatten().tolist())) == [Fraction(a) - Fraction(b) for a, b in pairs]


def test_the_difference_is_of_its_own_memory() -> None:
    now = torch.ones(2, 2, dtype=torch.float64)
    DenseUpdate(now).difference().zero_()
    DenseUpdate(now, now.clone()).difference().zero_()
    assert torch.equal(now, torch.ones(2, 2, dtype=torch.float64))


def test_two_shapes() -> None:
    with pytest.raises(ValueError, match=r"^Expected two weights of one shape, got \(2, 3\) and \(3, 2\)\.$"):
        DenseUpdate(torch.ones(2, 3), torch.ones(3, 2))


def test_totals_with_a_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", model_tensors(seed=1, dtype=torch.bfloat16))
    trajectory = open_trajectory(write_dense_run(tmp_path / "run", (10,)), base=base)
    (checkpoint,) = trajectory.checkpoints
    start = trajectory.start_of(checkpoint)
    assert start is not None
    with checkpoint.open() as now, start.open() as before:
        update = update_since(Q, now, before)
        assert isinstance(update, DenseUpdate)
        key = f"{Q}.weight"
        expected = model_tensors(seed=10)[key].double() - model_tensors(seed=1, dtype=torch.bfloat16)[key].double()
        assert torch.equal(update.difference(), expected)
        assert update.dtype == torch.bfloat16


def test_totals_without_a_base(tmp_path: Path) -> None:
    trajectory = open_trajectory(write_dense_run(tmp_path, (10, 20)))
    first, second = trajectory.checkpoints
    with first.open() as before, second.open() as now:
        assert update_since(Q, before, None) is None
        update = update_since(Q, now, before)
        assert isinstance(update, DenseUpdate)
        assert torch.equal(update.difference(), now[Q].double() - before[Q].double())


def test_a_weight_that_the_start_does_not_have(tmp_path: Path) -> None:
    wider = {**model_tensors(), "lm_head.weight": torch.ones(21, 8), "new.weight": torch.ones(2, 2)}
    trajectory = open_trajectory(write_dense_run(tmp_path, {10: model_tensors(), 20: wider}))
    first, second = trajectory.checkpoints
    with first.open() as before, second.open() as now:
        assert update_since("lm_head", now, before) is None
        assert update_since("new", now, before) is None


def test_low_rank_updates_are_what_they_are(tmp_path: Path) -> None:
    with open_trajectory(write_adapter(tmp_path)).checkpoints[0].open() as now:
        assert isinstance(update_since(NAMES[0], now, None), LowRankMatrix)
