"""Under data parallelism and FSDP 2, loads are those of one process on the joined batch, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dynamics
from dynamics import Recorder
from tests.distributed import RANKS, Ranks
from tests.mixtures import mixture

STEPS = 3


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(timeout=120) as processes:
        yield processes


def model() -> nn.Module:
    return mixture("mixtral", experts_implementation="eager").double()


def batches() -> Tensor:
    """(step, rank, sample, token)"""
    return torch.randint(3, 60, (STEPS, RANKS, 2, 6), generator=torch.Generator().manual_seed(1))


def train(run: Path, model: nn.Module, rows: Tensor, fails_at: int = 0) -> int:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Recorder(run, model, every=1) as recorder:
        for step, words in enumerate(rows, start=1):
            with recorder.step(step, optimizer):
                if step == fails_at:
                    recorder._routing._routing._failure = ValueError("this rank alone")
                model(input_ids=words, labels=words).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return len(recorder.steps)


def with_ddp(run: Path) -> int:
    return train(run, DistributedDataParallel(model()), batches()[:, dist.get_rank()])


def with_fsdp(run: Path) -> int:
    sharded = model()
    for layer in sharded.model.layers:
        fully_shard(layer)
    return train(run, fully_shard(sharded), batches()[:, dist.get_rank()])


def with_a_rank_that_fails(run: Path) -> int:
    fails_at = 2 if dist.get_rank() == 1 else 0
    return train(run, DistributedDataParallel(model()), batches()[:, dist.get_rank()], fails_at)


def routing(run: Path) -> Any:
    return dynamics.open_run(run)["routing"].to_dataset().load()


@pytest.mark.parametrize("training", [with_ddp, with_fsdp], ids=["DDP", "FSDP 2"])
def test_loads_are_those_of_one_process(ranks: Ranks, training: Any, tmp_path: Path) -> None:
    assert ranks(training, tmp_path / "run") == [STEPS, 0]
    train(tmp_path / "alone", model(), batches().flatten(1, 2))
    found, expected = routing(tmp_path / "run"), routing(tmp_path / "alone")
    for name in ("assigned", "tokens", "load", "dead"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in ("margin", "update_norm", "gradient_norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    assert found["layer"].values.tolist() == expected["layer"].values.tolist()


def test_a_rank_that_fails_alone_costs_one_step_of_routing(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(with_a_rank_that_fails, tmp_path) == [STEPS, 0]
    assert routing(tmp_path)["step"].values.tolist() == [1, 3]
    tree = dynamics.open_run(tmp_path)
    assert tree["update"]["step"].values.tolist() == [1, 2, 3]
    assert "rank 1: Routing was not counted (ValueError: this rank alone)." in str(tree.attrs["findings"])
