"""A resumed training goes on in the same records; another training is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import dynamics
from dynamics import DynamicsCallback, Recorder
from dynamics.store import RecordsExist
from tests.records import records_of
from tests.runs import lora_llama, trainer

STORE = Path("dynamics") / "records"


def train(run: Path, *, resume: Path | None = None, callback: DynamicsCallback | None = None, **changes) -> None:
    callback = callback or DynamicsCallback(run, preset="full", every=1)
    training = trainer(run, [callback], **changes)
    training.train(resume_from_checkpoint=None if resume is None else str(resume))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Eight steps without a break, checkpoints at 4 and 8."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run)
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def numbers(run: Path) -> dict[str, xr.Dataset]:
    tree = dynamics.open_run(run)
    return {name: tree[name].to_dataset().load() for name in ("update", "gradient")}


def test_a_resumed_training_has_the_records_of_one_without_a_break(whole, run):
    train(run, resume=run / "checkpoint-4")
    for name, expected in numbers(whole).items():
        found = numbers(run)[name]
        assert found["step"].values.tolist() == list(range(1, 9))
        np.testing.assert_allclose(found["singular_value"], expected["singular_value"], rtol=1e-9, atol=1e-15)
    assert numbers(run)["update"]["from_step"].values.tolist() == list(range(8))
    # Across the break there is everything but the cosine, which wants the increment before.
    cosines = numbers(run)["update"]["increment_cosine"]
    assert np.isnan(cosines.sel(step=5)).all()
    assert np.isfinite(cosines.sel(step=6)).all()


def test_later_records_are_dropped_and_earlier_ones_stay_untouched(run):
    before = {step: (run / STORE / f"step-{step:012d}.safetensors").stat().st_ino for step in range(1, 9)}
    callback = DynamicsCallback(run, preset="full", at=[6])
    train(run, resume=run / "checkpoint-4", callback=callback, max_steps=6, save_strategy="no")
    assert list(records_of(run).records) == [1, 2, 3, 4, 6]
    assert all((run / STORE / f"step-{step:012d}.safetensors").stat().st_ino == before[step] for step in (1, 2, 3, 4))
    assert dynamics.open_run(run)["update"]["from_step"].values.tolist() == [0, 1, 2, 3, 4]


def test_a_resumption_is_noted(run):
    before = records_of(run).attributes
    train(run, resume=run / "checkpoint-4")
    attributes = records_of(run).attributes
    assert attributes["resumptions"][0]["created"] >= before["created"]
    assert all(attributes[name] == before[name] for name in ("run_id", "created"))  # it is the same training
    assert [each["step"] for each in attributes["resumptions"]] == [4]
    assert attributes["findings"] == []


def test_a_second_training_into_the_folder_is_refused(run):
    message = (
        f"'{run / STORE}' holds 8 captured steps, the last of them 8. Resume that training, or choose another folder."
    )
    with pytest.raises(RecordsExist, match=re.escape(message)):
        train(run)
    assert list(records_of(run).records) == list(range(1, 9))


def test_resuming_from_other_weights_is_refused(run):
    model = lora_llama()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter.data)
    with pytest.raises(RecordsExist, match=r"has a record of step 4 whose spectra differ from the model's by \d+ %"):
        Recorder(run, model, resume_from=4)
    assert list(records_of(run).records) == list(range(1, 9))


def test_resuming_where_nothing_was_recorded_says_what_is_not_known(run):
    shutil.rmtree(run / "dynamics")
    train(run, resume=run / "checkpoint-4")
    tree = dynamics.open_run(run)
    update = tree["update"].to_dataset().load()
    assert update["step"].values.tolist() == [4, 5, 6, 7, 8]
    assert update["from_step"].values.tolist() == [-1, 4, 5, 6, 7]
    assert '"OD307"' in tree.attrs["findings"]
    assert np.isfinite(update["frobenius_norm"].sel(kind="total")).all()


def test_a_smaller_batch_size_begins_again_in_the_same_records(tmp_path):
    """``auto_find_batch_size`` starts anew within one training; the weights stay where they were."""
    callback = DynamicsCallback(tmp_path, every=1)
    options = {"max_steps": 3, "save_strategy": "no", "auto_find_batch_size": True}
    training = trainer(tmp_path, [callback], **options, per_device_train_batch_size=4)
    step_of_trainer, calls = training.training_step, []

    def training_step(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:  # two steps of two batches are done
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step_of_trainer(*args, **kwargs)

    training.training_step = training_step
    training.train()
    update = dynamics.open_run(tmp_path)["update"]
    assert (update["step"].values.tolist(), update["from_step"].values.tolist()) == ([0, 1, 2, 3], [-1, 0, 1, 2])
    norm = update["frobenius_norm"]
    assert (norm.sel(kind="total", step=0) > 0).all()  # since the start, which was before the first attempt
    assert norm.sel(kind="increment", step=0).isnull().all()
    another = trainer(tmp_path, [callback], **options, per_device_train_batch_size=1)
    with pytest.raises(RecordsExist, match="holds 4 captured steps"):
        another.train()  # the one before had ended


def test_a_resumed_dense_training_still_knows_its_start(tmp_path):
    """Totals of dense weights are differences from the start, which is kept beside the records."""

    def part(run: Path, steps: range, resume: int | None) -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        with torch.no_grad():
            model.weight += 0.0 if resume is None else resume * torch.ones(3, 4)
        with Recorder(run, model, every=1, resume_from=resume) as recorder:
            for step in steps:
                with recorder.step(step), torch.no_grad():
                    model.weight += torch.ones(3, 4)

    part(tmp_path, range(1, 4), None)
    part(tmp_path, range(3, 6), 2)
    norm = dynamics.open_run(tmp_path)["update"]["frobenius_norm"].sel(matrix="weight")
    total, increment = (norm.sel(kind=kind).values for kind in ("total", "increment"))
    np.testing.assert_allclose(total, np.arange(1, 6) * 12**0.5, rtol=1e-6)
    np.testing.assert_allclose(increment, 12**0.5, rtol=1e-6)
