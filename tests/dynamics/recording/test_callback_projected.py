"""`ProjectedUpdates` in the Trainer and in a plain loop: it changes the weights, on purpose, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from dynamics import DynamicsCallback, ProjectedUpdates
from probes import Task
from probes.blocks import trained_parameters
from probes.watched import find
from tests.records import records_of
from tests.runs import VOCABULARY, Tokens, arguments, lora_llama, losses, random_states, trainer

SHARE = "dynamics/captured_share"


def tasks(samples: int = 10) -> list[Task]:
    rows = torch.randint(VOCABULARY, (samples, 8), generator=torch.Generator().manual_seed(11))
    return [Task("a", [{"input_ids": row, "labels": row} for row in rows])]


class Weights(TrainerCallback):
    """Keeps what is trained, and every matrix, after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kept, self.matrices = model, {}, {}
        self.keep(0)

    def keep(self, step: int) -> None:
        self.kept[step] = torch.cat([p.detach().flatten().double() for p in trained_parameters(self.model).values()])
        self.matrices[step] = {m.name: m.read().to_dense().detach().double() for m in find(self.model).watched}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.keep(state.global_step)


def trained(folder: Any, *callbacks: TrainerCallback, **changes: Any) -> tuple[Any, Weights]:
    model = lora_llama(init_lora_weights=False)
    weights = Weights(model)
    training = trainer(folder, [*callbacks, weights], model, save_strategy="no", **changes)
    training.train()
    return training, weights


def shares(training: Any) -> dict[int, float]:
    return {entry["step"]: entry[SHARE] for entry in training.state.log_history if SHARE in entry}


# ---- what it changes ----


def test_the_first_step_is_taken_apart(tmp_path):
    """Of two accumulated, clipped batches: Π and 1 − Π of the same step of AdamW, whose sum it is."""
    steps, logged = {}, {}
    for keep in ("full", "on", "off"):
        training, weights = trained(tmp_path, ProjectedUpdates(tasks(), keep, k=4), max_steps=1, logging_steps=1)
        steps[keep], logged[keep] = weights.kept[1] - weights.kept[0], shares(training)[1]
    assert logged["on"] == logged["off"] == logged["full"]
    assert steps["full"].norm() > 0.1
    torch.testing.assert_close(steps["on"] + steps["off"], steps["full"], rtol=0, atol=1e-7)
    assert abs(float(steps["on"] @ steps["off"])) < 1e-4 * float(steps["full"].square().sum())
    share = float(steps["on"].square().sum() / steps["full"].square().sum())
    assert share == pytest.approx(logged["full"], rel=1e-3)
    assert 0.001 < share < 0.9


def test_a_single_task_needs_no_list(tmp_path):
    (task,) = tasks()
    training, _ = trained(
        tmp_path,
        ProjectedUpdates(task, "full", k=4),
        DynamicsCallback(tmp_path, task, strict=True),
        max_steps=1,
        logging_steps=1,
    )
    assert shares(training)[1] > 0
    assert list(records_of(tmp_path).records) == [1]


def test_a_plain_loop_gives_what_the_trainer_gives(tmp_path):
    model = lora_llama(init_lora_weights=False, lora_dropout=0.0)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    start = {name: value.clone() for name, value in model.state_dict().items()}
    rates = {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    callback = ProjectedUpdates(tasks(), "off", k=4, refresh=2)
    training = trainer(
        tmp_path, [callback], model.eval(), save_strategy="no", max_steps=3, gradient_accumulation_steps=1, **rates
    )
    batches: list[dict[str, Tensor]] = []
    training.add_callback(_Batches(training, batches))
    training.train()
    expected = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    model.load_state_dict(start)
    model.train()
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=0.1)
    projected = ProjectedUpdates(tasks(), "off", k=4, refresh=2)
    for batch in batches:
        with projected.step(model):
            model(**batch).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    assert len(batches) == 3
    assert 0 < projected.captured_share < 1
    for name, parameter in trained_parameters(model).items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-6)
        assert (expected[name] - start_of(start, name)).norm() > 1e-4, name


def start_of(start: dict[str, Tensor], name: str) -> Tensor:
    return next(value for key, value in start.items() if key.endswith(name))


class _Batches(TrainerCallback):
    """Keeps the batches that the model is given."""

    def __init__(self, training: Any, batches: list[dict[str, Tensor]]) -> None:
        compute = training.compute_loss

        def noted(model: nn.Module, inputs: dict[str, Tensor], *rest: Any, **options: Any) -> Tensor:
            batches.append({name: inputs[name].clone() for name in ("input_ids", "labels")})
            return compute(model, inputs, *rest, **options)

        training.compute_loss = noted


@pytest.mark.parametrize("first", ["recorder", "projection"])
def test_records_have_the_projected_update(tmp_path, first):
    recorder, projection = DynamicsCallback(tmp_path, at=[1, 3]), ProjectedUpdates(tasks(), "on", k=4, refresh=2)
    callbacks = [recorder, projection] if first == "recorder" else [projection, recorder]
    _, weights = trained(tmp_path, *callbacks, max_steps=3)
    records = records_of(tmp_path).records
    for step, before in ((1, 0), (3, 1)):
        update = records[step]["update"].sel(kind="increment").isel(step=0)
        for name, matrix in weights.matrices[step].items():
            sigma = torch.linalg.svdvals(matrix - weights.matrices[before][name])
            measured = torch.tensor(update["singular_value"].sel(matrix=name).values)
            count = min(len(sigma), len(measured))
            torch.testing.assert_close(
                measured[:count].nan_to_num(), sigma[:count], rtol=0, atol=1e-5 * float(sigma[0])
            )
    _, plain = trained(tmp_path / "plain", max_steps=3)
    assert (plain.kept[3] - plain.kept[0]).norm() > 1.5 * (weights.kept[3] - weights.kept[0]).norm()


