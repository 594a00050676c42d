"""A training that is intervened on: what its record says, and that the training does not notice."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from transformers import TrainerCallback

import dynamics
from dynamics import DynamicsCallback, Recorder, analyze_run, schema
from probes import Task, gradient_gram, watched_matrices
from tests.records import records_of
from tests.runs import losses, random_states, trainer
from tests.updates import probe_tasks, small_llama

ARMS = ("on", "off", "random")


class Weights(TrainerCallback):
    """Keeps what is trained after each step, and how the model stands."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept, self.modes = {0: self.now()}, []

    def now(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def on_step_end(self, args, state, control, **kwargs):
        self.kept[state.global_step] = self.now()
        self.modes += [module.training for module in self.model.modules()]


def train(folder: Path, *, intervenes: bool):
    """Four steps of Adam with dropout; interventions at the first and the last."""
    model = small_llama()
    weights = Weights(model)
    callbacks = [weights]
    if intervenes:
        callback = DynamicsCallback(folder, probe_tasks(), at=[2], intervene=[1, 4], arms=ARMS, k=(2, 1))
        callbacks.insert(0, callback)
    training = trainer(folder, callbacks, model, save_strategy="no", max_steps=4)
    training.train()
    return training, weights, random_states()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interventions") / "run"
    return folder, *train(folder, intervenes=True)


def test_the_training_does_not_notice(run, tmp_path):
    _, training, weights, states = run
    plain, others, expected = train(tmp_path, intervenes=False)
    assert states == expected
    assert losses(training.state.log_history) == losses(plain.state.log_history)
    assert weights.modes == others.modes
    for step, values in others.kept.items():
        assert all(torch.equal(value, weights.kept[step][name]) for name, value in values.items())
    ours, theirs = (training.optimizer.state_dict()["state"] for training in (training, plain))
    for number, state in theirs.items():
        assert all(torch.equal(value, ours[number][name]) for name, value in state.items())


def test_only_the_chosen_steps_are_captured_and_intervened_on(run):
    records = records_of(run[0]).records
    assert {step: "intervention" in groups for step, groups in records.items()} == {1: True, 2: False, 4: True}
    assert all("fisher" in groups for groups in records.values())
    assert [records[step]["intervention"]["from_step"].item() for step in (1, 4)] == [0, 2]
    configuration = json.loads(dynamics.open_run(run[0]).attrs["configuration"])
    assert configuration["intervene"] == [1, 4]
    assert configuration["arms"] == ["full", *ARMS]
    assert configuration["k"] == [2, 1]


@pytest.mark.parametrize(("step", "before"), [(1, 0), (4, 2)])
def test_effects_are_those_at_the_weights_where_the_increment_began(run, step, before):
    """From B = 0, too."""
    folder, _, weights, _ = run
    model = small_llama()
    named = dict(model.named_parameters())

    def load(at: int) -> dict[str, torch.Tensor]:
        for name, value in weights.kept[at].items():
            named[name].data.copy_(value)
        return {name: matrix.to_dense().clone() for name, matrix in watched_matrices(model).items()}

    after, start = load(step), load(before)
    change = {name: after[name].double() - start[name].double() for name in after}
    tasks = probe_tasks()
    gram = gradient_gram(model, tasks, update=change)
    arms = dynamics.counterfactuals(model, tasks, gram, change, arms=ARMS, k=(2, 1))
    expected = dynamics.intervene(model, tasks, arms, step=step)
    recorded = records_of(folder).records[step]["intervention"]
    assert set(recorded) == set(expected)
    assert recorded["headline"].values.tolist() == [[False, True]]
    size = float(np.abs(expected["effect"]).max())
    for name in ("effect", "effect_low", "effect_high", "predicted_effect", "interaction", "excess"):
        np.testing.assert_allclose(recorded[name], expected[name], atol=2e-3 * size, err_msg=name)
    np.testing.assert_allclose(recorded["captured"], expected["captured"], rtol=1e-4)


def test_a_result_has_them(run):
    opened = dynamics.open_run(run[0])
    schema.check(opened)
    tree = analyze_run(run[0], report=False)
    for result in (opened, tree, dynamics.open_run(run[0])):
        group = result["intervention"].to_dataset().load()
        assert group["step"].values.tolist() == [1, 4]
        assert group["arm"].values.tolist() == ["full", *ARMS]
        assert group["recorded"].all()
        assert group["resolved"].dtype == bool
        xr.testing.assert_identical(group, opened["intervention"].to_dataset().load())


def test_a_summary_is_logged(run):
    logged = {entry["step"]: entry for entry in run[1].state.log_history if "dynamics/total/frobenius_norm" in entry}
    effects = dynamics.open_run(run[0])["intervention"]["effect"].sel(k=2, scale=1.0, task="all")
    for step in (1, 4):
        for arm in ("full", "on", "off"):
            assert logged[step][f"dynamics/intervention/{arm}"] == effects.sel(step=step, arm=arm)
    assert "dynamics/intervention/full" not in logged[2]


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"intervene": 5}, "Expected tasks with intervene, got none"),
        ({"arms": ["on"]}, "Expected intervene with arms and k, got none"),
        ({"tasks": probe_tasks(), "intervene": 5, "arms": ["of"]}, "Expected arms among full, on, off"),
        ({"tasks": probe_tasks(), "intervene": 5, "k": 0}, "from 1 to the number of probe samples, got 0."),
        ({"tasks": probe_tasks(), "intervene": 0}, "Expected an interval of at least 1 step, got 0."),
        ({"tasks": probe_tasks(), "intervene": True}, "Expected an interval in steps, a list of steps or a schedule"),
    ],
)
def test_a_mistake_is_refused_at_once(tmp_path, choices, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        DynamicsCallback(tmp_path, **choices)


# ---- any loop ----


def squares(model, batch):
    return model(batch["x"]).square().sum(1)


def rows_task(groups: int = 6, loss=squares) -> Task:
    generator = torch.Generator().manual_seed(2)
    samples = [{"x": torch.randn(4, generator=generator), "image": str(number % groups)} for number in range(12)]
    return Task("x", samples, group="image", loss=loss)


def dense() -> nn.Module:
    """Weights, biases, a norm and dropout, all trained."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Dropout(0.2), nn.Linear(3, 2))


def loop(run: Path, model: nn.Module, task: Task | None, steps: int = 2, **options):
    """Plain steps; parameters, gradients and random states after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    states = []
    with Recorder(run, model, tasks=task and [task], at=range(1, steps + 1), **options) as recorder:
        for step in range(1, steps + 1):
            with recorder.step(step, optimizer):
                optimizer.zero_grad()
                model(torch.randn(5, 4)).square().sum().backward()
                optimizer.step()
            states.append([copy.deepcopy([(p.data, p.grad) for p in model.parameters()]), random_states()])
    return states


def test_any_loop_is_left_alone(tmp_path):
    told: list[tuple[int, int]] = []
    seen = loop(
        tmp_path / "a", dense(), rows_task(), intervene=lambda step: step == 2, progress=lambda *pair: told.append(pair)
    )
    unseen = loop(tmp_path / "b", dense(), None)
    for (parameters, state), (others, expected) in zip(seen, unseen, strict=True):
        assert state == expected
        for pair, other in zip(parameters, others, strict=True):
            assert all(torch.equal(one, two) for one, two in zip(pair, other, strict=True))
    record = records_of(tmp_path / "a").records[2]["intervention"]
    assert record["arm"].values.tolist() == ["full", "on", "off", "random", "matched"]
    assert np.isfinite(record["effect"].sel(scale=1.0)).all()
    ends = [number for number, (done, total) in enumerate(told) if done == total]
    assert len(ends) == 3  # K twice, and the arms of step 2
    assert told[-1] == (12 * (3 + 2 + 2 * 9),) * 2


def too_late(model, batch):
    """A loss that can be differentiated, and fails where it is only evaluated."""
    if not torch.is_grad_enabled():
        raise RuntimeError("no loss today")
    return squares(model, batch)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (rows_task(groups=3), "ValueError: Expected at least 4 groups, half for directions and half for losses"),
        (rows_task(loss=too_late), "RuntimeError: no loss today"),
    ],
)
def test_a_fault_is_a_gap_and_costs_nothing_else(tmp_path, task, words):
    model = dense()
    start = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=re.escape(words)) as warned:
        states = loop(tmp_path, model, task, intervene=1)
    assert sum("could not record step" in str(warning.message) for warning in warned) == 1
    records = records_of(tmp_path)
    assert [set(groups) for groups in records.records.values()] == [{"update", "gradient", "fisher"}] * 2
    assert [gap["step"] for gap in records.attributes["gaps"]] == [1, 2]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    assert not torch.equal(states[-1][0][0][0], start[0])


def test_a_training_shorter_than_the_first_step_to_intervene_says_so(tmp_path):
    with pytest.warns(UserWarning, match="OD415 No update was intervened on: the training ended at step 2, before"):
        loop(tmp_path, dense(), rows_task(), intervene=500)
    findings = records_of(tmp_path).attributes["findings"]
    (finding,) = [finding for finding in findings if finding["code"] == "OD415"]
    assert finding["step"] == 2
    assert "intervene=[100]" in finding["remedy"]


def test_a_training_that_reached_it_or_never_asked_does_not(tmp_path):
    loop(tmp_path / "reached", dense(), rows_task(), intervene=2)
    loop(tmp_path / "unasked", dense(), rows_task())
    for name in ("reached", "unasked"):
        codes = [finding["code"] for finding in records_of(tmp_path / name).attributes["findings"]]
        assert "OD415" not in codes


def test_strict_raises(tmp_path):
    with pytest.raises(ValueError, match="Expected at least 4 groups"):
        loop(tmp_path, dense(), rows_task(groups=3), intervene=1, strict=True)
