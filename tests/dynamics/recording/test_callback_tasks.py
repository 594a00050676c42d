"""With tasks, each captured step has the Fisher at the start of its increment, and the training does not notice."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import xarray as xr
from peft import LoHaConfig, get_peft_model
from transformers import Adafactor, Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

import dynamics
from dynamics import DynamicsCallback, Recorder, schema
from dynamics.fisher.concentration import effective_batches
from dynamics.recording import fisher
from dynamics.recording.fisher import momentum_of
from probes import Task, gradient_gram, probe_batches, probe_loss
from probes.watched import find
from tests.records import records_of, rewrite
from tests.runs import VOCABULARY, Tokens, arguments, llama, lora_llama, losses, random_states, trainer


def task(name: str, seed: int, samples: int = 12, **options) -> Task:
    """Sequences that are not trained on, two an image."""
    rows = torch.randint(VOCABULARY, (samples, 8), generator=torch.Generator().manual_seed(seed))
    data = [{"input_ids": row, "labels": row, "image": f"{name}{number // 2}"} for number, row in enumerate(rows)]
    return Task(name, data, group="image", **options)


def largest_logit(model, batch) -> torch.Tensor:
    return model(**batch).logits.flatten(1).amax(1)


def tasks() -> list[Task]:
    return [task("a", 11), task("b", 12, score=largest_logit, higher_is_better=False)]


class Weights(TrainerCallback):
    """Keeps what is trained after each step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.kept = model, {0: self.now(model)}

    def now(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_step_end(self, args, state, control, **kwargs):
        self.kept[state.global_step] = self.now(self.model)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training with tasks, its weights at each step, and the training itself."""
    folder = tmp_path_factory.mktemp("tasks") / "run"
    model = lora_llama()
    weights = Weights(model)
    callback = DynamicsCallback(folder, tasks(), at=[2, 3, 6])
    training = trainer(folder, [callback, weights], model, save_strategy="no", max_steps=6)
    callback.attach(training)
    training.train()
    return folder, weights.kept, training, random_states()


@pytest.fixture(scope="module")
def tree(run) -> xr.DataTree:
    return dynamics.open_run(run[0]).load()


def test_the_training_does_not_notice(run, tmp_path):
    _, _, training, states = run
    plain = trainer(tmp_path, save_strategy="no", max_steps=6)
    plain.train()
    assert states == random_states()
    assert losses(training.state.log_history) == losses(plain.state.log_history)
    for ours, theirs in ((training.model, plain.model), (training.optimizer, plain.optimizer)):
        pairs = zip(flat(ours.state_dict()), flat(theirs.state_dict()), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_model_compiled_in_regions_is_measured_and_trained_alike(tmp_path):
    """It is measured eagerly, for a compiled graph calls no hooks, and compiled no more often."""

    def trained(name: str, *, compiled: bool, probed: bool):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, folder = lora_llama(), tmp_path / name
        layers = model.base_model.model.model.layers
        del layers[1:]  # each is compiled by itself, in seconds
        if compiled:
            layers[0].compile(backend="aot_eager")
        callbacks = [DynamicsCallback(folder, tasks(), at=[1, 3])] if probed else []
        training = trainer(folder, callbacks, model, save_strategy="no", max_steps=3)
        training.train()
        return training, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    (plain, graphs), (probed, with_probes) = (trained(f"{p}", compiled=True, probed=p) for p in (False, True))
    assert losses(probed.state.log_history) == losses(plain.state.log_history)
    pairs = zip(flat(probed.model.state_dict()), flat(plain.model.state_dict()), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert graphs == with_probes > 0
    trained("eager", compiled=False, probed=True)
    records = [records_of(tmp_path / name).records for name in ("True", "eager")]
    first, expected = (record[1]["fisher"]["gram"].values for record in records)  # at the weights of the start
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-6 * expected.max())
    assert set(records[0]) == {1, 3}


def flat(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for value in values for tensor in flat(value)]


@pytest.mark.parametrize(("step", "before"), [(2, 0), (3, 2), (6, 3)])
def test_records_are_those_of_the_weights_where_the_increment_began(run, step, before):
    folder, kept, _, _ = run
    record = records_of(folder).records[step]["fisher"]
    model = lora_llama()
    named = dict(model.named_parameters())

    def load(at: int) -> dict[str, torch.Tensor]:
        for name, value in kept[at].items():
            named[name].data.copy_(value)
        return {each.name: each.read().to_dense().detach().clone() for each in find(model).watched}

    after, start = load(step), load(before)
    update = {name: after[name] - start[name] for name in after}
    batches, *labels = probe_batches(tasks())
    expected = gradient_gram(model, batches, probe_loss, update=update)
    assert record["evaluated_at_step"].item() == before
    assert record["block"].values.tolist() == list(expected.gram)
    for place, (name, label) in enumerate(zip(schema.SAMPLE_LABELS, labels, strict=True)):
        assert record[name].values.tolist() == label, place
    for block, gram in expected.gram.items():
        here = record.sel(block=block).isel(step=0)
        np.testing.assert_allclose(here["gram"], gram, rtol=0, atol=1e-7 * float(gram.abs().max()))  # in float32
        assert np.trace(here["gram"]) == pytest.approx(float(gram.trace()), rel=1e-9)
        product = expected.update_product[block]
        np.testing.assert_allclose(here["update_product"], product, rtol=0, atol=1e-5 * float(product.abs().max()))
        assert here["update_norm_squared"].item() == pytest.approx(expected.update_norm_squared[block], rel=1e-5)


def test_the_result_has_its_groups_and_their_contract(tree):
    schema.check(tree)
    assert {"fisher", "concentration", "tasks", "score"} <= set(tree.children)
    fisher = tree["fisher"]
    assert fisher["task"].values.tolist() == ["all", "a", "b"]
    assert fisher["spectral_entropy"].dims == ("step", "block", "task")
    assert fisher.attrs["space"] == "tangent"
    assert tree["concentration"]["captured"].dims == ("step", "block", "k")
    assert tree["score"]["task"].values.tolist() == ["b"]
    assert tree["score"]["items"].values.tolist() == [[12.0]] * 3
    assert tree["score"]["direction"].values.tolist() == [[-1.0]] * 3
    assert np.isfinite(fisher["spectral_entropy"].sel(block="global")).all()


def test_the_null_knows_the_optimizers_batch(tree):
    """Two samples a device, twice accumulated, over the steps of the increment, with Adam's β₁ of 0.9."""
    assert tree["fisher"].attrs["batch_size"] == 4
    assert tree["fisher"]["momentum"].values.tolist() == [0.9] * 3
    effective = [effective_batches(steps, before, 0.9) for steps, before in ((2, 0), (1, 2), (3, 3))]
    assert tree["concentration"]["null_batch"].values.tolist() == [round(4 * batches) for batches in effective]


def test_a_summary_is_logged(run):
    history = run[2].state.log_history
    logged = [entry for entry in history if "dynamics/fisher/spectral_entropy" in entry]
    assert [entry["step"] for entry in logged] == [2, 3, 6]
    assert all(0 < entry["dynamics/fisher/captured_16"] <= 1 for entry in logged)


def test_probe_samples_that_are_trained_on_are_refused(tmp_path):
    data = Tokens()
    known = Task("known", [data[3], {"input_ids": data[0]["input_ids"] + 0, "labels": data[0]["labels"]}])
    message = "Task 'known': expected held-out samples, got 2 of 2 that are also in the training set"
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path, [DynamicsCallback(tmp_path, [known])]).train()


