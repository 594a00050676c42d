"""In two processes the steps are those of one on the joined batch, and both have the first one's directions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynamics.intervention.projection import StepProjection
from probes import Task
from probes.undisturbed import bare
from tests.distributed import RANKS, Ranks

STEPS, PROBES = 3, 6


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(timeout=120) as processes:
        yield processes


def rows() -> Tensor:
    """(step, rank, sample, input)"""
    return torch.randn(STEPS, RANKS, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().sum(-1) / 2


def tasks(seed: int = 0, samples: int = PROBES) -> list[Task]:
    x = torch.randn(samples, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [Task("a", [{"x": row} for row in x], loss=squares)]


def train(model: nn.Module, batches: Tensor, given: list[Task]) -> Tensor:
    """Train with only the part in two directions; return the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = StepProjection(given, "on", k=2, refresh=2)
    for batch in batches:
        squares(model, {"x": batch}).mean().backward()
        steps.begin(model)
        optimizer.step()
        steps.end()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in bare(model).parameters()])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def with_ddp(*, alike: bool) -> Tensor:
    """Weights after training; where not alike, the second process has other probe samples, which must not matter."""
    rank = dist.get_rank()
    given = tasks() if alike or rank == 0 else tasks(seed=1, samples=PROBES + 1)
    return train(DistributedDataParallel(network()), rows()[:, rank], given)


@pytest.mark.parametrize("alike", [True, False])
def test_ddp_trains_as_one_process(ranks: Ranks, alike: bool) -> None:
    first, second = ranks(with_ddp, alike=alike)
    assert torch.equal(first, second)
    alone = train(network(), rows().flatten(1, 2), tasks())
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-12)
