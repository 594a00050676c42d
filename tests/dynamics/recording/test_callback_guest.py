"""The callback is a guest: the training is the same with it and without, and nothing is left of it afterwards."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dynamics
from dynamics import DynamicsCallback
from probes import Task
from tests.runs import VOCABULARY, llama, lora_llama, losses, random_states, trainer

STATES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def hooks(model: nn.Module) -> list[object]:
    """Everything that hangs on a model's modules and parameters."""
    of_modules = [hook for module in model.modules() for name in STATES for hook in getattr(module, name).values()]
    of_parameters = [
        hook
        for parameter in model.parameters()
        for hook in (
            *(parameter._backward_hooks or {}).values(),
            *(parameter._post_accumulate_grad_hooks or {}).values(),
        )
    ]
    return [*of_modules, *of_parameters]


def outcome(training) -> SimpleNamespace:
    model = training.model
    optimizer = training.optimizer.state_dict()["state"]
    return SimpleNamespace(
        weights={name: tensor.clone() for name, tensor in model.state_dict().items()},
        optimizer={
            (index, name): torch.as_tensor(v).clone() for index, s in optimizer.items() for name, v in s.items()
        },
        losses=losses(training.state.log_history),
        random=random_states(),
        modes={name: module.training for name, module in model.named_modules()},
        trained={name: parameter.requires_grad for name, parameter in model.named_parameters()},
        gradients={name for name, parameter in model.named_parameters() if parameter.grad is not None},
        attributes={name: sorted(vars(module)) for name, module in model.named_modules()},
        hooks=len(hooks(model)),
    )