def test_a_broken_sample_costs_itself_alone(tmp_path):
    bad = task(
        "a", 11, loss=lambda model, batch: model(**batch).logits.flatten(1).sum(1) / (batch["input_ids"][:, 0] - 5)
    )
    rows = [sample["input_ids"][0].item() for sample in bad.samples]
    bad.samples[4]["input_ids"][0] = 5
    assert rows.count(5) == 0
    callback = DynamicsCallback(tmp_path, [bad], at=[2])
    trainer(tmp_path, [callback], max_steps=2, save_strategy="no").train()
    record = records_of(tmp_path).records[2]["fisher"]
    missing = np.isnan(np.diagonal(record["gram"].sel(block="global").values[0]))
    assert np.flatnonzero(missing).tolist() == [4]


def test_a_task_that_fails_costs_the_fisher_and_not_the_step(tmp_path):
    def refuse(model, batch):
        raise RuntimeError("no loss today")

    callback = DynamicsCallback(tmp_path, [task("a", 11, loss=refuse)], at=[2])
    with pytest.warns(UserWarning, match=re.escape("could not record step 2 (RuntimeError: no loss today)")):
        trainer(tmp_path, [callback], max_steps=2, save_strategy="no").train()
    assert set(records_of(tmp_path).records[2]) == {"update", "gradient"}