# ---- what it leaves alone ----


def test_the_control_is_the_same_bit_for_bit(tmp_path):
    plain, bare = trained(tmp_path)
    states = random_states()
    training, weights = trained(tmp_path, ProjectedUpdates(tasks(), "full", k=4, refresh=3))
    assert states == random_states()
    assert losses(training.state.log_history) == losses(plain.state.log_history)
    assert torch.equal(weights.kept[8], bare.kept[8])
    for ours, theirs in zip(*(flat(one.optimizer.state_dict()["state"]) for one in (training, plain)), strict=True):
        assert torch.equal(ours, theirs)
    assert [m.training for m in training.model.modules()] == [m.training for m in plain.model.modules()]


def flat(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else ()
    return [tensor for value in values for tensor in flat(value)]


def test_momentum_goes_on_with_the_gradient_as_it_is(tmp_path):
    """After the first step the optimizer's state is that of the plain training."""
    plain, _ = trained(tmp_path, max_steps=1)
    training, _ = trained(tmp_path, ProjectedUpdates(tasks(), "on", k=4), max_steps=1)
    pairs = zip(*(flat(one.optimizer.state_dict()["state"]) for one in (training, plain)), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


# ---- the log ----


def test_the_share_is_logged_with_the_loss_and_is_the_mean_of_its_steps(tmp_path):
    single, _ = trained(tmp_path, ProjectedUpdates(tasks(), "on", k=4, refresh=3), max_steps=6, logging_steps=1)
    by_step = shares(single)
    assert list(by_step) == [1, 2, 3, 4, 5, 6]
    training, _ = trained(
        tmp_path,
        ProjectedUpdates(tasks(), "on", k=4, refresh=3),
        max_steps=6,
        logging_steps=3,
    )
    assert shares(training) == {
        3: pytest.approx(sum(by_step[step] for step in (1, 2, 3)) / 3),
        6: pytest.approx(sum(by_step[step] for step in (4, 5, 6)) / 3),
    }
    assert all("loss" in entry for entry in training.state.log_history if SHARE in entry)


def test_attached_it_is_before_the_reporters(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(SHARE in logs)

    callback = ProjectedUpdates(tasks(), "on", k=4)
    training = trainer(tmp_path, [Reporter(), callback], save_strategy="no", max_steps=1, logging_steps=1)
    assert callback.attach(training) is callback
    training.train()
    assert seen == [True, False]  # the last entry is the summary of the training


# ---- going on ----


def test_a_training_that_resumes_at_a_refresh_is_the_uninterrupted_one(tmp_path):
    def training(**changes: Any) -> Any:
        callback = ProjectedUpdates(tasks(), "off", k=4, refresh=2)
        return trainer(tmp_path / "run", [callback], lora_llama(init_lora_weights=False), **changes)

    whole = training()
    whole.train()
    expected = [p.detach().clone() for p in trained_parameters(whole.model).values()]
    resumed = training()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    pairs = zip(trained_parameters(resumed.model).values(), expected, strict=True)
    assert all(torch.equal(parameter, value) for parameter, value in pairs)


def test_a_callback_serves_one_training_after_another(tmp_path):
    callback = ProjectedUpdates(tasks(), "on", k=4)
    first, weights = trained(tmp_path, callback, max_steps=2)
    second, other = trained(tmp_path, callback, max_steps=2)
    assert torch.equal(weights.kept[2], other.kept[2])
    assert shares(first) == shares(second)


# ---- what is refused ----


def test_probe_samples_that_are_trained_on_are_refused(tmp_path):
    data = Tokens()
    message = "Task 'seen': expected held-out samples, got 4 of 4 that are also in the training set"
    callback = ProjectedUpdates([Task("seen", [data[number] for number in range(4)])], "on", k=2)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path, [callback]).train()


def test_half_precision_is_refused_when_training_begins(tmp_path):
    with pytest.raises(ValueError, match=re.escape("Load the model in float32 and train with autocast (bf16=True)")):
        trainer(tmp_path, [ProjectedUpdates(tasks(), "on", k=4)], lora_llama().bfloat16()).train()


def test_deepspeed_is_refused(tmp_path):
    class DeepSpeedOptimizerWrapper:
        pass

    event = {"model": lora_llama(), "optimizer": DeepSpeedOptimizerWrapper()}
    with pytest.raises(ValueError, match=re.escape("got DeepSpeed's, which overwrites them with its copies")):
        ProjectedUpdates(tasks(), "on", k=4).on_train_begin(
            arguments(tmp_path), TrainerState(), TrainerControl(), **event
        )


def test_a_wrong_word_is_refused():
    with pytest.raises(ValueError, match="got 'inside'"):
        ProjectedUpdates(tasks(), "inside")
