"""The optimizer's null in the records of a training."""

import numpy as np
import pytest
import torch
from torch import nn

import dynamics
from dynamics import Recorder, schema
from dynamics.findings import from_json
from dynamics.fisher.concentration import DRAWN
from dynamics.recording import fisher
from dynamics.store.record_file import decoded_record, encoded_record
from probes import Task, gradient_gram
from tests.records import records_of

NULLS = ("null_optimizer", "gain_optimizer", "gain_optimizer_low", "gain_optimizer_high_centred")


def squares(model, batch):
    return (model(batch["x"]) - batch["y"]).square().sum(1)


def samples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    y = torch.stack([x[:, 0] * 2, x[:, 1] - x[:, 2]], 1) + 0.1 * torch.randn(count, 2, generator=generator)
    return [{"x": one, "y": other} for one, other in zip(x.tolist(), y.tolist(), strict=True)]


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))


def trained(folder, make, *, steps=24, at=(12, 24), recorded=True, given=True):
    """A training of a small model; its weights at the end."""
    model, data = layers(), samples(16 * steps, 1)
    optimizer = make(model.parameters())
    task = Task("t", samples(40, 2), loss=squares)
    options = {"tasks": [task], "at": list(at), "batch_size": 4, "strict": True}
    recorder = Recorder(folder, model, **options) if recorded else None
    for step in range(1, steps + 1):
        rows = data[4 * step : 4 * step + 4]
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("x", "y")}
        if recorder is None:
            take(model, optimizer, batch)
        else:
            with recorder.step(step, optimizer if given else None):
                take(model, optimizer, batch)
    if recorder is not None:
        recorder.close()
    return model


def told(tree):
    """What is said about a null that is missing."""
    return [finding.message for finding in from_json(tree.attrs["findings"]) if finding.code == "OD335"]


def take(model, optimizer, batch):
    optimizer.zero_grad()
    squares(model, batch).mean().backward()
    optimizer.step()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def test_records_of_an_adamw_training_have_it(tmp_path):
    trained(tmp_path, adamw)
    tree = dynamics.open_run(tmp_path)
    schema.check(tree)
    shares = tree["concentration"].to_dataset()
    for name in NULLS:
        assert np.isfinite(shares[name].sel(k=[1, 2, 4]).values).all(), name
    assert shares["optimizer_gradients"].values == pytest.approx([12, 24], rel=1e-3)
    assert not (shares["gain_optimizer"] == shares["gain"]).any()
    assert not told(tree)


def test_a_record_holds_what_the_probe_measures(tmp_path):
    """After the step, with the optimizer's state as it then is, at the weights where the increment began."""
    optimizers = []
    start = {name: value.clone() for name, value in layers().state_dict().items()}
    model = trained(tmp_path, lambda p: optimizers.append(adamw(p)) or optimizers[0], steps=12, at=[12])
    record = records_of(tmp_path).records[12]["fisher"]
    model.load_state_dict(start)
    task = Task("t", samples(40, 2), loss=squares)
    found = gradient_gram(model, [task], optimizer=optimizers[0])
    for name in ("preconditioned_product", "preconditioned_gram"):
        for block, values in getattr(found, name).items():
            stored = torch.from_numpy(record[name].sel(block=block).values[0])
            torch.testing.assert_close(stored, values, rtol=1e-5, atol=1e-6 * float(values.abs().max()))


def test_plain_sgd_stores_nothing_twice(tmp_path):
    trained(tmp_path, lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9))
    for groups in records_of(tmp_path).records.values():
        assert "preconditioned_gram" not in groups["fisher"]
        assert groups["fisher"]["plain_optimizer"].item() == 1
    shares = dynamics.open_run(tmp_path)["concentration"].to_dataset()
    for name in ("gain", "gain_low", "gain_high", "ln_gain"):
        np.testing.assert_array_equal(shares[name], shares[name.replace("gain", "gain_optimizer")])
    assert np.isfinite(shares["gain"].sel(k=1).values).all()


