"""What the callback records is what the checkpoints of the same steps hold, and what a brute-force twin measures."""

from __future__ import annotations

import math
import shutil
from itertools import product

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import TrainerCallback

import dynamics
from dynamics import DynamicsCallback, Recorder
from tests.runs import Tokens, llama, lora_llama, loss_of, trainer


def analysed_without_records(run, out) -> xr.Dataset:
    """What the checkpoints alone say."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("dynamics"))
    return dynamics.analyze_run(out, report=False)["update"].to_dataset().load()


def relative_difference(one: xr.DataArray, other: xr.DataArray) -> float:
    """Largest difference of two spectra, of their largest singular value."""
    one, other = xr.align(one.fillna(0), other.fillna(0), join="outer", fill_value=0)
    return float((abs(one - other).max("index") / other.max("index")).max())


def test_records_equal_what_analyze_computes_from_checkpoints(tmp_path):
    run = tmp_path / "run"
    callback = DynamicsCallback(run, preset="full", at=[])
    trainer(run, [callback], save_steps=2).train()
    recorded = dynamics.open_run(run)["update"].to_dataset().load()
    checkpoints = analysed_without_records(run, tmp_path / "copy")
    assert recorded["step"].values.tolist() == checkpoints["step"].values.tolist() == [2, 4, 6, 8]
    assert set(recorded["matrix"].values) == set(checkpoints["matrix"].values)
    total = relative_difference(*(each["singular_value"].sel(kind="total") for each in (recorded, checkpoints)))
    later = [each["singular_value"].sel(kind="increment", step=[4, 6, 8]) for each in (recorded, checkpoints)]
    assert total < 1e-12
    assert relative_difference(*later) < 1e-12
    cosines = [
        each["increment_cosine"].sel(step=[6, 8], matrix=recorded["matrix"]).values for each in (recorded, checkpoints)
    ]
    np.testing.assert_allclose(*cosines, rtol=0, atol=1e-9)
    # The first increment is known to the callback alone: it saw the start.
    assert recorded["from_step"].values.tolist() == [0, 2, 4, 6]
    assert checkpoints["from_step"].values.tolist() == [-1, 2, 4, 6]


def test_dense_weights_have_the_spectra_of_their_differences(tmp_path):
    model = llama(num_hidden_layers=2)
    weights = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights[state.global_step] = {name: p.detach().double().clone() for name, p in model.named_parameters()}

    weights[0] = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    callback = DynamicsCallback(tmp_path, preset="full", at=[2, 3])
    trainer(tmp_path, [callback, Keep()], model, max_steps=3, save_strategy="no").train()
    update = dynamics.open_run(tmp_path)["update"]
    assert len(update["matrix"]) == 16  # seven in each of two layers, the embedding and the head
    for step, kind, since in ((2, "total", 0), (3, "total", 0), (2, "increment", 0), (3, "increment", 2)):
        for matrix in update["matrix"].values.tolist():
            change = weights[step][f"{matrix}.weight"] - weights[since][f"{matrix}.weight"]
            expected = torch.linalg.svdvals(change).numpy()
            found = update["singular_value"].sel(step=step, kind=kind, matrix=matrix).values[: len(expected)]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * expected[0])


# ---- gradient norms ----


class BruteForce(TrainerCallback):
    """Norms of each matrix's gradient as anybody would take them, one parameter after the other."""

    def __init__(self, model: torch.nn.Module, maximum: float) -> None:
        self.model, self.maximum = model, maximum
        self.before: dict[int, dict[str, float]] = {}
        self.after: dict[int, dict[str, float]] = {}
        self._unclipped: dict[str, torch.Tensor] = {}

    def norms(self, gradients: dict[str, torch.Tensor]) -> dict[str, float]:
        squares: dict[str, float] = {}
        for name, gradient in gradients.items():
            matrix = name.split(".lora_")[0].removeprefix("base_model.model.")
            squares[matrix] = squares.get(matrix, 0.0) + float(gradient.double().square().sum())
        return {matrix: math.sqrt(square) for matrix, square in squares.items()}

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        step, clipped = state.global_step + 1, self.gradients()
        self.after[step] = self.norms(clipped)
        self.before[step] = self.norms(self._unclipped)

    def keep_unclipped(self, *_):
        self._unclipped = self.gradients()


