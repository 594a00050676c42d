"""In two processes norms are those of the joined batch's gradient: after DDP's reduction, over FSDP 2's shards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from probes.gradients import GradientNorms, norms_of
from probes.watched import whole
from tests.distributed import RANKS, Ranks

SMALLEST_BUCKET = 1e-5  # MB: nearly one a parameter


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as processes:
        yield processes


class Model(nn.Module):
    """Layers of odd sizes, one frozen, the first used twice, the last perhaps not at all."""

    def __init__(self, use_reentrant: bool | None = None, skip_last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(3, 3, dtype=torch.float64)
        self.frozen = nn.Linear(3, 5, dtype=torch.float64).requires_grad_(False)
        self.middle = nn.Linear(5, 5, dtype=torch.float64)
        self.after = nn.Linear(5, 7, dtype=torch.float64)
        self.last = nn.Linear(7, 7, dtype=torch.float64)
        self.use_reentrant, self.skip_last = use_reentrant, skip_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.before(self.before(x)).tanh())
        if self.use_reentrant is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.use_reentrant)  # pyright: ignore[reportAssignmentType]
        x = self.after(x.tanh())
        return x if self.skip_last else self.last(x.tanh())


def batches(micro_batches: int) -> Tensor:
    """(micro-batch, rank, sample, feature)"""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(micro_batches, RANKS, 4, 3, dtype=torch.float64, generator=generator)


def loss(model: nn.Module, x: Tensor, micro_batches: int = 1) -> Tensor:
    return model(x).square().mean() / micro_batches


def each(parameters: list[nn.Parameter], squared: Tensor | None) -> list[float]:
    assert squared is not None
    return norms_of(squared, parameters, [[parameter] for parameter in parameters])


def in_one_process(micro_batches: int, max_norm: float, **options: Any) -> tuple[list[float], list[float]]:
    """Norms before and after clipping, of the joined batch, from gradients in ``.grad``."""
    model = Model(**options)
    loss(model, batches(micro_batches).flatten(0, 2)).backward()

    def norms() -> list[float]:
        zero = torch.zeros(())
        return [(zero if p.grad is None else p.grad).square().sum().sqrt().item() for p in model.parameters()]

    before = norms()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return before, norms()


def with_ddp(
    steps: int, micro_batches: int, max_norm: float, ddp: dict[str, Any], **options: Any
) -> list[tuple[list[float], list[float]]]:
    """As :func:`in_one_process`, of each step; nothing is trained, so that all steps are alike."""
    model = DistributedDataParallel(Model(**options), **ddp)
    parameters = list(model.module.parameters())
    recorded = GradientNorms(parameters)
    results = []
    for _ in range(steps):
        recorded.arm()
        for index, batch in enumerate(batches(micro_batches)):
            with nullcontext() if index == micro_batches - 1 else model.no_sync():
                loss(model, batch[dist.get_rank()], micro_batches).backward()
        nn.utils.clip_grad_norm_(parameters, max_norm)
        results.append((each(parameters, recorded.before_clipping()), each(parameters, recorded.after_clipping())))
        recorded.disarm()
        model.zero_grad()
    return results


def watching_one(name: str, ddp: dict[str, Any], **options: Any) -> list[float]:
    """Norm before clipping of one parameter, where the others are not watched."""
    model = DistributedDataParallel(Model(**options), **ddp)
    parameter = model.module.get_parameter(name)
    recorded = GradientNorms([parameter])
    recorded.arm()
    loss(model, batches(1)[0, dist.get_rank()]).backward()
    return each([parameter], recorded.before_clipping())


def with_fsdp(micro_batches: int, max_norm: float, **options: Any) -> tuple[list[float], list[float], float, str]:
    """As :func:`with_ddp`, one step; with how far :func:`whole` is from the weights, and the gradient's type."""
    model = Model(**options)
    unsharded = [parameter.detach().clone() for parameter in model.parameters()]
    for layer in (model.before, model.middle, model.after, model.last):
        fully_shard(layer)
    fully_shard(model)
    parameters = list(model.parameters())
    recorded = GradientNorms(parameters)
    recorded.arm()
    for index, batch in enumerate(batches(micro_batches)):
        model.set_requires_gradient_sync(index == micro_batches - 1)  # pyright: ignore[reportCallIssue]
        loss(model, batch[dist.get_rank()], micro_batches).backward()
    before = each(parameters, recorded.before_clipping())
    nn.utils.clip_grad_norm_(parameters, max_norm)
    after = each(parameters, recorded.after_clipping())
    distance = max((whole(p) - q).abs().max().item() for p, q in zip(parameters, unsharded, strict=True))
    return before, after, distance, type(model.before.weight.grad).__name__


def without_gradient() -> tuple[list[float], list[float]]:
    """Squared norms of a sharded model before any backward pass, and with a gradient on one rank only."""
    model = Model()
    fully_shard(model)
    parameters = list(model.parameters())
    recorded = GradientNorms(parameters)
    nothing = recorded.after_clipping().tolist()
    weight = model.before.weight
    if dist.get_rank() == 0:
        weight.grad = torch.ones_like(weight)
    return nothing, recorded.after_clipping().tolist()