def test_only_chosen_matrices(tmp_path):
    callback = DynamicsCallback(tmp_path, [task("a", 11)], at=[2], matrices=r"layers\.0.*q_proj")
    trainer(tmp_path, [callback], max_steps=2, save_strategy="no").train()
    assert dynamics.open_run(tmp_path)["fisher"]["block"].values.tolist() == [
        "model.layers.0.self_attn.q_proj",
        "global",
    ]


def test_biases_are_blocks_of_their_own(tmp_path):
    """A dense model in a plain loop: everything that is trained is part of K and of the update."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    samples = [{"input": torch.randn(4)} for _ in range(6)]
    probe = Task("x", samples, loss=lambda model, batch: model(batch["input"]).square().sum(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    with Recorder(tmp_path, model, tasks=[probe], every=1) as recorder, recorder.step(1, optimizer):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    fisher = dynamics.open_run(tmp_path)["fisher"]
    assert fisher["block"].values.tolist() == ["0", "2", "0.bias", "2.bias", "global"]
    norm = fisher["update_norm_squared"].sel(block="global").item()
    assert norm == pytest.approx(float(moved.double().square().sum()), rel=1e-5)
    assert fisher["dimension"].sel(block="global").item() == moved.numel()


@pytest.mark.parametrize("damage", ["no Gram matrix", "huge", "labels", "later"])
def test_a_damaged_fisher_costs_the_fisher_of_its_step(run, tmp_path, damage):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)

    def spoil(groups):
        fisher = groups["fisher"]
        if damage == "no Gram matrix":
            fisher["gram"].values[0, 0, 0, 1] += 1e3
        elif damage == "huge":
            fisher["loss"].values[0, 0] = 1e300
        elif damage == "labels":
            groups["fisher"] = fisher.drop_vars("sample_task")
        else:
            groups["fisher"] = fisher.assign_coords(evaluated_at_step=("step", [7]))

    rewrite(folder / "dynamics" / "records" / "step-000000000003.safetensors", spoil)
    tree = dynamics.open_run(folder)
    assert tree["fisher"]["step"].values.tolist() == [2, 6]
    assert tree["update"]["step"].values.tolist() == [2, 3, 6]
    told = [each for each in json.loads(tree.attrs["findings"]) if each["code"] == "OD309"]
    assert len(told) == 1
    assert told[0]["file"].endswith("step-000000000003.safetensors")


def test_what_is_in_no_watched_matrix_counts_too(tmp_path):
    """LoHa's factors are no product of two: each is a block of its own, and moves with the update."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    weights = Weights(model)
    callback = DynamicsCallback(tmp_path, [task("a", 11)], at=[2, 4])
    trainer(tmp_path, [callback, weights], model, max_steps=4, save_strategy="no").train()
    fisher = dynamics.open_run(tmp_path)["fisher"].to_dataset().sel(step=4)
    moved = sum((weights.kept[4][name] - weights.kept[2][name]).double().square().sum() for name in weights.kept[4])
    assert any("hada_w1_a" in block for block in fisher["block"].values)
    assert fisher["update_norm_squared"].sel(block="global").item() == pytest.approx(float(moved), rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (lambda p: torch.optim.AdamW(p, betas=(0.8, 0.99)), 0.8),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.95), 0.95),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0.0),
        (lambda p: torch.optim.Adagrad(p), math.nan),
        (lambda p: Adafactor(p), 0.0),
        (lambda p: SimpleNamespace(optimizer=torch.optim.AdamW(p)), 0.9),
        (lambda p: SimpleNamespace(param_groups=[{"betas": "no"}, {}]), math.nan),
        (lambda p: None, math.nan),
    ],
)
def test_momentum_is_what_the_optimizer_says(optimizer, expected):
    found = momentum_of(optimizer([torch.nn.Parameter(torch.zeros(1))]))
    np.testing.assert_equal(found, expected)


def test_the_largest_momentum_of_several_groups_counts():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "momentum": beta} for beta in (0.5, 0.9)]
    assert momentum_of(torch.optim.SGD(groups, lr=0.1)) == 0.9


