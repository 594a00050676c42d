"""In two processes one store is written, and its numbers are those of one process on the joined batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dynamics
from dynamics import DynamicsCallback, Recorder
from dynamics.store import CaptureExists
from tests.distributed import RANKS, Ranks
from tests.trainings import VOCABULARY, lora_llama, trainer

pytestmark = pytest.mark.xdist_group("distributed")
STEPS = 3


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(timeout=120) as processes:
        yield processes


def model() -> nn.Module:
    """LoRA on a Llama in float64, without dropout; B is not zero, so that both factors have gradients."""
    return lora_llama(lora_dropout=0.0, init_lora_weights=False).double().eval()


def batches() -> Tensor:
    """(step, rank, sample, token)"""
    return torch.randint(VOCABULARY, (STEPS, RANKS, 2, 6), generator=torch.Generator().manual_seed(1))


def train(run: Path, model: nn.Module, rows: Tensor, **options: Any) -> int:
    """Plain training; the number of records that this process wrote."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    with Recorder(run, model, preset="full", every=1, **options) as recorder:
        for step, batch in enumerate(rows, start=1):
            with recorder.step(step, optimizer):
                model(input_ids=batch, labels=batch).loss.backward()
                nn.utils.clip_grad_norm_(parameters, 0.1)
                optimizer.step()
                optimizer.zero_grad()
        return len(recorder.steps)


def with_ddp(run: Path) -> int:
    return train(run, DistributedDataParallel(model()), batches()[:, dist.get_rank()])


def with_fsdp(run: Path) -> tuple[int, int]:
    """Records written, and the largest number of parameters that were gathered in one call of the recorder."""
    sharded = model()
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    gathered: list[int] = []
    full_tensor = DTensor.full_tensor

    def count(self: DTensor, **options: Any) -> Tensor:
        gathered.append(self.numel())
        return full_tensor(self, **options)

    DTensor.full_tensor = count
    try:
        return train(run, sharded, batches()[:, dist.get_rank()]), max(gathered)
    finally:
        DTensor.full_tensor = full_tensor


def with_trainer(run: Path) -> tuple[int, int, bool]:
    """Processes that the Trainer counts, records written, and whether a number reached this rank's log."""
    callback = DynamicsCallback(run, every=1)
    training = trainer(run, [callback], max_steps=2, save_strategy="no", logging_steps=1)
    callback.attach(training)
    training.train()
    assert callback.recorder is not None
    logged = any("dynamics/total/frobenius_norm" in entry for entry in training.state.log_history)
    return training.args.world_size, len(callback.recorder.steps), logged


def refused(run: Path) -> str:
    try:
        Recorder(run, DistributedDataParallel(model()), every=1)
    except CaptureExists as error:
        return str(error)
    return "not refused"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, xr.Dataset]:
    """One process, the batches of both ranks joined."""
    run = tmp_path_factory.mktemp("alone")
    train(run, model(), batches().flatten(1, 2))
    return numbers(run)


def numbers(run: Path) -> dict[str, xr.Dataset]:
    tree = dynamics.open_run(run)
    return {name: tree[name].to_dataset().load() for name in ("update", "gradient")}


def assert_same(found: dict[str, xr.Dataset], expected: dict[str, xr.Dataset]) -> None:
    update, gradient = found["update"], found["gradient"]
    assert update["step"].values.tolist() == list(range(1, STEPS + 1))
    assert update["matrix"].values.tolist() == expected["update"]["matrix"].values.tolist()
    for name in ("singular_value", "increment_cosine"):
        np.testing.assert_allclose(update[name], expected["update"][name], rtol=1e-6, atol=1e-9)
    for name in ("norm_before_clip", "norm_after_clip", "singular_value"):
        np.testing.assert_allclose(gradient[name], expected["gradient"][name], rtol=1e-6, atol=1e-9)


def test_ddp(ranks, alone, tmp_path):
    assert ranks(with_ddp, tmp_path) == [STEPS, 0]
    assert_same(numbers(tmp_path), alone)


def test_fsdp2_gathers_one_factor_at_a_time(ranks, alone, tmp_path):
    (written, largest), (none, _) = ranks(with_fsdp, tmp_path)
    assert (written, none) == (STEPS, 0)
    assert_same(numbers(tmp_path), alone)
    assert largest == 3 * 24  # the largest factor; all of them together have far more
    assert largest < sum(p.numel() for p in model().parameters() if p.requires_grad) / 10


def test_what_the_first_rank_refuses_all_refuse(ranks, alone, tmp_path):
    ranks(with_ddp, tmp_path)
    first, second = ranks(refused, tmp_path)
    assert first == second
    assert f"holds {STEPS} captured steps" in first


def test_the_callback_in_a_trainer_on_two_processes(ranks, tmp_path):
    assert ranks(with_trainer, tmp_path) == [(RANKS, 2, True), (RANKS, 0, False)]
    update = dynamics.open_run(tmp_path)["update"]
    assert update["step"].values.tolist() == [1, 2]
    assert (update["frobenius_norm"].sel(kind="increment").values > 0).all()
