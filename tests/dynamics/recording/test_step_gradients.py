"""Norms and spectra of a step's gradients in its record, of a loop of one's own."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr

import dynamics
from dynamics import Recorder
from tests.distributed import RANKS, Ranks
from tests.runs import Tokens, lora_llama, loss_of


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
def test_norms_under_a_loss_scaler_are_those_of_the_loss(tmp_path, unscale, explicit):
    """A plain loop with a GradScaler: recorded norms are unscaled, whether the loop unscales before clipping or not.

    Told explicitly, as the Trainer tells it, the recorder looks before ``scaler.step`` has unscaled anything.
    """
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    model(inputs).square().sum().backward()
    expected = {name: float(getattr(model, name).weight.grad.double().norm()) for name in ("0", "1")}
    model.zero_grad()
    with Recorder(tmp_path, model, every=1) as recorder, recorder.step(1, optimizer, scaler):
        scaler.scale(model(inputs).square().sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if explicit:
            recorder.before_optimizer_step(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    gradient = dynamics.open_run(tmp_path)["gradient"].sel(step=1)
    for name, norm in expected.items():
        assert float(gradient["norm_before_clip"].sel(matrix=name)) == pytest.approx(norm, rel=1e-6)
    after = gradient["norm_after_clip"].values
    of_spectra = (gradient["singular_value"] ** 2).sum("index") ** 0.5
    np.testing.assert_allclose(of_spectra.values, after, rtol=1e-6)
    if unscale:
        assert 0 < float((after**2).sum() ** 0.5) <= 0.5 + 1e-6
    else:
        np.testing.assert_allclose(after, list(expected.values()), rtol=1e-6)


def test_three_explicit_calls_record_what_the_context_records(tmp_path):
    results = []
    for name, explicit in (("context", False), ("calls", True)):
        model, data = lora_llama(lora_dropout=0.0), Tokens()
        model.eval()  # no dropout, so that both see the same
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with Recorder(tmp_path / name, model, preset="standard", every=1) as recorder:
            for step in (1, 2):
                with nullcontext() if explicit else recorder.step(step, optimizer):
                    if explicit:
                        recorder.before_backward(step)
                    loss_of(model, data).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                    if explicit:
                        recorder.before_optimizer_step(optimizer)
                    optimizer.step()
                    if explicit:
                        assert recorder.after_optimizer_step()
                    optimizer.zero_grad()
        tree = dynamics.open_run(tmp_path / name)
        results.append((tree["update"].to_dataset().load(), tree["gradient"].to_dataset().load()))
    for one, other in zip(*results, strict=True):
        xr.testing.assert_equal(one, other)


def layers() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_micro_batches_are_measured_one_by_one(tmp_path):
    model, optimizer = layers()
    batches = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squares = {"0": 0.0, "1": 0.0}
    for batch in batches:
        model(batch).square().mean().backward()
        for name in squares:
            squares[name] += float(model.get_submodule(name).weight.grad.square().sum()) / len(batches)
        model.zero_grad()
    with Recorder(tmp_path, model, every=1, batch_size=15) as recorder, recorder.step(1, optimizer):
        for batch in batches:
            (model(batch).square().mean() / len(batches)).backward()
        optimizer.step()
    gradient = dynamics.open_run(tmp_path)["gradient"].sel(step=1)
    assert (gradient["micro_batches"], gradient["batch_size"]) == (3, 15)
    for name, square in squares.items():
        assert float(gradient["micro_norm"].sel(matrix=name)) == pytest.approx(square**0.5, rel=1e-12)


def test_where_nobody_says_when_gradients_are_clipped_only_those_before_are_recorded(tmp_path):
    model, optimizer = layers()
    with Recorder(tmp_path, model, every=1) as recorder, recorder.step(1):
        model(torch.ones(2, 6, dtype=torch.float64)).square().mean().backward()
        expected = float(model[0].weight.grad.norm())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    gradient = dynamics.open_run(tmp_path)["gradient"].sel(step=1)
    assert float(gradient["norm_before_clip"].sel(matrix="0")) == pytest.approx(expected, rel=1e-12)
    assert gradient["norm_after_clip"].isnull().all()
    assert gradient["singular_value"].isnull().all()


def test_gradients_are_read_once_a_step_and_anew_in_the_next(tmp_path):
    model, optimizer = layers()
    with Recorder(tmp_path, model, every=1) as recorder:
        for step in (1, 2):
            with recorder.step(step, optimizer):
                optimizer.zero_grad()
                model(torch.full((2, 6), float(step), dtype=torch.float64)).square().mean().backward()
                recorder.before_optimizer_step(optimizer)
                expected = float(model[0].weight.grad.norm())
                model[0].weight.grad.mul_(7.0)  # after the reading that counts
                optimizer.step()
            after = dynamics.open_run(tmp_path)["gradient"]["norm_after_clip"].sel(step=step, matrix="0")
            assert float(after) == pytest.approx(expected, rel=1e-12)


# ---- gradients that a loop reduces itself ----


def reduced_by_the_loop(run: Path, way: str) -> list[str]:
    """What is said in a loop of two processes; ``way`` is what it does between the backward pass and the step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    model = torch.nn.parallel.DistributedDataParallel(model) if way == "DDP" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    with Recorder(run, model, every=1, strict=True) as recorder:
        for step in (1, 2):
            with recorder.step(step, optimizer):
                model(inputs).square().sum().backward()
                if way != "DDP":
                    for parameter in model.parameters():
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= RANKS
                if way == "told":
                    recorder.before_clipping()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        return [f"{finding.code} {finding.step}" for finding in recorder.findings if finding.code == "OD325"]


def test_norms_of_one_process_alone_are_told_once(tmp_path):
    with Ranks() as ranks:
        assert ranks(reduced_by_the_loop, tmp_path / "untold", "untold") == [["OD325 1"], []]
        for way in ("told", "DDP"):
            assert ranks(reduced_by_the_loop, tmp_path / way, way) == [[], []]


def test_one_process_may_do_what_it_likes_to_gradients(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path, model, every=1, strict=True) as recorder, recorder.step(1, optimizer):
        model(torch.ones(3, 6)).square().sum().backward()
        model[0].weight.grad *= 3
        optimizer.step()
    assert "OD325" not in {finding.code for finding in recorder.findings}