@pytest.mark.parametrize(
    ("accumulation", "clipping", "bf16", "checkpointing"),
    list(product([1, 3], [0.0, 0.05], [False, True], [False, True])),
)
def test_norms_equal_a_brute_force_twin(tmp_path, monkeypatch, accumulation, clipping, bf16, checkpointing):
    model = lora_llama(2)
    twin = BruteForce(model, clipping)
    callback = DynamicsCallback(tmp_path, preset="economy", every=1)
    training = trainer(
        tmp_path,
        [callback, twin],
        model,
        max_steps=2,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=clipping,
        bf16=bf16,
        gradient_checkpointing=checkpointing,
        save_strategy="no",
    )
    step_of_trainer = training.training_step

    def training_step(*args, **kwargs):
        loss = step_of_trainer(*args, **kwargs)
        twin.keep_unclipped()  # after each backward pass, so that the last one stays
        return loss

    monkeypatch.setattr(training, "training_step", training_step)
    training.train()
    gradient = dynamics.open_run(tmp_path)["gradient"]
    for step in (1, 2):
        for name, expected in (("norm_before_clip", twin.before[step]), ("norm_after_clip", twin.after[step])):
            found = gradient[name].sel(step=step)
            assert set(found["matrix"].values) == set(expected)
            for matrix, norm in expected.items():
                assert float(found.sel(matrix=matrix)) == pytest.approx(norm, rel=1e-9)
    total = {
        name: float((gradient[name].sel(step=1) ** 2).sum() ** 0.5) for name in ("norm_before_clip", "norm_after_clip")
    }
    assert (total["norm_after_clip"] < total["norm_before_clip"]) == (clipping > 0)
    if clipping:
        assert total["norm_after_clip"] == pytest.approx(clipping, rel=1e-3)


# ---- the loop's own terms ----


def test_the_step_is_the_one_after_the_update(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, callback.recorder.steps[-1:]))

    callback = DynamicsCallback(tmp_path, at=[1, 3])
    training = trainer(tmp_path, [callback, Watch()], max_steps=5, save_steps=2)
    training.train()
    # 2, 4 and the last are saved: they are captured with their gradients, as the schedule's are.
    assert seen == [(1, [1]), (2, [2]), (3, [3]), (4, [4]), (5, [5])]
    assert np.isfinite(dynamics.open_run(tmp_path)["gradient"]["norm_before_clip"].values).all()


def test_a_checkpoint_that_could_not_be_foreseen_has_a_record_without_gradients(tmp_path):
    callback = DynamicsCallback(tmp_path, at=[3])
    options = {"save_strategy": "epoch", "gradient_accumulation_steps": 16, "max_steps": -1, "num_train_epochs": 4}
    trainer(tmp_path, [callback], **options).train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]
    tree = dynamics.open_run(tmp_path)
    assert tree["update"]["step"].values.tolist() == [2, 3, 4, 6, 8]
    known = tree["gradient"]["norm_before_clip"].notnull().all("matrix")
    assert known["step"].values[known.values].tolist() == [3]


def test_the_trainers_warmup_is_allowed_for(tmp_path):
    callback = DynamicsCallback(tmp_path, every=1)
    training = trainer(tmp_path, [callback], learning_rate=0.0, warmup_steps=2, max_steps=4, save_strategy="no")
    with pytest.warns(UserWarning, match="OD302 At step 4 .* after 2 steps of warm-up"):
        training.train()


def test_a_step_that_is_not_captured_runs_no_operation(tmp_path):
    """Nothing is launched on a device, so nothing can wait for one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations += 1
            return func(*args, **(kwargs or {}))

    model = lora_llama(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Recorder(tmp_path, model, preset="full", at=[2]) as recorder:
        counts = {}
        for step in (1, 2, 3):
            loss_of(model, Tokens()).backward()  # the first step's own gradients
            with Count() as count:
                recorder.before_backward(step)
                recorder.before_optimizer_step(optimizer)
                recorder.after_optimizer_step()
            counts[step] = count.operations
    assert (counts[1], counts[3]) == (0, 0)
    assert counts[2] > 0
