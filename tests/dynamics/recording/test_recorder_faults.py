"""What goes wrong while recording costs a record, never the training, and never what was recorded before."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dynamics
from dynamics import Recorder
from dynamics.store import RecordWriter
from tests.forks import ROUNDS, killed_twenty_times
from tests.records import records_of


def train(
    recorder: Recorder, model: nn.Module, steps: int = 5, *, first: int = 1, gradient: float | None = None
) -> None:
    """Plain steps, with gradients of the loss or of one number."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(first, first + steps):
        with recorder.step(step, optimizer):
            model(torch.ones(1, 4)).square().sum().backward(None if gradient is None else torch.tensor(gradient))
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.fixture
def full_disk(monkeypatch):
    """No room for the records of steps 2 and 3."""
    write = RecordWriter.write

    def refuse(self, step, groups, **kwargs):
        if step in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, step, groups, **kwargs)

    monkeypatch.setattr(RecordWriter, "write", refuse)


def test_a_full_disk_is_one_warning_and_a_gap(model, tmp_path, full_disk):
    with Recorder(tmp_path, model, every=1) as recorder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(recorder, model)
    told = [str(each.message) for each in caught if "optimization-dynamics" in str(each.message)]
    assert told == [
        "optimization-dynamics could not record step 2 (OSError: [Errno 28] No space left on device). Training goes "
        "on, and so does recording at the next captured step. This warning appears once."
    ]
    tree = dynamics.open_run(tmp_path)
    assert tree["update"]["step"].values.tolist() == [1, 4, 5]
    assert tree["update"]["from_step"].values.tolist() == [0, 1, 4]
    (gap,) = [each for each in json.loads(tree.attrs["findings"]) if each["code"] == "OD305"]
    assert gap["evidence"]["steps"] == [2, 3]


def test_gaps_after_the_step_that_is_resumed_from_are_forgotten(model, tmp_path, full_disk):
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Recorder(tmp_path, model, every=1) as recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(recorder, model, steps=3)
    assert [gap["step"] for gap in records_of(tmp_path).attributes["gaps"]] == [2, 3]
    model.load_state_dict(start)
    with Recorder(tmp_path / "checkpoint", model, at=[]) as recorder:
        train(recorder, model, steps=1)
    Recorder(tmp_path, model, every=1, resume_from=1).close()
    assert records_of(tmp_path).attributes["gaps"] == []


