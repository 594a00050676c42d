"""Probed checkpoints tell what the callback would have recorded, and nothing that goes wrong costs the rest."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from typer.testing import CliRunner

import dynamics
from dynamics import DynamicsCallback, Recorder, analyze_run, schema
from dynamics.analyze import app
from dynamics.checkpoints import open_trajectory
from dynamics.recording.checkpoint_probe import load_function, probe_checkpoints
from probes import Task
from tests.runs import VOCABULARY, llama, lora_llama, trainer


def tasks() -> list[Task]:
    found = []
    for name, seed in (("a", 11), ("b", 12)):
        rows = torch.randint(VOCABULARY, (12, 8), generator=torch.Generator().manual_seed(seed))
        data = [{"input_ids": row, "labels": row, "image": f"{name}{place // 2}"} for place, row in enumerate(rows)]
        found.append(Task(name, data, group="image"))
    found[1] = Task("b", found[1].samples, group="image", score=lambda model, batch: model(**batch).logits[:, 0, 0])
    return found


def load(folder: str):
    return PeftModel.from_pretrained(llama(), folder, is_trainable=True), tasks(), 4


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Path:
    """A training that recorded what its checkpoints can be asked as well."""
    folder = tmp_path_factory.mktemp("probe") / "run"
    callback = DynamicsCallback(folder, tasks(), at=[2, 4, 6])
    training = trainer(folder, [callback], lora_llama(), save_strategy="steps", save_steps=2, max_steps=6)
    callback.attach(training)
    training.train()
    return folder


@pytest.fixture
def run(captured, tmp_path) -> Path:
    """Its checkpoints alone."""
    shutil.copytree(captured, tmp_path / "run", ignore=shutil.ignore_patterns("dynamics"))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def probed(captured, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(captured, folder, ignore=shutil.ignore_patterns("dynamics"))
    analyze_run(folder, probe=load, report=False)
    return dynamics.open_run(folder).load()


def test_it_tells_what_the_callback_recorded(captured, probed):
    schema.check(probed)
    expected, found = (tree["fisher"].sel(step=[4, 6]) for tree in (dynamics.open_run(captured), probed))
    for name in ("evaluated_at_step", "sample_task", "sample_group", "sample_id", "block"):
        assert found[name].values.tolist() == expected[name].values.tolist(), name
    for name in ("gram", "update_product", "update_norm_squared"):
        scale = np.abs(expected[name].values).max((-1,) if name != "gram" else (-1, -2), keepdims=True)
        np.testing.assert_allclose(found[name].values / scale, expected[name].values / scale, atol=2e-5, err_msg=name)
    assert found.attrs["batch_size"] == expected.attrs["batch_size"] == 4
    assert probed["concentration"]["gain"].sel(step=6, block="global").notnull().any()


def test_the_first_checkpoint_has_no_increment(probed):
    first = probed["fisher"].sel(step=2)
    assert first["evaluated_at_step"] == 2
    assert np.isfinite(first["gram"]).all()
    assert np.isnan(first["update_product"]).all()
    assert np.isnan(probed["concentration"]["captured"].sel(step=2)).all()
    assert np.isfinite(first["spectral_entropy"].sel(block="global")).all()


def test_scores_are_those_of_the_checkpoint_itself(captured, probed):
    expected = dynamics.open_run(captured)["score"].sel(task="b", step=[2, 4, 6])["score"].values
    np.testing.assert_allclose(probed["score"].sel(task="b", step=[2, 4, 6])["score"].values, expected, rtol=1e-5)


def test_nothing_is_said_of_an_optimizer_that_nobody_can_know(probed):
    """Its state in a checkpoint is a pickle."""
    shares = probed["concentration"]
    assert np.isfinite(shares["gain"].sel(k=1)).any()
    assert np.isnan(shares["gain_optimizer"]).all()
    assert "OD335" not in probed.attrs["findings"]


def test_one_model_whose_weights_are_exchanged(run, probed):
    """A function may keep the model and load each checkpoint's weights into it."""
    model = PeftModel.from_pretrained(llama(), run / "checkpoint-2", is_trainable=True)

    def again(folder):
        model.load_adapter(folder, "default", is_trainable=True)
        return model, tasks(), 4

    found = probe_checkpoints(open_trajectory(run).checkpoints, again)
    assert found.findings == []
    np.testing.assert_allclose(
        np.concatenate([record["gram"].values for record in found.fisher]), probed["fisher"]["gram"].values, rtol=1e-6
    )
    np.testing.assert_allclose(
        np.concatenate([record["update_product"].values for record in found.fisher])[1:],
        probed["fisher"]["update_product"].values[1:],
        rtol=1e-4,
        atol=1e-8,
    )


def test_progress_moves_within_a_checkpoint(run):
    told = []

    def fails_in_the_middle(folder):
        if folder.endswith("-4"):
            raise RuntimeError("out of memory")
        return load(folder)

    checkpoints = open_trajectory(run).checkpoints
    probe_checkpoints(checkpoints, fails_in_the_middle, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (0, 72), (8, 72), (16, 72), (24, 72), (24, 48), (32, 48), (40, 48), (48, 48), (48, 48)]


def test_only_matrices_that_are_asked_for(run):
    tree = analyze_run(run, probe=load, report=False, matrices="layers.0.*q_proj")
    blocks = tree["fisher"]["block"].values.tolist()
    assert blocks == ["model.layers.0.self_attn.q_proj", "global"]
    assert np.isfinite(tree["fisher"]["update_product"].sel(step=6)).all()