def fails_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError("a broken rank")
    dist.barrier()  # waits for the broken one
    return dist.get_rank()


def dies_on(rank: int, number: int = 0) -> None:
    if dist.get_rank() == rank:
        os.write(2, b"last words")  # past Python's own buffer, as C++ does
        if number:
            os.kill(os.getpid(), number)
        os._exit(3)
    time.sleep(60)


def same(norms: float | list[float]) -> Any:
    return pytest.approx(norms, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("max_norm", [1e3, 1e-3], ids=["", "clipped"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    ("ddp", "options"),
    [
        ({}, {}),
        ({"bucket_cap_mb": SMALLEST_BUCKET}, {}),
        ({"gradient_as_bucket_view": True}, {}),
        ({"find_unused_parameters": True}, {"skip_last": True}),
        ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, {"skip_last": True}),
        ({}, {"use_reentrant": False}),
        ({}, {"use_reentrant": True}),
    ],
    ids=["plain", "small_buckets", "view", "unused", "unused_view", "checkpointed", "reentrant"],
)
def test_ddp(ranks: Ranks, ddp: dict[str, Any], options: dict[str, Any], micro_batches: int, max_norm: float) -> None:
    expected = in_one_process(micro_batches, max_norm, **options)
    for steps in ranks(with_ddp, 2, micro_batches, max_norm, ddp, **options):
        for before, after in steps:
            assert before == same(expected[0])
            assert after == same(expected[1])


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("use_reentrant", [None, True])
def test_static_graph(ranks: Ranks, use_reentrant: bool | None, view: bool) -> None:
    options = {"use_reentrant": use_reentrant}
    ddp = {"static_graph": True, "gradient_as_bucket_view": view}
    before, after = in_one_process(1, 1e-3, **options)
    for steps in ranks(with_ddp, 3, 1, 1e-3, ddp, **options):  # the first step is reduced in another way
        assert steps == [(same(before), same(after))] * 3


@pytest.mark.parametrize("ddp", [{}, {"static_graph": True}], ids=["", "static"])
@pytest.mark.parametrize("index", [0, 4, 5, 8])
def test_one_parameter_of_many(ranks: Ranks, index: int, ddp: dict[str, Any]) -> None:
    """The last gradient of a reentrant layer is there long before the reduction is."""
    names = [name for name, _ in Model().named_parameters()]
    expected = in_one_process(1, 1e3)[0][index]
    assert ranks(watching_one, names[index], ddp, use_reentrant=True) == [[same(expected)]] * RANKS


@pytest.mark.parametrize("max_norm", [1e3, 1e-3], ids=["", "clipped"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("use_reentrant", [None, False], ids=["", "checkpointed"])
def test_fsdp(ranks: Ranks, use_reentrant: bool | None, micro_batches: int, max_norm: float) -> None:
    options = {"use_reentrant": use_reentrant}
    expected = in_one_process(micro_batches, max_norm, **options)
    for before, after, distance, kind in ranks(with_fsdp, micro_batches, max_norm, **options):
        assert (distance, kind) == (0.0, "DTensor")
        assert before == same(expected[0])
        assert after == same(expected[1])


def test_fsdp_without_gradient(ranks: Ranks) -> None:
    count = len(list(Model().parameters()))
    for nothing, one in ranks(without_gradient):
        assert nothing == [-1.0] * count
        assert one == [pytest.approx(6.0)] + [-1.0] * (count - 1)  # rank 0 holds two of three rows


def test_a_broken_rank_is_reported_and_replaced(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match=r"^fails_on failed on rank 1:\n(?s:.*)ValueError: a broken rank"):
        ranks(fails_on, 1)
    assert ranks(fails_on, -1) == [0, 1]


@pytest.mark.parametrize(
    ("number", "how"), [(0, "with status 3"), (signal.SIGKILL, "by SIGKILL"), (signal.SIGABRT, "by SIGABRT")]
)
def test_a_rank_that_dies_is_reported(ranks: Ranks, number: int, how: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"^The process of rank 0 died {how} in dies_on\. It wrote last:\nlast words"
    ):
        ranks(dies_on, 0, number)


def test_ranks_that_cannot_meet_say_why() -> None:
    with Ranks(timeout=5) as ranks:
        ranks._start()
        ranks._store, ranks.timeout = None, 120.0  # the store in which they were to meet within 5 s
        with pytest.raises(RuntimeError, match=r"(?s)^The process of rank . died with status 1 .*Error"):
            ranks(fails_on, -1)


def test_a_port_that_is_taken_meanwhile_is_no_matter() -> None:
    """Many groups at once, each with a store of its own."""
    groups = [Ranks() for _ in range(3)]
    try:
        for group in groups:
            group._start()
        assert [group(fails_on, -1) for group in groups] == [[0, 1]] * 3
    finally:
        for group in groups:
            group.close()


def test_ranks_that_do_not_return_are_reported(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "timeout", 0.5)
    with pytest.raises(TimeoutError, match=r"^sleep did not return within 0\.5 s on ranks \[0, 1\]\.$"):
        ranks(time.sleep, 60)