def test_an_increment_after_a_gap_is_since_the_last_record(model, tmp_path, full_disk):
    weights = {0: model[0].weight.detach().clone()}
    with Recorder(tmp_path, model, every=1) as recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(1, 5):
            with recorder.step(step, optimizer):
                model(torch.ones(1, 4)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            weights[step] = model[0].weight.detach().clone()
    norm = dynamics.open_run(tmp_path)["update"]["frobenius_norm"].sel(matrix="0", step=4)
    assert float(norm.sel(kind="increment")) == pytest.approx(float((weights[4] - weights[1]).norm()), rel=1e-5)
    assert float(norm.sel(kind="total")) == pytest.approx(float((weights[4] - weights[0]).norm()), rel=1e-5)


def test_strict_raises(model, tmp_path, full_disk):
    with Recorder(tmp_path, model, every=1, strict=True) as recorder, pytest.raises(OSError, match="No space left"):
        train(recorder, model)
    assert list(records_of(tmp_path).records) == [1]


@pytest.mark.parametrize("method", ["measure", "gradients"])
def test_a_failure_to_measure_is_a_gap_too(model, tmp_path, monkeypatch, method):
    with Recorder(tmp_path, model, every=1) as recorder:
        measure = getattr(recorder._live, method)
        calls = []

        def fail(*args):
            calls.append(args)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("out of memory")
            return measure(*args)

        monkeypatch.setattr(recorder._live, method, fail)
        with pytest.warns(UserWarning, match=re.escape("could not record step 2 (OutOfMemoryError: out of memory)")):
            train(recorder, model)
    update = dynamics.open_run(tmp_path)["update"]
    # Without its gradient a step still has its update.
    assert update["step"].values.tolist() == ([1, 3, 4, 5] if method == "measure" else [1, 2, 3, 4, 5])


def test_hooks_are_gone_after_a_step_that_raised(model, tmp_path):
    with Recorder(tmp_path, model, every=1) as recorder:
        with pytest.raises(ZeroDivisionError), recorder.step(1):
            model(torch.ones(1, 4)).sum().backward(torch.tensor(1 / 0))
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        train(recorder, model, steps=2)
    assert dynamics.open_run(tmp_path)["update"]["step"].values.tolist() == [1, 2]


def test_a_step_is_recorded_once(model, tmp_path):
    """A loop that counts anew with each epoch has its first epoch recorded, and no record is written over."""
    with Recorder(tmp_path, model, every=1, strict=True) as recorder:
        train(recorder, model, steps=2)
        train(recorder, model, steps=3)
        assert not recorder.record(3)
    assert dynamics.open_run(tmp_path)["update"]["from_step"].values.tolist() == [0, 1, 2]


def test_a_closed_recorder_does_nothing(model, tmp_path):
    recorder = Recorder(tmp_path, model, every=1)
    train(recorder, model, steps=1)
    recorder.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(recorder, model, steps=2, first=2)
        recorder.close()
        assert not recorder.record(7)
    assert dynamics.open_run(tmp_path)["update"]["step"].values.tolist() == [1]


# ---- when the record is written, and then something fails ----


def increments(run: Path, kind: str = "increment") -> list[float]:
    return dynamics.open_run(run)["update"]["frobenius_norm"].sel(matrix="0", kind=kind).values.tolist()


@pytest.mark.parametrize("preset", ["economy", "full"])
def test_without_a_copy_of_this_step_the_next_increment_is_not_known(model, tmp_path, monkeypatch, preset):
    """Since an older step than it says, it would be a wrong number."""
    weights = {0: model[0].weight.detach().clone()}
    with Recorder(tmp_path, model, every=1, preset=preset) as recorder:
        copied, calls = recorder._live._copied, []

        def fail(*args):
            calls.append(args)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("out of memory")
            return copied(*args)

        monkeypatch.setattr(recorder._live, "_copied", fail)
        with pytest.warns(UserWarning, match=re.escape("could not record step 1 (OutOfMemoryError: out of memory)")):
            train(recorder, model, steps=1)
        weights[1] = model[0].weight.detach().clone()
        for step in range(2, 5):
            train(recorder, model, steps=1, first=step)
            weights[step] = model[0].weight.detach().clone()
    update = dynamics.open_run(tmp_path)["update"]
    assert update["step"].values.tolist() == [1, 2, 3, 4]
    assert update["from_step"].values.tolist() == [0, -1, 2, 3]
    found = increments(tmp_path)
    assert math.isnan(found[1])
    for step in (1, 3, 4):
        expected = float((weights[step] - weights[step - 1]).norm())
        assert found[step - 1] == pytest.approx(expected, rel=1e-5)
    total = float((weights[2] - weights[0]).norm())
    assert increments(tmp_path, "total")[1] == pytest.approx(total, rel=1e-5)


def test_notes_that_cannot_be_written_cost_no_record(model, tmp_path, monkeypatch):
    """What was found is written with the next record."""
    annotate, calls = RecordWriter.annotate, []

    def fail(self, attributes):
        calls.append(attributes)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        annotate(self, attributes)

    with Recorder(tmp_path, model, every=1) as recorder:
        monkeypatch.setattr(RecordWriter, "annotate", fail)
        with pytest.warns(UserWarning, match="^OD302 |^OD304 |could not record step 1") as caught:
            train(recorder, model, steps=3, gradient=math.inf)
    told = [str(each.message) for each in caught]
    assert len([text for text in told if text.startswith("OD304 ")]) == 1  # though it was tried twice
    update = dynamics.open_run(tmp_path)["update"]
    assert (update["step"].values.tolist(), update["from_step"].values.tolist()) == ([1, 2, 3], [0, 1, 2])
    stored = records_of(tmp_path).attributes
    assert "OD304" in [finding["code"] for finding in stored["findings"]]
    assert [gap["step"] for gap in stored["gaps"]] == [1]


def test_a_recorder_that_cannot_close_in_order_gives_the_store_back(model, tmp_path, monkeypatch):
    recorder = Recorder(tmp_path, model, every=1, strict=True)
    train(recorder, model, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "annotate", _full)
        recorder._records.gap(2, "made up")
        with pytest.raises(OSError, match="No space left"):
            recorder.close()
    Recorder(tmp_path, model, every=1, resume_from=1).close()


def test_a_recorder_that_cannot_begin_says_so_and_gives_the_store_back(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write_start", _full)
        with pytest.raises(OSError, match="No space left") as kept:  # as a notebook keeps what was raised
            Recorder(tmp_path, model, every=1)
    Recorder(tmp_path, model, every=1).close()
    assert kept.value.errno == errno.ENOSPC


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_optimizer_that_is_none_of_torchs_costs_the_norm_after_clipping(model, tmp_path):
    class Own:
        def step(self) -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None

    optimizer = Own()
    with Recorder(tmp_path, model, every=1) as recorder, recorder.step(1, optimizer):
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
    gradient = dynamics.open_run(tmp_path)["gradient"].sel(step=1)
    assert (gradient["norm_before_clip"].values > 0).all()
    assert gradient["norm_after_clip"].isnull().all()


# ---- killed ----


class Moving(nn.Module):
    """Two matrices that move by a known amount each step, as if they had been trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (nn.Linear(12, 12, bias=False) for _ in range(2))
        for layer in (self.first, self.second):
            layer.weight.data = torch.randn(12, 12, generator=generator)

    def at(self, step: int) -> Moving:
        for layer, start in zip(self.children(), Moving().children(), strict=True):
            layer.weight.data.copy_(start.weight.data * (1 + 0.01 * step))
        return self


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_training_killed_twenty_times_loses_the_step_in_flight_alone(tmp_path):
    """It resumes as trainings do, from a checkpoint whose weights are of the step of the last record that is kept."""

    def train(after, report):
        warnings.simplefilter("ignore")
        model = Moving().at(after)
        recorder = Recorder(tmp_path, model, preset="economy", every=1, resume_from=after or None)
        for step in range(after + 1, after + 1000):
            recorder.before_backward(step)
            model.at(step)
            assert recorder.after_optimizer_step()
            report(step)

    largest = [float(torch.linalg.svdvals(layer.weight.detach())[0]) for layer in Moving().children()]
    steps: list[list[int]] = []
    for _, left in killed_twenty_times(tmp_path, train, longest=0.05):
        steps.append(list(left.records) if left else [])
        for step, groups in left.records.items() if left else ():
            found = groups["update"]["singular_value"].sel(kind="total")[0, :, 0].values
            np.testing.assert_allclose(found, np.array(largest) * 0.01 * step, rtol=1e-4)
    assert len(steps) == ROUNDS
    assert max(map(len, steps)) > 10


def test_a_captured_step_is_one_sync(model, tmp_path, monkeypatch):
    """And one more where it gives cause to a finding."""
    syncs, notes, sync, annotate = [], [], os.fsync, RecordWriter.annotate
    with Recorder(tmp_path, model, every=1) as recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(recorder, model, steps=1)
        monkeypatch.setattr(os, "fsync", lambda descriptor: (syncs.append(descriptor), sync(descriptor)))
        monkeypatch.setattr(RecordWriter, "annotate", lambda *given: (notes.append(given), annotate(*given)))
        train(recorder, model, steps=6, first=2)
    assert len(syncs) == 6 + len(notes)
    assert len(notes) < 6
