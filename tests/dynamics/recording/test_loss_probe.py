"""Losses since the start of a training, and what gradients at the start say of them, are those of the weights there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import dynamics
from dynamics import DynamicsCallback, Recorder, analyze_run, schema
from dynamics.intervention.loss_changes import NOT_ASKED, loss_changes
from dynamics.recording.loss_probe import LATE, LossProbe, losses_along, outside, predictions, starts_at_zero
from dynamics.recording.schedules import PRESETS
from dynamics.store.record_file import encoded_record, read_record
from probes import Task
from probes.undisturbed import swapped
from probes.update_slopes import losses_of
from tests.runs import VOCABULARY, llama, lora_llama, losses, random_states, trainer
from tests.updates import trained


def task(name: str, seed: int, samples: int = 8, **options) -> Task:
    """Sequences that are not trained on, two a group."""
    rows = torch.randint(VOCABULARY, (samples, 8), generator=torch.Generator().manual_seed(seed))
    data = [{"input_ids": row, "labels": row, "image": f"{name}{number // 2}"} for number, row in enumerate(rows)]
    return Task(name, data, group="image", **options)


def tasks() -> list[Task]:
    return [task("new", 11), task("old", 12, retained=True, score=first_logit)]


def first_logit(model: nn.Module, batch) -> Tensor:
    return model(**batch).logits[:, 0, 0]


def small() -> nn.Module:
    return lora_llama(target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module", autouse=True)
def _without_sharpness() -> Iterator[None]:
    """Most of the time would go into the search for critical sharpness, which has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "full", replace(PRESETS["full"], sharpness=False))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training with a record and a checkpoint at 2 and 4, and the training itself."""
    folder = tmp_path_factory.mktemp("losses") / "run"
    callback = DynamicsCallback(folder, tasks(), preset="full", at=[2, 4], strict=True)
    training = trainer(folder, [callback], small(), save_strategy="steps", save_steps=2, max_steps=4)
    training.train()
    return folder, training, random_states()


@pytest.fixture(scope="module")
def measured(run) -> xr.Dataset:
    return dynamics.open_run(run[0])["loss"].to_dataset().load()


def load(folder: str):
    return PeftModel.from_pretrained(llama(), folder, is_trainable=True), tasks(), 4


def all_losses(model: nn.Module) -> np.ndarray:
    return torch.cat([losses_of(model, one) for one in tasks()]).numpy()


def test_the_training_does_not_notice(run, tmp_path):
    plain = trainer(tmp_path, [], small(), save_strategy="steps", save_steps=2, max_steps=4)
    plain.train()
    assert run[2] == random_states()
    assert losses(run[1].state.log_history) == losses(plain.state.log_history)
    ours, theirs = run[1].model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_losses_are_those_of_the_model_then_and_of_the_base_at_the_start(run, measured):
    folder, training, _ = run
    assert measured["step"].values.tolist() == [0, 2, 4]
    np.testing.assert_allclose(measured["sample_loss"].sel(step=0), all_losses(small()), rtol=1e-6)
    np.testing.assert_array_equal(measured["sample_loss"].sel(step=4), all_losses(training.model))
    model = load(str(folder / "checkpoint-2"))[0]
    np.testing.assert_allclose(measured["sample_loss"].sel(step=2), all_losses(model), rtol=1e-6)
    assert measured.attrs["start_step"] == 0
    assert (measured.attrs["samples"], measured.attrs["groups"]) == (16, 8)


def test_the_result_keeps_its_contract(run, measured):
    tree = dynamics.open_run(run[0])
    schema.check(tree)
    assert measured["retained"].values.tolist() == [False, True]
    assert tree["score"]["retained"].values.tolist() == [True]
    assert measured["sample_task"].values.tolist() == ["new"] * 8 + ["old"] * 8
    assert (measured.attrs["matrices"], measured.attrs["of_matrices"]) == (2, 2)
    np.testing.assert_allclose(measured["layer_share"].isel(step=-1).sum("layer"), 1)
    assert [finding["code"] for finding in json.loads(tree.attrs["findings"])].count("OD417") == 0


def test_first_order_is_the_derivative_at_the_start(run, measured):
    """Twin: the base model's losses with a small share of the product added, in place of θ₀ by zero factors."""
    model = run[1].model
    names = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    share = 0.02
    values = {sign: [p.detach() * (sign * share) for p in names.values()] for sign in (1, -1)}
    ends = []
    for sign in (1, -1):
        with swapped(list(names.values()), values[sign]):
            ends.append(all_losses(model))
    slope = (ends[0] - ends[1]) / (2 * share)
    expected = [slope[:8].mean(), slope[8:].mean()]
    np.testing.assert_allclose(measured["predicted_first"].sel(step=4), expected, rtol=2e-2, atol=2e-5)


