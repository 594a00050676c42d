"""The numbers of each record stand in the training log, and, once attached, in what the Trainer reports to."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from dynamics import DynamicsCallback
from tests.records import records_of
from tests.runs import losses, trainer

#: Captured steps; of these only the second is logged by the Trainer where it logs every third.
CAPTURED = [2, 3, 5]
NAMES = {
    *(
        f"dynamics/{kind}/{measure}"
        for kind in ("total", "increment")
        for measure in ("frobenius_norm", "effective_rank_energy", "dominant_ratio")
    ),
    *(f"dynamics/gradient/{name}" for name in ("norm_before_clip", "norm_after_clip", "effective_rank_energy")),
}
NORM = "dynamics/total/frobenius_norm"


def train(out: Path, *, attached: bool = True, **changes: Any) -> Trainer:
    """Six steps, of which some are captured."""
    callback = DynamicsCallback(out, at=changes.pop("at", CAPTURED))
    training = trainer(out, [callback], **{"max_steps": 6, "save_strategy": "no", **changes})
    if attached:
        callback.attach(training)
    training.train()
    return training


def entries(training: Trainer) -> list[dict[str, Any]]:
    """Those of the log that hold our numbers."""
    return [entry for entry in training.state.log_history if any(name.startswith("dynamics/") for name in entry)]


def recorded_norms(run: Path) -> dict[int, float]:
    """Norm of all updates as one, from the records."""
    records = records_of(run).records
    values = {step: record["update"]["singular_value"].sel(kind="total") for step, record in records.items()}
    return {step: float((each**2).sum() ** 0.5) for step, each in values.items()}


def tensorboard_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What the event files say: tag → step → value."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "board"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    return folder


@pytest.mark.parametrize("logging_steps", [1, 3, 100], ids=["aligned", "partly_aligned", "never_logged"])
@pytest.mark.parametrize("attached", [True, False])
def test_each_record_has_one_entry_in_the_log(tmp_path: Path, attached: bool, logging_steps: int) -> None:
    training = train(tmp_path, attached=attached, logging_steps=logging_steps)

    assert [entry["step"] for entry in entries(training)] == CAPTURED
    assert all(NAMES | {"epoch"} <= entry.keys() for entry in entries(training))
    assert {entry["step"]: entry[NORM] for entry in entries(training)} == pytest.approx(recorded_norms(tmp_path))
    with_loss = [entry["step"] for entry in entries(training) if "loss" in entry]
    assert with_loss == ([step for step in CAPTURED if step % logging_steps == 0] if attached else [])


@pytest.mark.parametrize("logging_steps", [1, 3], ids=["aligned", "partly_aligned"])
def test_attached_its_numbers_are_in_tensorboard(tmp_path: Path, board: Path, logging_steps: int) -> None:
    train(tmp_path, logging_steps=logging_steps, report_to="tensorboard")

    scalars = tensorboard_scalars(board)
    assert {tag.removeprefix("train/") for tag in scalars if "dynamics/" in tag} == NAMES
    assert scalars[f"train/{NORM}"] == pytest.approx(recorded_norms(tmp_path), rel=1e-6)  # event files hold float32
    assert list(scalars["train/loss"]) == list(range(logging_steps, 7, logging_steps))


def test_unattached_they_are_in_the_log_alone(tmp_path: Path, board: Path) -> None:
    training = train(tmp_path, attached=False, logging_steps=3, report_to="tensorboard")

    assert [tag for tag in tensorboard_scalars(board) if "dynamics" in tag] == []
    assert len(entries(training)) == len(CAPTURED)


@pytest.mark.parametrize("attached", [True, False])
def test_a_checkpoint_between_captured_steps_is_logged_too(tmp_path: Path, attached: bool) -> None:
    """Saved at the end of an epoch of two steps, which nobody could know before."""
    changes = {"save_strategy": "epoch", "per_device_train_batch_size": 16, "num_train_epochs": 2, "max_steps": -1}
    training = train(tmp_path, at=[1], attached=attached, logging_steps=100, **changes)

    assert [entry["step"] for entry in entries(training)] == [1, 2, 4]
    assert "dynamics/gradient/norm_before_clip" not in entries(training)[-1]


def test_a_checkpoint_holds_the_numbers_so_far(tmp_path: Path) -> None:
    train(tmp_path, logging_steps=3, save_strategy="steps", save_steps=3)

    history = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if NORM in entry] == [2, 3]


def test_attaching_twice_or_before_the_callback_was_passed_is_the_same(tmp_path: Path, board: Path) -> None:
    training = trainer(tmp_path, max_steps=2, save_strategy="no", logging_steps=5, report_to="tensorboard")
    callback = DynamicsCallback(tmp_path, every=1)
    assert callback.attach(training) is callback
    callback.attach(training).attach(training)
    training.train()

    names = [type(each).__name__ for each in training.callback_handler.callbacks]
    assert names.count("DynamicsCallback") == 1
    assert names[:2] == ["DefaultFlowCallback", "DynamicsCallback"]  # behind what decides, before what reports
    assert [entry["step"] for entry in entries(training)] == [1, 2]
    assert list(tensorboard_scalars(board)[f"train/{NORM}"]) == [1, 2]


class RunningMeans(Trainer):
    """A Trainer that adds a mean since its last log, as TRL's do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.values: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.values.append(float(self.state.global_step))
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.values:
            logs["mean"] = sum(self.values) / len(self.values)
            self.values = []
        super().log(logs, start_time)


def test_a_trainers_own_means_are_over_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.Trainer", RunningMeans)
    plain = trainer(tmp_path / "plain", max_steps=6, save_strategy="no", logging_steps=3)
    plain.train()

    watched = train(tmp_path / "watched", logging_steps=3)

    assert [entry["mean"] for entry in plain.state.log_history if "mean" in entry] == [1.0, 4.0]
    assert losses(watched.state.log_history) == losses(plain.state.log_history)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb, which is not among the test dependencies")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    train(tmp_path, logging_steps=3, report_to="wandb")

    summary = {name: wandb.run.summary[f"train/{name}"] for name in NAMES}
    wandb.finish()
    assert summary[NORM] == pytest.approx(recorded_norms(tmp_path)[CAPTURED[-1]])
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert all(f"train/{name}".encode() in written.read_bytes() for name in NAMES)


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="needs trackio, which is not among the test dependencies")
    train(tmp_path, logging_steps=3, report_to="trackio", project="ours", run_name="one")

    with sqlite3.connect(tmp_path / "trackio" / "ours.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by step")]
    norms = {row["train/global_step"]: row[f"train/{NORM}"] for row in rows if f"train/{NORM}" in row}
    assert norms == pytest.approx(recorded_norms(tmp_path))
