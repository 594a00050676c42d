"""Steps in names of folders and files."""

from __future__ import annotations

import pytest

from dynamics.checkpoints.steps import named_step

STEPS = {
    "checkpoint-10": 10,
    "checkpoint_000100": 100,
    "step_7": 7,
    "step-000100": 100,
    "step=100-last": 100,
    "epoch_0": 0,
    "epoch-3": 3,
    "epoch200": 200,
    "iter_0000010": 10,
    "iteration-5": 5,
    "global_step_10": 10,
    "global_step10": 10,
    "globalstep10": 10,
    "model-step-100": 100,
    "ckpt_epoch_1_step_1200": 1200,
    "epoch=1-step=300": 300,
    "ep0-ba100": 100,
    "checkpoint-1250step": 1250,
    "checkpoint-epoch-3": 3,
    "iter_500_hf": 500,
    "Checkpoint-10": 10,
}
NONE = (
    "run-0",
    "seed1",
    "v0-20250101-101010",
    "llama-3-8b",
    "epochs_3",
    "steps-100",
    "checkpoint-0.5",
    "last-checkpoint",
)
NONE += ("checkpoint-", "step", "1000steps", "adapter_0", "checkpoint-１０", "r16", "stepper_3", "misstep_3")


@pytest.mark.parametrize(("name", "step"), STEPS.items())
def test_step_of_a_name(name: str, step: int) -> None:
    named = named_step(name)
    assert named is not None
    assert (named.number, named.is_plain) == (step, True)


@pytest.mark.parametrize("name", NONE)
def test_names_without_a_step(name: str) -> None:
    assert named_step(name) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("checkpoint-7", "checkpoint-0007", True),
        ("epoch=0-step=10-val_loss=0.31", "epoch=1-step=20-val_loss=1.2e-5", True),
        ("step=10", "step=10-last", True),
        ("checkpoint-7", "checkpoint_7", False),
        ("imax_step_7", "dmax_step_7", False),
        ("r8_step_7", "r16_step_7", False),
    ],
)
def test_one_training_uses_one_template(one: str, other: str, same: bool) -> None:
    first, second = named_step(one), named_step(other)
    assert first is not None
    assert second is not None
    assert (first.template == second.template) is same


@pytest.mark.parametrize(
    ("parent", "step"), [("checkpoints", 100), ("ckpts", 100), ("lora_weights", 100), ("seeds", None)]
)
def test_bare_numbers_are_steps_where_checkpoints_lie(parent: str, step: int | None) -> None:
    named = named_step("000100", parent)
    assert (None if named is None else named.number) == step