def test_the_standard_preset_records_losses_and_says_why_nothing_is_predicted(tmp_path):
    callback = DynamicsCallback(tmp_path, tasks(), at=[1], strict=True)
    trainer(tmp_path, [callback], small(), save_strategy="no", max_steps=1).train()
    tree = dynamics.open_run(tmp_path)
    one = tree["loss"].to_dataset().load()
    assert one["step"].values.tolist() == [0, 1]
    assert np.isfinite(one["change"]).all()
    assert np.isnan(one["predicted_first"]).all()
    assert one["reason"].values.tolist() == ["", NOT_ASKED]
    assert "layer_share" not in one
    schema.check(tree)
    assert [finding["code"] for finding in json.loads(tree.attrs["findings"])].count("OD417") == 0


def test_checkpoints_alone_tell_the_same(run, measured, tmp_path):
    for step in (2, 4):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / f"checkpoint-{step}").symlink_to(run[0] / f"checkpoint-{step}")
    tree = analyze_run(tmp_path / "run", probe=load, report=False)
    schema.check(tree)
    alone = tree["loss"].to_dataset().load()
    assert not alone["recorded"].any()
    assert alone["step"].values.tolist() == [0, 2, 4]
    for name in ("sample_loss", "change", "change_low", "change_high"):
        np.testing.assert_allclose(alone[name], measured[name], rtol=1e-4, atol=2e-5)
    for name in ("predicted_first", "predicted_second"):
        np.testing.assert_allclose(alone[name], measured[name], rtol=1e-3, atol=2e-5)
    assert alone["scale"].values.tolist() == [0.25, 0.5, 0.75]
    assert alone.attrs["scaled_step"] == 4
    model = load(str(run[0] / "checkpoint-4"))[0]
    left = [p for name, p in model.named_parameters() if "lora_B" in name]
    with swapped(left, [p.detach() / 2 for p in left]):
        np.testing.assert_allclose(alone["scaled_loss"].sel(scale=0.5), all_losses(model), rtol=1e-5)
    reopened = dynamics.open_run(tmp_path / "run")["loss"].to_dataset().load()
    xr.testing.assert_identical(reopened, alone)


def test_records_win_over_checkpoints_and_scales_are_added(run, measured):
    analyze_run(run[0], probe=load, report=False, out=run[0].parent / "both")
    both = dynamics.open_run(run[0].parent / "both")["loss"].to_dataset().load()
    assert both["recorded"].values.tolist() == [False, True, True]
    np.testing.assert_array_equal(both["sample_loss"], measured["sample_loss"])
    np.testing.assert_allclose(both["predicted_first"], measured["predicted_first"])
    assert both.sizes["scale"] == 3


def test_dense_checkpoints_count_from_the_first(tmp_path):
    """Without a checkpoint of step 0 nobody knows where the weights began."""
    model = llama()
    trainer(tmp_path, [], model, save_strategy="steps", save_steps=1, max_steps=2).train()

    def load_dense(folder: str):
        return type(model).from_pretrained(folder), tasks()

    tree = analyze_run(tmp_path, probe=load_dense, report=False)
    one = tree["loss"].to_dataset().load()
    assert one.attrs["start_step"] == 1
    assert one["step"].values.tolist() == [1, 2]
    first, last = (all_losses(load_dense(str(tmp_path / f"checkpoint-{step}"))[0]) for step in (1, 2))
    np.testing.assert_allclose(one["sample_loss"].isel(step=0), first, rtol=1e-6)
    np.testing.assert_allclose(one["change"].sel(step=2, task="old"), (last - first)[8:].mean(), rtol=1e-5)
    assert one.attrs["matrices"] == one.attrs["of_matrices"] > 7
    change, first_order = (one[name].sel(step=2).values for name in ("change", "predicted_first"))
    assert (np.abs(first_order - change) < 0.2 * np.abs(change) + 0.02).all()


