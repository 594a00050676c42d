"""Gradients of micro-batches: seen before they are added up, and the noise that follows from them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import dynamics
from dynamics import Recorder
from probes.gradients import TAKEN, GradientNorms
from tests.distributed import Ranks
from tests.probes.test_gradients import tiny_lora, tokens, trained


def linear() -> nn.Module:
    layer = nn.Linear(8, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    return nn.Sequential(layer)


@pytest.mark.parametrize("checkpointing", [None, False], ids=["", "checkpointed"])
def test_they_are_the_gradients_of_each_backward_pass(checkpointing):
    model = tiny_lora(checkpointing=checkpointing)
    parameters = trained(model)
    norms = GradientNorms(parameters)
    norms.arm()
    expected = torch.zeros(len(parameters), dtype=torch.float64)
    for batch in tokens(3):
        before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        model(input_ids=batch, labels=batch).loss.backward()
        parts = [p.grad - start for p, start in zip(parameters, before, strict=True)]
        expected += torch.stack([part.double().square().sum() for part in parts])
    passes, squares = norms.of_micro_batches()
    norms.disarm()
    assert passes == 3
    torch.testing.assert_close(squares, expected, rtol=1e-9, atol=1e-15)


def test_parts_of_one_backward_pass_are_no_micro_batches():
    """Reentrant checkpointing runs backward passes inside one: what reaches a shared weight comes in parts."""
    shared = nn.Linear(4, 4).double()
    norms = GradientNorms([shared.weight])
    norms.arm()
    inputs = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.utils.checkpoint.checkpoint(shared, inputs, use_reentrant=True)
    torch.utils.checkpoint.checkpoint(shared, hidden, use_reentrant=True).sum().backward()
    assert norms.of_micro_batches()[1].tolist() == [TAKEN]


def test_a_parameter_without_a_gradient_has_none():
    used, unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
    norms = GradientNorms([used, unused])
    norms.arm()
    used.sum().backward()
    assert norms.of_micro_batches()[1].tolist() == pytest.approx([2.0, 0.0])
    norms.disarm()
    assert GradientNorms([]).of_micro_batches()[1].shape == (0,)


#: Inputs are standard normal, targets 1 · x₀ plus noise: at w = 0 the gradient is −x y.
DIMENSION, NOISE, MICRO = 8, 2.0, 4


def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(MICRO, DIMENSION, generator=generator, dtype=torch.float64)
    return inputs, inputs[:, :1] + NOISE * torch.randn(MICRO, 1, generator=generator, dtype=torch.float64)


def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    inputs, targets = draw(generator)
    return (model(inputs) - targets).square().mean() / 2


def truth() -> tuple[float, float]:
    """‖μ‖² and tr Σ of one sample: E[x xᵀ y²] = (1 + σ²)·1 + 2 e₀e₀ᵀ, and μ = −e₀."""
    return 1.0, (1 + NOISE**2) * DIMENSION + 2.0 - 1.0


@pytest.mark.parametrize("divided", [True, False], ids=["mean", "sum"])
def test_the_noise_scale_of_a_linear_model_is_right(tmp_path, divided):
    """The model never moves, so that every step measures the same two numbers."""
    model, generator = linear(), torch.Generator().manual_seed(0)
    steps, accumulation = 300, 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(tmp_path, model, every=1, batch_size=MICRO * accumulation, strict=True) as recorder:
        for step in range(1, steps + 1):
            with recorder.step(step, optimizer):
                optimizer.zero_grad()
                for _ in range(accumulation):
                    (loss(model, generator) / (accumulation if divided else 1)).backward()
                optimizer.step()
    gradient = dynamics.open_run(tmp_path)["gradient"].to_dataset().load()
    size = 1.0 if divided else float(accumulation**2)
    signal, noise = truth()
    assert (gradient["micro_batches"] == accumulation).all()
    for name, expected in (("signal", size * signal), ("noise", size * noise / (MICRO * accumulation))):
        values = gradient[name].values[:, 0]
        assert abs(values.mean() - expected) < 3 * values.std() / math.sqrt(steps), name
    # Over all steps together the ratio is that of the sums.
    scale = MICRO * accumulation * float(gradient["noise"].mean() / gradient["signal"].mean())
    assert scale == pytest.approx(noise / signal, rel=0.25)
    last = gradient.isel(step=slice(-10, None))
    assert gradient["noise_scale"].values[-1] == pytest.approx(
        MICRO * accumulation * float(last["noise"].sum() / last["signal"].sum()), rel=1e-12
    )


def test_one_micro_batch_says_nothing_of_noise(tmp_path):
    model, generator = linear(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path, model, every=1, strict=True) as recorder, recorder.step(1, optimizer):
        loss(model, generator).backward()
        optimizer.step()
    gradient = dynamics.open_run(tmp_path)["gradient"].to_dataset()
    for name in ("micro_norm", "micro_batches", "signal", "noise", "noise_to_signal", "noise_scale"):
        assert gradient[name].isnull().all(), name
    assert gradient["norm_before_clip"].notnull().all()


def of_a_rank(folder: str) -> None:
    """Ten steps of two micro-batches under DDP; each rank has its own data."""
    model = linear()
    parallel = nn.parallel.DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(folder, parallel, every=1, batch_size=4 * MICRO, strict=True) as recorder:
        for step in range(1, 11):
            with recorder.step(step, optimizer):
                optimizer.zero_grad()
                with parallel.no_sync():
                    (loss(parallel, generator) / 2).backward()
                (loss(parallel, generator) / 2).backward()
                optimizer.step()


def test_under_data_parallelism_each_process_has_micro_batches_of_its_own(tmp_path):
    with Ranks(timeout=120) as ranks:
        ranks(of_a_rank, str(tmp_path / "run"))
    gradient = dynamics.open_run(Path(tmp_path / "run"))["gradient"].to_dataset().load()
    assert (gradient["micro_batches"] == 4).all()
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for step in range(10):
        parts = [[draw(generator) for _ in range(2)] for generator in generators]
        gradients = np.array(
            [[-(inputs * targets).mean(0).numpy() for inputs, targets in batches] for batches in parts]
        )
        assert gradient["micro_norm"].values[step, 0] == pytest.approx(
            math.sqrt((gradients[0] ** 2).sum(-1).mean()), rel=1e-9
        )
        assert gradient["norm_before_clip"].values[step, 0] == pytest.approx(
            np.linalg.norm(gradients.mean((0, 1))), rel=1e-9
        )