def test_muon_is_measured_by_draws(tmp_path):
    trained(tmp_path, lambda parameters: torch.optim.Muon(parameters, lr=1e-2))
    for groups in records_of(tmp_path).records.values():
        assert groups["fisher"]["drawn_norm_squared"].shape == (1, 3, 8 * DRAWN)
    shares = dynamics.open_run(tmp_path)["concentration"].to_dataset()
    assert np.isfinite(shares["gain_optimizer"].sel(k=[1, 2, 4]).values).all()


def test_an_optimizer_that_is_unknown_is_named(tmp_path):
    trained(tmp_path, torch.optim.Adadelta)
    tree = dynamics.open_run(tmp_path)
    assert np.isnan(tree["concentration"]["gain_optimizer"].values).all()
    assert np.isfinite(tree["concentration"]["gain"].sel(k=1).values).all()
    (message,) = told(tree)
    assert "the preconditioner of Adadelta (torch.optim.adadelta) is unknown." in message


def test_a_recorder_without_an_optimizer_says_so(tmp_path):
    trained(tmp_path, adamw, given=False)
    (message,) = told(dynamics.open_run(tmp_path))
    assert "gradients: the optimizer is unknown." in message


def test_records_that_would_be_too_large_are_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fisher, "MOST_BYTES", 3 * fisher.record_bytes(3, 40) - 1)
    trained(tmp_path, adamw)
    tree = dynamics.open_run(tmp_path)
    assert np.isnan(tree["concentration"]["gain_optimizer"].values).all()
    (message,) = told(tree)
    assert "a record would take 0.0 MiB with it." in message


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=1e-2), lambda p: torch.optim.Muon(p, lr=1e-2)])
def test_what_takes_no_room_is_there_all_the_same(tmp_path, monkeypatch, make):
    """Plain gradients are stored once, and those drawn for Muon are few."""
    monkeypatch.setattr(fisher, "MOST_BYTES", 3 * fisher.record_bytes(3, 40) - 1)
    trained(tmp_path, make)
    tree = dynamics.open_run(tmp_path)
    assert np.isfinite(tree["concentration"]["gain_optimizer"].sel(k=1).values).all()
    assert not told(tree)


def test_the_training_is_the_same_bit_for_bit(tmp_path):
    for make in (adamw, torch.optim.Muon):
        recorded, alone = trained(tmp_path / make.__name__, make), trained(tmp_path, make, recorded=False)
        for one, other in zip(recorded.parameters(), alone.parameters(), strict=True):
            assert torch.equal(one, other)


def test_it_survives_a_record(tmp_path):
    trained(tmp_path, adamw)
    for step, groups in records_of(tmp_path).records.items():
        again = decoded_record(step, encoded_record(step, groups))["fisher"]
        for name in schema.OPTIMIZER_RECORD.keys() & set(again):
            np.testing.assert_allclose(again[name], groups["fisher"][name], rtol=1e-6)


def test_a_training_that_changes_its_optimizer_has_it_where_it_is_known(tmp_path):
    """Records of different kinds are joined; each step has its own."""
    model, data = layers(), samples(200, 1)
    batch = {name: torch.tensor([row[name] for row in data]) for name in ("x", "y")}
    optimizers = [adamw(model.parameters()), torch.optim.SGD(model.parameters(), lr=1e-2)]
    optimizers.append(torch.optim.Muon(model.parameters(), lr=1e-2))
    options = {"tasks": [Task("t", samples(40, 2), loss=squares)], "every": 12, "batch_size": 4, "strict": True}
    with Recorder(tmp_path, model, **options) as recorder:
        for step in range(1, 37):
            optimizer = optimizers[(step - 1) // 12]
            with recorder.step(step, optimizer):
                take(model, optimizer, batch)
    shares = dynamics.open_run(tmp_path)["concentration"].to_dataset().sel(block="global", k=4)
    assert np.isfinite(shares["gain_optimizer"].values).all()
    assert (shares["gain_optimizer"] == shares["gain"]).values.tolist() == [False, True, False]