def test_a_resumed_training_counts_from_its_start(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    callback = DynamicsCallback(tmp_path, tasks(), preset="standard", at=[1, 2], strict=True)
    trainer(tmp_path, [callback], small(), **settings, max_steps=1).train()
    callback = DynamicsCallback(tmp_path, tasks(), preset="full", at=[1, 2], strict=True)
    again = trainer(tmp_path, [callback], small(), **settings, max_steps=2)
    again.train(resume_from_checkpoint=True)
    one = dynamics.open_run(tmp_path)["loss"].to_dataset().load()
    assert one["step"].values.tolist() == [0, 1, 2]
    np.testing.assert_allclose(one["sample_loss"].sel(step=0), all_losses(small()), rtol=1e-6)
    model = again.model
    np.testing.assert_array_equal(one["sample_loss"].sel(step=2), all_losses(model))
    assert np.isfinite(one["predicted_second"].values).all(1).tolist() == [True, False, True]


def simple(model: nn.Module, batch) -> Tensor:
    return (model(batch["x"]) - 1).square().sum(1)


def simple_task(**options) -> Task:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    return Task("x", [{"x": row} for row in rows], loss=simple, **options)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def steps(model: nn.Module, folder: Path, count: int, between=None, **options) -> xr.Dataset:
    """Train by hand up to a step; between steps 1 and 2 something may happen."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    batch = {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(9))}
    options |= {"preset": "full", "every": 1, "tasks": [simple_task(retained=True)], "strict": True}
    with Recorder(folder, model, **options) as recorder:
        for step in range(1 + options.get("resume_from", 0), count + 1):
            with recorder.step(step, optimizer):
                simple(model, batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if step == 1 and between is not None:
                between(model)
    return dynamics.open_run(folder)["loss"].to_dataset().load()


def test_any_loop_with_dense_weights_and_biases(tmp_path):
    model = Net()
    one = steps(model, tmp_path, 3)
    assert one["matrix"].values.tolist() == ["first", "second", "first.bias", "second.bias"]
    assert (one["retained"].values == [True]).all()
    np.testing.assert_allclose(one["predicted_first"].values[1], one["change"].values[1], rtol=0.1)
    assert np.isnan(one["predicted_second"].values[1:]).all()  # a loss of one's own has no labels to draw


def test_a_change_of_what_is_trained_ends_predictions_and_says_so(tmp_path):
    one = steps(Net(), tmp_path, 3, lambda model: model.second.requires_grad_(False))
    assert np.isfinite(one["change"]).all()
    assert np.isfinite(one["predicted_first"].values[:2]).all()
    assert np.isnan(one["predicted_first"].values[2:]).all()
    assert one["reason"].values[-1] == "what is trained changed after step 1"
    findings = json.loads(dynamics.open_run(tmp_path).attrs["findings"])
    assert any(f["code"] == "OD417" and "what is trained changed after step 1" in f["message"] for f in findings)


def adapted(**options) -> nn.Module:
    """Adapters whose increments have more columns than their matrices have."""
    torch.manual_seed(0)
    return get_peft_model(Net(), LoraConfig(target_modules=["first", "second"], r=2, **options))


def merge_and_restart(model: nn.Module) -> None:
    """Merge the adapters into their bases and start them again, as ReLoRA does."""
    with torch.no_grad():
        for layer in (module for module in model.modules() if hasattr(module, "get_delta_weight")):
            layer.base_layer.weight += layer.get_delta_weight("default")
            layer.lora_B["default"].weight.zero_()
            layer.lora_A["default"].weight.normal_()


def test_a_restart_before_the_training_was_resumed_does_not_move_the_start(tmp_path):
    model = adapted()
    before = steps(model, tmp_path, 3, merge_and_restart)
    after = steps(model, tmp_path, 5, resume_from=3)
    assert after["step"].values.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(after["sample_loss"].values[:4], before["sample_loss"].values)
    assert after["reason"].values[2:].tolist() == ["what is trained changed after step 1"] * 4
    assert np.isnan(after["predicted_first"].values[2:]).all()


def test_a_resumed_adapter_without_records_has_a_start_only_if_it_began_at_zero(tmp_path):
    known = steps(adapted(), tmp_path / "zero", 3, resume_from=2)
    assert known["step"].values.tolist() == [0, 3]
    unknown = steps(adapted(init_lora_weights=False), tmp_path / "other", 4, resume_from=2)
    assert unknown["step"].values.tolist() == [3, 4]
    assert unknown["reason"].values.tolist() == ["", LATE]


def test_where_matrices_are_chosen_losses_count_from_the_start_all_the_same(tmp_path):
    model = adapted()
    begin = losses_of(model, simple_task()).numpy()
    one = steps(model, tmp_path, 2, matrices="first")
    assert one["step"].values.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(one["sample_loss"].sel(step=0), begin)
    assert np.isnan(one["predicted_first"]).all()
    assert one["reason"].values.tolist() == ["", *["the start of second is unknown"] * 2]


def test_what_no_recorder_writes_into_a_record_is_not_read(tmp_path):
    plain = steps(adapted(), tmp_path, 1)
    (path,) = (tmp_path / "dynamics" / "records").glob("step-*1.safetensors")
    groups = read_record(path)
    groups["loss"] = (
        groups["loss"]
        .assign(scaled_loss=("more", [1.0]))
        .assign_coords(recorded=("step", [False]), reason=("more", ["x"]))
        .assign_attrs(scaled_step="one")
    )
    path.write_bytes(encoded_record(1, groups))
    xr.testing.assert_identical(dynamics.open_run(tmp_path)["loss"].to_dataset().load(), plain)


def test_a_quadratic_is_exact_to_first_and_second_order():
    """ℓ(θ₀ + λδ) = a + bλ + cλ²: b from gradients, and what scaled losses say of c."""
    model = nn.Linear(3, 2).double()
    one = Task("x", [{"x": row} for row in torch.randn(6, 3).double()], loss=simple)
    changes = {"weight": torch.randn(2, 3).double(), "bias": torch.randn(2).double()}
    at_start = losses_of(model, one)
    tables = predictions(model, [one], changes)
    b = sum(tables.slopes["x"].values())
    with swapped(list(model.parameters()), [p.detach() + changes[name] for name, p in model.named_parameters()]):
        now = losses_of(model, one)
        scaled, problem = losses_along(model, [one], changes, [0.25, 0.5, 0.75])
    c = now - at_start - b
    assert problem == ""
    for scale, row in zip((0.25, 0.5, 0.75), scaled, strict=True):
        torch.testing.assert_close(row, at_start + scale * b + scale**2 * c, rtol=1e-9, atol=1e-9)
    assert tables.quadratics == {}


class Words(nn.Module):
    """Logits are linear in the weights: the Hessian of the cross-entropy is its Fisher."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 12)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None):
        logits = self.table(input_ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def test_second_order_is_right_up_to_the_third():
    torch.manual_seed(0)
    model = Words().double()
    rows = torch.randint(12, (200, 30))
    one = Task("x", [{"input_ids": row, "labels": row} for row in rows], loss="mean", batch_size=50)
    change = torch.randn(12, 12).double()
    start, errors = losses_of(model, one).mean(), []
    for scale in (0.4, 0.2):
        changes = {"table": scale * change}
        tables = predictions(model, [one], changes)
        assert tables.reason == ""
        first = float(sum(tables.slopes["x"].values()).mean())
        second = first + float(tables.quadratics["x"].mean()) / 2
        with swapped([model.table.weight], [model.table.weight.detach() + changes["table"]]):
            observed = float(losses_of(model, one).mean() - start)
        errors.append((abs(first - observed), abs(second - observed)))
    (first, second), (half_first, half_second) = errors
    assert 0.2 < half_first / first < 0.3  # the error of the first order is quadratic
    assert second < 0.2 * first
    assert half_second < 0.2 * half_first


def test_a_start_that_nobody_knows_is_named():
    model = Net()
    probe = LossProbe(model, [simple_task()], None)
    record = probe.record(5, lambda: ([], {}))
    assert record.attrs["reason"] == LATE
    assert np.isnan(record["start_loss"]).all()
    assert np.isfinite(record["sample_loss"]).all()
    record = LossProbe(model, [simple_task()], dict(outside(model))).record(5, lambda: ([], {}))
    assert record.attrs["reason"] == "the start of first, second is unknown"


def test_a_sample_without_a_loss_costs_itself_alone(tmp_path):
    model, rows = nn.Linear(1, 1), [1.0, 0.0, 2.0]

    def ratio(model: nn.Module, batch) -> Tensor:
        return model(batch["x"])[:, 0] / batch["x"][:, 0]

    one = Task("x", [{"x": [value]} for value in rows], loss=ratio)
    probe = LossProbe(model, [one], {"bias": model.bias.detach().clone()})
    values = [(model.weight, model.weight.detach() - 1)]
    record = probe.record(1, lambda: (values, {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}))
    changes = loss_changes(record.assign_coords(reason=("step", [""]), recorded=("step", [True])))
    assert changes.attrs["samples"] == 2
    np.testing.assert_allclose(changes["change"].values[1], 1, rtol=1e-6)
    np.testing.assert_allclose(changes["predicted_first"].values[1], 1, rtol=1e-6)


def test_only_adapters_that_began_at_zero_have_a_known_start():
    assert starts_at_zero(small())
    assert not starts_at_zero(lora_llama(init_lora_weights=False))
    assert not starts_at_zero(lora_llama(modules_to_save=["lm_head"]))
    assert not starts_at_zero(llama())


def test_bf16_adapters_are_predicted_beside_their_weights():
    model = lora_llama(target_modules=["q_proj", "v_proj"], lora_dropout=0.0).to(torch.bfloat16).eval()
    left = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    changes, _, after = trained(model, lr=3.0)
    tables = predictions(model, tasks(), changes)
    assert tables.reason == ""
    base = all_losses(model)
    with swapped(list(left.values()), [after[_plain(name, after)].to(torch.bfloat16) for name in left]):
        now = all_losses(model)
    assert math.isfinite(float(np.abs(now - base).max()))
    assert all(torch.isfinite(slope).all() for slopes in tables.slopes.values() for slope in slopes.values())


def _plain(name: str, after: dict[str, Tensor]) -> str:
    return next(key for key in after if name.endswith(key))
