"""Critical sharpness in the records of a training with the preset "full"."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

import dynamics
from dynamics import DynamicsCallback, Recorder, analyze_run, schema
from dynamics.recording.fisher import FisherProbe, descent_rate
from dynamics.store.record_file import decoded_record, encoded_record
from dynamics.store.records import OPTIONAL, TABLES
from probes import Task
from tests.records import records_of
from tests.runs import losses, random_states, trainer
from tests.updates import probe_tasks, small_llama

#: L = ½ Σ h w², one coordinate a sample pair.
CURVATURES = torch.tensor([1.0, 4.0], dtype=torch.float64)


def squares(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    weights = model(torch.eye(2, dtype=torch.float64))[:, 0]
    return (0.5 * CURVATURES * weights.square()).sum().expand(len(batch["x"]))


def quadratic() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    nn.init.ones_(model[0].weight)
    return model


def descend(folder, optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 3, **options):
    task = Task("square", [{"x": [1.0]}] * 2, loss=squares)
    with Recorder(folder, model, tasks=[task], every=1, **{"preset": "full", "strict": True} | options) as recorder:
        for step in range(1, steps + 1):
            with recorder.step(step, optimizer):
                optimizer.zero_grad()
                squares(model, {"x": torch.ones(1)}).mean().backward()
                optimizer.step()
    return dynamics.open_run(folder)


def test_of_gradient_descent_it_is_the_curvature_along_the_gradient(tmp_path):
    model = quadratic()
    tree = descend(tmp_path, torch.optim.SGD(model.parameters(), lr=0.3), model)
    schema.check(tree)
    sharpness = tree["sharpness"].to_dataset().load()
    assert sharpness["step"].values.tolist() == [1, 2, 3]
    assert sharpness["from_step"].values.tolist() == [0, 1, 2]
    assert sharpness["learning_rate"].values.tolist() == [0.3] * 3
    assert sharpness["recorded"].all()
    weights = torch.ones(2, dtype=torch.float64)
    for step in (1, 2, 3):
        gradient = CURVATURES * weights
        expected = float((CURVATURES * gradient.square()).sum() / gradient.square().sum())
        assert sharpness["critical_sharpness"].sel(step=step, task="square").item() == pytest.approx(expected, rel=1e-6)
        weights = weights - 0.3 * gradient


def test_of_another_optimizer_it_is_along_its_increment(tmp_path):
    model = quadratic()
    tree = descend(tmp_path, torch.optim.Adam(model.parameters(), lr=0.1), model, steps=1)
    sharpness = tree["sharpness"].to_dataset().load()
    assert np.isnan(sharpness["learning_rate"].item())
    # From (1, 1) along (−0.1, −0.1), in both coordinates alike: back where it began after 20 steps.
    assert sharpness["critical_step"].sel(step=1, task="square").item() == pytest.approx(20, rel=1e-6)


def test_other_presets_do_not_measure_it(tmp_path):
    model = quadratic()
    tree = descend(tmp_path, torch.optim.SGD(model.parameters(), lr=0.1), model, steps=1, preset="standard")
    assert "sharpness" not in tree.children


def trained(folder, *, probes: bool):
    model = small_llama()
    callbacks = [DynamicsCallback(folder, probe_tasks(groups=4), preset="full", at=[1, 3])] if probes else []
    training = trainer(folder, callbacks, model, save_strategy="no", max_steps=3)
    training.train()
    return training, random_states(), [p.detach().clone() for p in model.parameters()]


def test_a_trainer_does_not_notice_and_the_next_search_starts_where_the_last_ended(tmp_path):
    training, states, weights = trained(tmp_path / "run", probes=True)
    plain, plain_states, plain_weights = trained(tmp_path / "plain", probes=False)
    assert states == plain_states
    assert losses(training.state.log_history) == losses(plain.state.log_history)
    assert all(map(torch.equal, weights, plain_weights))
    sharpness = dynamics.open_run(tmp_path / "run")["sharpness"].to_dataset().load()
    assert sharpness["step"].values.tolist() == [1, 3]
    assert {"all", "report", "vqa"} == set(sharpness["task"].values.tolist())
    # With B = 0 at the start, the first increment has none; later ones have a value or a reason.
    assert ((sharpness["critical_step"] > 0) | (sharpness["reason"] != "")).all()
    tree = analyze_run(tmp_path / "run", report=False)
    xr.testing.assert_identical(tree["sharpness"].to_dataset().load(), sharpness)


def test_a_record_gives_it_back_and_a_broken_one_costs_only_itself(tmp_path):
    model = quadratic()
    descend(tmp_path, torch.optim.SGD(model.parameters(), lr=0.3), model, steps=2)
    records = records_of(tmp_path).records
    group = records[2]["sharpness"]
    xr.testing.assert_identical(decoded_record(2, encoded_record(2, {"sharpness": group}))["sharpness"], group)
    for words, broken in (
        ("has a number in 'critical_step'", group.assign(critical_step=group["critical_step"] * 1e300)),
        ("holds no text in 'reason'", group.assign(reason=group["critical_step"])),
        ("is an increment since a later step", group.assign_coords(from_step=("step", np.array([2])))),
    ):
        assert schema.check_record({"sharpness": broken}, TABLES, OPTIONAL)["sharpness"].startswith(words)
    assert not schema.check_record({"sharpness": group}, TABLES, OPTIONAL)


@pytest.mark.parametrize(
    ("optimizer", "changes", "expected"),
    [
        (torch.optim.SGD, {}, 0.5),
        (torch.optim.SGD, {"momentum": 0.9}, None),
        (torch.optim.SGD, {"weight_decay": 0.1}, None),
        (torch.optim.SGD, {"maximize": True}, None),
        (torch.optim.AdamW, {}, None),
    ],
)
def test_only_plain_gradient_descent_has_a_rate(optimizer, changes, expected):
    rate = descent_rate(optimizer([nn.Parameter(torch.zeros(1))], lr=0.5, **changes))
    assert rate == expected or (expected is None and np.isnan(rate))


def test_a_trainer_wraps_its_optimizer():
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    assert descent_rate(AcceleratedOptimizer(inner)) == 0.5


def test_an_intervention_that_fails_costs_only_itself(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no room")

    monkeypatch.setattr(FisherProbe, "intervene", fail)
    model = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.warns(UserWarning, match="no room"):
        tree = descend(tmp_path, optimizer, model, steps=2, intervene=1, strict=False)
    assert "intervention" not in tree.children
    assert tree["fisher"]["step"].values.tolist() == tree["sharpness"]["step"].values.tolist() == [1, 2]
    assert tree["loss"]["step"].values.tolist() == [0, 1, 2]


def test_two_rates_are_none():
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}]
    assert np.isnan(descent_rate(torch.optim.SGD(groups)))
    assert np.isnan(descent_rate(object()))