# ---- many samples ----


def test_the_size_of_large_records_is_said_before_training_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(fisher, "MOST_BYTES", 1000)
    said = []
    callback = DynamicsCallback(tmp_path, [task("a", 11)], at=[1])
    caught = pytest.warns(UserWarning, match="OD320 A record of the Fisher would take")
    training = trainer(tmp_path, [callback, Begins(lambda: said.extend(map(str, caught.list)))], max_steps=1)
    with caught:
        training.train()
    assert any("OD320" in text for text in said)
    tree = dynamics.open_run(tmp_path)
    assert tree["fisher"]["block"].values.tolist() == ["global"]
    assert np.isfinite(tree["fisher"]["update_product"]).all()
    assert "OD320" in tree.attrs["findings"]


class Begins(TrainerCallback):
    def __init__(self, call) -> None:
        self.call = call

    def on_step_begin(self, args, state, control, **kwargs):
        self.call()


class Bar:
    """Stands in for a progress bar, and keeps what it was told."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, *, total, **_) -> None:
        self.total, self.n, self.open = total, 0, True
        self.made.append(self)

    def update(self, number) -> None:
        self.n += number

    def close(self) -> None:
        self.open = False


@pytest.mark.parametrize("disabled", [False, True])
def test_probe_samples_have_a_progress_bar(tmp_path, monkeypatch, disabled):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr("dynamics.recording.callback.tqdm", Bar)
    callback = DynamicsCallback(tmp_path, tasks(), at=[1, 2])
    trainer(tmp_path, [callback], max_steps=2, save_strategy="no", disable_tqdm=disabled).train()
    assert [(bar.total, bar.n, bar.open) for bar in Bar.made] == ([] if disabled else [(24, 16, False)] * 2)


# ---- another loss than the one probed ----


def codes_of(folder, callback: DynamicsCallback, **options) -> list[str]:
    kind = options.pop("kind", Trainer)
    arguments_ = arguments(folder, max_steps=1, save_strategy="no", **options.pop("arguments", {}))
    training = kind(lora_llama(), arguments_, train_dataset=Tokens(), callbacks=[callback], **options)
    callback.attach(training)
    training.train()
    return [finding.code for finding in callback.recorder.findings]


class Own(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize(
    "options",
    [
        {"arguments": {"label_smoothing_factor": 0.1}},
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()},
        {"kind": Own},
    ],
    ids=["smoothing", "function", "subclass"],
)
def test_a_training_that_minimises_another_loss(tmp_path, options):
    assert "OD318" in codes_of(tmp_path / "a", DynamicsCallback(tmp_path / "a", [task("a", 11)], at=[1]), **options)
    own = task("a", 11, loss=largest_logit)
    assert "OD318" not in codes_of(tmp_path / "b", DynamicsCallback(tmp_path / "b", [own], at=[1]), **options)
    assert "OD318" not in codes_of(tmp_path / "c", DynamicsCallback(tmp_path / "c", at=[1]), **options)


def test_a_training_that_minimises_the_models_own_loss(tmp_path):
    assert "OD318" not in codes_of(tmp_path, DynamicsCallback(tmp_path, [task("a", 11)], at=[1]))


# ---- a hyperparameter search ----


@pytest.mark.parametrize("attached", [True, False])
def test_each_trial_of_a_search_is_a_run_of_its_own(tmp_path, attached, monkeypatch):
    """As the Trainer's backends do it: `train(trial=…)` again and again, with a new model."""
    callback = DynamicsCallback(tmp_path, at=[2])
    options = arguments(tmp_path, max_steps=2, save_strategy="no")
    training = Trainer(None, options, train_dataset=Tokens(), callbacks=[callback], model_init=lambda: lora_llama())
    if attached:
        callback.attach(training)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: {})
    monkeypatch.setattr(training, "_hp_search_setup", lambda trial: setattr(training, "_trial", trial))
    training.hp_search_backend = HPSearchBackend.OPTUNA
    for number in range(3):
        training.train(trial=SimpleNamespace(number=number))
    assert sorted(path.name for path in tmp_path.glob("run-*/dynamics")) == ["dynamics"] * 3
    for number in range(3):
        assert dynamics.open_run(tmp_path / f"run-{number}")["update"]["step"].values.tolist() == [2]
