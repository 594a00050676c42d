"""The callback's numbers stand where people look: in the log history, and with ``attach`` in every reporter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import TrainerCallback

from dynamics import DynamicsCallback
from tests.trainings import trainer

NUMBER = "dynamics/total/frobenius_norm"


def history(training) -> dict[int, float]:
    """Step to the number, as it stands in the log history; once for each step."""
    found = [(entry["step"], entry[NUMBER]) for entry in training.state.log_history if NUMBER in entry]
    assert len(dict(found)) == len(found)
    return dict(found)


def scalars_of_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_every_captured_step_is_in_the_log_history(tmp_path, attached, logging_steps):
    callback = DynamicsCallback(tmp_path, at=[2, 3, 5])
    training = trainer(tmp_path, [callback], max_steps=6, logging_steps=logging_steps, save_strategy="no")
    if attached:
        callback.attach(training)
    training.train()
    assert list(history(training)) == [2, 3, 5]
    assert callback.recorder.steps == [2, 3, 5]
    # A step that the Trainer logs itself has one entry, with both.
    logged = [entry["step"] for entry in training.state.log_history if "loss" in entry]
    assert logged == list(range(logging_steps, 7, logging_steps))


def test_reporters_see_the_numbers_of_an_attached_callback_alone(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="reads event files with tensorboard: install the 'test' extra")
    found = {}
    for name, attached in (("attached", True), ("alone", False)):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events" / name))
        callback = DynamicsCallback(tmp_path / name, at=[2, 3], preset="standard")
        training = trainer(tmp_path / name, [callback], max_steps=3, report_to="tensorboard", save_strategy="no")
        if attached:
            callback.attach(training)
        training.train()
        found[name] = scalars_of_tensorboard(tmp_path / "events" / name)
        if attached:
            numbers = found[name][f"train/{NUMBER}"]
            assert numbers == {step: pytest.approx(value, rel=1e-6) for step, value in history(training).items()}
            assert set(numbers) == {2, 3}
    tags = {name: {tag for tag in each if "dynamics" in tag} for name, each in found.items()}
    assert tags["alone"] == set()
    assert "train/dynamics/gradient/norm_before_clip" in tags["attached"]
    assert "train/loss" in found["alone"]


def test_attaching_puts_it_before_the_reporters_and_behind_the_flow(tmp_path):
    callback = DynamicsCallback(tmp_path)
    training = trainer(tmp_path, [callback], report_to="tensorboard")
    assert callback.attach(training) is callback
    names = [type(each).__name__ for each in training.callback_handler.callbacks]
    assert (
        names.index("DefaultFlowCallback") + 1 == names.index("DynamicsCallback") < names.index("TensorBoardCallback")
    )
    callback.attach(training)
    assert [type(each).__name__ for each in training.callback_handler.callbacks].count("DynamicsCallback") == 1


def test_attaching_a_callback_that_was_not_given_adds_it(tmp_path):
    callback = DynamicsCallback(tmp_path, at=[1]).attach(training := trainer(tmp_path, max_steps=1))
    training.train()
    assert list(history(training)) == [1]
    assert callback.recorder.steps == [1]


def test_a_number_does_not_wait_for_a_step_that_is_never_logged(tmp_path):
    """What waited for the Trainer's own entry is not carried into a later one."""
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((state.global_step, NUMBER in (logs or {})))

    callback = DynamicsCallback(tmp_path, at=[2])
    training = trainer(tmp_path, [callback, Watch()], max_steps=3, logging_steps=1, save_strategy="no")
    callback.attach(training).attach(training)
    training.train()
    assert seen[:3] == [(1, False), (2, True), (3, False)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    callback = DynamicsCallback(tmp_path / "run", at=[2])
    training = trainer(tmp_path / "run", [callback], max_steps=2, report_to="wandb", save_strategy="no")
    callback.attach(training)
    training.train()
    assert wandb.run is not None
    assert dict(wandb.run.summary)[f"train/{NUMBER}"] == pytest.approx(history(training)[2])
    wandb.finish()