def test_records_of_the_training_win_and_come_again(captured, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(captured, folder)
    store = folder / "dynamics" / "records"
    for record in sorted(store.glob("step-*"))[1:]:
        shutil.move(record, tmp_path / record.name)
    tree = analyze_run(folder, probe=load, report=False)
    assert tree["fisher"]["evaluated_at_step"].values.tolist() == [0, 2, 4]  # that of step 2 is the training's own
    for name in ("step-000000000004.safetensors", "step-000000000006.safetensors"):  # the training goes on
        shutil.move(tmp_path / name, store / name)
    again = dynamics.open_run(folder)
    assert again["fisher"]["evaluated_at_step"].values.tolist() == [0, 2, 4]
    assert set(again.children) >= {"probed", "checkpoints"}
    schema.check(again)


def test_other_samples_than_the_records_are_left_out(captured, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(captured, folder)
    tree = analyze_run(folder, probe=lambda path: (*load(path)[:1], tasks()[:1]), report=False)
    codes = [finding["code"] for finding in json.loads(tree.attrs["findings"])]
    assert "OD312" in codes
    assert tree["fisher"]["task"].values.tolist() == ["all", "a", "b"]


def failing(folder: str):
    if folder.endswith("checkpoint-4"):
        raise RuntimeError("no such disk")
    return load(folder)


def frozen_otherwise(folder: str):
    model, *rest = load(folder)
    if folder.endswith("checkpoint-6"):
        model.get_submodule("base_model.model.lm_head").weight.data += 1
    return model, *rest


def untrained(folder: str):
    return PeftModel.from_pretrained(llama(), folder), tasks()


@pytest.mark.parametrize(
    ("function", "steps", "words"),
    [
        (failing, [2, 6], r"checkpoint could not be probed (RuntimeError: no such disk, test_checkpoint_probe.py line"),
        (frozen_otherwise, [2, 4], "expected frozen parameters as at step 4, got other numbers in ['"),
        (untrained, [], "with PEFT, load it with is_trainable=True"),
        (lambda folder: None, [], "expected model, tasks[, batch_size[, momentum]] from the function, got NoneType"),
        (lambda folder: (nn.Linear(1, 1), []), [], "expected probes.Task as tasks, got none"),
        (lambda folder: (nn.Linear(1, 1), [3]), [], "expected probes.Task as tasks, got int"),
        (lambda folder: (nn.Linear(1, 1), tasks(), "4"), [], "expected the optimizer's batch size as a whole number"),
    ],
)
def test_a_checkpoint_that_fails_costs_itself(run, function, steps, words):
    tree = analyze_run(run, probe=function, report=False)
    told = [finding for finding in json.loads(tree.attrs["findings"]) if finding["code"] == "OD411"]
    assert len(told) == 3 - len(steps)
    assert words in told[0]["message"]
    found = tree["fisher"]["step"].values.tolist() if "fisher" in tree.children else []
    assert found == steps
    if function is failing:  # counted from the last checkpoint that could be probed
        assert tree["fisher"]["evaluated_at_step"].values.tolist() == [2, 2]
    assert tree["update"].sizes["step"] == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("probe", "expected module:function, such as my_probe:load, got 'probe'."),
        ("os:a-b", "expected module:function, such as my_probe:load, got 'os:a-b'."),
        ("no_such_module_here:load", "the module 'no_such_module_here' could not be imported (ModuleNotFoundError"),
        ("json:nothing", "the module 'json' has no function 'nothing'."),
    ],
)
def test_what_names_no_function_is_refused(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_function(text)


def test_a_script_that_exits_when_it_is_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "script_without_guard.py").write_text("import sys\ndef load(folder): ...\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'script_without_guard' could not be imported \(SystemExit: 0"):
        load_function("script_without_guard:load")


def test_a_function_that_exits_costs_its_checkpoint(run):
    def leave(folder):
        raise SystemExit(0)

    probed = probe_checkpoints(open_trajectory(run).checkpoints, leave)
    assert {finding.code for finding in probed.findings} == {"OD411"}
    assert "SystemExit: 0" in probed.findings[0].message


def test_command_line(run, tmp_path, monkeypatch):
    (tmp_path / "my_probe.py").write_text(
        "from tests.dynamics.recording.test_checkpoint_probe import load\ndef broken(folder):\n    return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    good = CliRunner().invoke(app, [str(run), "--probe", "my_probe:load", "--no-report"])
    assert good.exit_code == 0, good.output
    assert "participation ratio" in good.stdout
    bad = CliRunner().invoke(app, [str(run), "--probe", "my_probe:broken", "--no-report"])
    assert bad.exit_code == 1
    assert "ZeroDivisionError: division by zero, my_probe.py line 3" in bad.stderr
    none = CliRunner().invoke(app, [str(run), "--probe", "my_probe", "--no-report"])
    assert none.exit_code == 2
    assert "expected module:function" in none.stderr
    sys.modules.pop("my_probe", None)


def test_without_checkpoints_there_is_nothing_to_probe(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path, model, every=1) as recorder, recorder.step(1, optimizer):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    tree = analyze_run(tmp_path, probe=load, report=False)
    assert any(finding["code"] == "OD411" for finding in json.loads(tree.attrs["findings"]))


def test_full_fine_tuning(tmp_path):
    """Every weight is trained, biases too; the change is that of everything."""
    torch.manual_seed(0)
    first, second = (llama(attention_bias=True) for _ in range(2))
    for step, model in ((1, first), (2, second)):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")

    def whole(folder):
        return type(first).from_pretrained(folder), tasks()

    found = probe_checkpoints(open_trajectory(tmp_path).checkpoints, whole)
    assert found.findings == []
    moved = [(b - a).double().square().sum() for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    norm = found.fisher[1]["update_norm_squared"].sel(block="global").item()
    assert norm == pytest.approx(float(sum(moved).detach()), rel=1e-6)