def assert_same(one: SimpleNamespace, other: SimpleNamespace) -> None:
    for tensors in ("weights", "optimizer"):
        ours, theirs = getattr(one, tensors), getattr(other, tensors)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), tensors
    for name in ("losses", "random", "modes", "trained", "gradients", "attributes", "hooks"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> SimpleNamespace:
    training = trainer(tmp_path_factory.mktemp("without"))
    training.train()
    return outcome(training)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("preset", ["economy", "standard", "full"])
def test_the_training_is_the_same_bit_for_bit(without, tmp_path, preset, attached):
    callback = DynamicsCallback(tmp_path, preset=preset)
    training = trainer(tmp_path, [callback])
    if attached:
        callback.attach(training)
    training.train()
    assert_same(outcome(training), without)
    assert callback.recorder.steps[-1] == 8


#: What the twin above, with two batches accumulated, leaves out.
MODES = {
    "one batch a step": {"gradient_accumulation_steps": 1},
    "bf16 autocast": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def trained_in(mode: str, folder: Path, callbacks=()) -> SimpleNamespace:
    training = trainer(folder, callbacks, max_steps=3, save_strategy="no", logging_steps=1, **MODES[mode])
    training.train()
    return outcome(training)


@pytest.fixture(scope="module", params=MODES)
def mode_without(request, tmp_path_factory) -> tuple[str, SimpleNamespace]:
    return request.param, trained_in(request.param, tmp_path_factory.mktemp("mode"))


@pytest.mark.parametrize("everything", [False, True])
def test_the_training_is_the_same_in_every_mode(mode_without, tmp_path, everything):
    mode, expected = mode_without
    rows = torch.randint(VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(99))
    options: dict[str, Any] = {"preset": "standard", "every": 1}
    if everything:
        held_out = Task("held out", [{"input_ids": row, "labels": row} for row in rows])
        options = {"preset": "full", "tasks": [held_out], "intervene": [2], "at": [2]}
    callback = DynamicsCallback(tmp_path, strict=True, **options)
    assert_same(trained_in(mode, tmp_path, [callback]), expected)
    assert callback.recorder.steps == ([2] if everything else [1, 2, 3])


@pytest.mark.parametrize("preset", ["economy", "standard", "full"])
def test_pythons_random_numbers_are_left_alone(tmp_path, preset):
    states = []
    for name, callbacks in (("plain", []), ("run", [DynamicsCallback(tmp_path / "run", preset=preset)])):
        random.seed(0)
        trainer(tmp_path / name, callbacks).train()
        states.append(random.getstate())
    assert states[0] == states[1]


def test_what_the_twin_compares_can_differ(without, tmp_path):
    training = trainer(tmp_path, max_grad_norm=0.1)
    training.train()
    with pytest.raises(AssertionError):
        assert_same(outcome(training), without)


class Interruption(Exception):
    pass


def interrupted_training(out: Path, callback: DynamicsCallback):
    """A training whose third step raises in the middle of its backward pass."""
    model, calls = lora_llama(), []

    def fail(gradient):
        calls.append(gradient)
        if len(calls) > 4:
            raise Interruption
        return gradient

    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    handle = first.register_hook(fail)
    return trainer(out, [callback], model, max_steps=6), handle


def test_after_a_training_that_raised_close_leaves_nothing(tmp_path):
    callback = DynamicsCallback(tmp_path, every=1)
    training, handle = interrupted_training(tmp_path, callback)
    with pytest.raises(Interruption), callback:
        training.train()
    handle.remove()
    assert hooks(training.model) == []
    assert dynamics.open_run(tmp_path)["update"]["step"].values.tolist() == [1, 2]


def test_left_over_hooks_are_inert(tmp_path):
    callback = DynamicsCallback(tmp_path, every=1)
    training, handle = interrupted_training(tmp_path, callback)
    with pytest.raises(Interruption):
        training.train()
    handle.remove()
    model, before = training.model, random_states()
    model.zero_grad()
    batch = training.train_dataset[0]
    model(input_ids=batch["input_ids"][None], labels=batch["labels"][None]).loss.backward()
    callback.close()
    assert hooks(model) == []
    assert callback.recorder.steps == [1, 2]
    assert before != random_states()  # dropout draws, the callback does not


def test_the_same_callback_can_watch_a_second_training(tmp_path):
    callback = DynamicsCallback(tmp_path / "a", every=4)
    trainer(tmp_path / "a", [callback], max_steps=4).train()
    with pytest.raises(dynamics.store.RecordsExist, match="holds 1 captured step, the last of them 4"):
        trainer(tmp_path / "b", [callback], max_steps=4).train()


# ---- models of every kind ----


def tied() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    model.model.layers.requires_grad_(False)
    return model


def one_matrix() -> nn.Module:
    model = llama()
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    return model


MODELS = {
    "tied weights once, others frozen": (tied, {"model.embed_tokens"}),
    "without any LoRA": (one_matrix, {"model.layers.0.self_attn.q_proj"}),
    "modules_to_save": (
        lambda: lora_llama(2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind(tmp_path, name):
    build, expected = MODELS[name]
    plain = trainer(tmp_path / "plain", model=build(), max_steps=2, save_strategy="no")
    plain.train()
    callback = DynamicsCallback(tmp_path / "run", every=1)
    training = trainer(tmp_path / "run", [callback], build(), max_steps=2, save_strategy="no")
    training.train()
    assert_same(outcome(training), outcome(plain))
    update = dynamics.open_run(tmp_path / "run")["update"]
    assert set(update["matrix"].values.tolist()) == expected
    assert (update["frobenius_norm"].sel(kind="total").values > 0).all()


def test_a_compiled_model_is_trained_alike_and_compiled_no_more_often(tmp_path):
    """Hooks on parameters of a captured step must not make the compiler look again."""
    results, graphs = [], []
    for name, callbacks in (("plain", []), ("run", [DynamicsCallback(tmp_path / "run", preset="full", at=[2])])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "save_strategy": "no"}
        training = trainer(tmp_path / name, callbacks, llama(), max_steps=3, **options)
        training.train()
        results.append(outcome(training))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert_same(*results)
    assert graphs[0] == graphs[1] > 0
    update = dynamics.open_run(tmp_path / "run")["update"]
    assert update["step"].values.tolist() == [2]
    assert "model.layers.0.self_attn.q_proj" in update["matrix"].values


def test_nothing_to_watch_is_an_error_when_training_begins(tmp_path):
    callback = DynamicsCallback(tmp_path, matrices="no_such_matrix")
    message = "Expected at least one matrix to watch whose name matches 'no_such_matrix', found none among 14 trainable"
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path, [callback]).train()
    assert not (tmp_path / "dynamics").exists()
