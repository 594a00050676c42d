"""One training in two processes, by a loop that reduces gradients itself, DDP and FSDP 2, and in one: one truth.

Under DeepSpeed: test_deepspeed_training.py, which prints the whole table.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dynamics
from dynamics import DynamicsCallback, Recorder
from dynamics.recording import meeting
from tests.distributed import Ranks
from tests.mixtures import mixture
from tests.one_training import (
    CLIP,
    STEPS,
    TOLERANCES,
    WAYS,
    batches,
    differences,
    loss_of,
    model,
    optimizer_of,
    sharded,
    trained_alone,
    trained_by_torch,
)
from tests.runs import VOCABULARY, trainer
from tests.updates import probe_tasks

EVERY_STEP = list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(timeout=240) as processes:
        yield processes


@pytest.mark.parametrize("precision", TOLERANCES)
def test_records_are_those_of_one_process_and_the_training_is_the_same(ranks, tmp_path, precision):
    trained_alone(tmp_path / "alone", precision, tasks=probe_tasks(2))
    for way in WAYS:
        recorded = ranks(trained_by_torch, tmp_path / way, way, precision, tasks=probe_tasks(2))
        assert [steps for steps, _ in recorded] == [EVERY_STEP, []], way
        worst = differences(tmp_path / way, tmp_path / "alone")
        assert len(worst) == 5
        assert max(worst.values()) <= TOLERANCES[precision], (way, worst)
        bare = ranks(trained_by_torch, None, way, precision)
        for (_, weights), (_, expected) in zip(recorded, bare, strict=True):
            assert all(map(torch.equal, weights, expected)), way


# ---- everything that probe samples can be asked, under FSDP 2 ----


def test_interventions_sharpness_and_losses_are_those_of_one_process(ranks, tmp_path):
    asked = {"preset": "full", "intervene": [2], "arms": ["on"], "k": 2}
    trained_alone(tmp_path / "alone", tasks=probe_tasks(4), **asked)
    ranks(trained_by_torch, tmp_path / "run", "FSDP 2", tasks=probe_tasks(4), **asked)
    found, expected = dynamics.open_run(tmp_path / "run"), dynamics.open_run(tmp_path / "alone")
    for name in (
        "fisher/update_product",
        "intervention/effect",
        "sharpness/critical_step",
        "loss/change",
        "loss/predicted_first",
        "loss/predicted_second",
    ):
        group, variable = name.split("/")
        values, truth = found[group][variable].load(), expected[group][variable].load()
        assert np.isfinite(truth).any(), name
        np.testing.assert_allclose(values, truth, atol=1e-4 * float(np.abs(truth).max()), err_msg=name)


def test_a_dense_weight_beside_the_watched_matrices(ranks, tmp_path):
    asked = {"tasks": probe_tasks(2), "matrices": "q_proj"}
    trained_alone(tmp_path / "alone", **asked)
    ranks(trained_by_torch, tmp_path / "run", "FSDP 2", **asked)
    worst = differences(tmp_path / "run", tmp_path / "alone")
    assert len(worst) == 5
    assert max(worst.values()) <= TOLERANCES["float32"]


def experts() -> torch.nn.Module:
    """Dense experts, which are stacks of matrices."""
    return mixture("mixtral", vocab_size=VOCABULARY).eval()


def test_stacks_of_experts(ranks, tmp_path):
    asked = {"tasks": probe_tasks(2), "build": experts, "matrices": "experts"}
    trained_alone(tmp_path / "alone", **asked)
    ranks(trained_by_torch, tmp_path / "run", "FSDP 2", **asked)
    worst = differences(tmp_path / "run", tmp_path / "alone")
    assert len(worst) == 5
    assert max(worst.values()) <= TOLERANCES["float32"]


# ---- what goes wrong on one rank ----


def with_trouble(run: Path, trouble: str) -> tuple[list[int], list[str], list[torch.Tensor]]:
    """Steps that this rank recorded, warnings, and its shards at the end; the second step brings most troubles."""
    trained = sharded(model())
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = optimizer_of(parameters)
    if trouble == "evaluated":
        with torch.no_grad():  # FSDP keeps the root whole after that
            loss_of(trained, batches(0)[0][0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Recorder(run, trained, every=1, tasks=probe_tasks(2)) as recorder:
            assert recorder._meeting is not None
            assert recorder._probes is not None
            for step, micro_batches in enumerate(batches(dist.get_rank()), 1):
                with recorder.step(step, optimizer):
                    for micro in micro_batches:
                        (loss_of(trained, micro) / len(micro_batches)).backward()
                    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
                    optimizer.step()
                    optimizer.zero_grad()
                    if step == 2 and trouble == "late":
                        recorder._meeting.patience = 0.5 if dist.get_rank() == 0 else 60.0
                        time.sleep(2.0 * dist.get_rank())
                    if step == 2 and trouble == "before" and dist.get_rank() == 1:
                        recorder._transition = _fails
                    if step == 2 and trouble == "probing" and dist.get_rank() == 0:
                        recorder._probes._measure = _fails
                vars(recorder).pop("_transition", None)
                vars(recorder._probes).pop("_measure", None)
            steps = recorder.steps
    messages = [str(warning.message) for warning in caught if "optimization-dynamics" in str(warning.message)]
    return steps, messages, [p.to_local().detach().clone() for p in parameters]  # pyright: ignore


def _fails(*_: object, **__: object) -> None:
    raise ZeroDivisionError("on one rank")


@pytest.mark.parametrize(
    ("trouble", "steps", "message"),
    [
        ("evaluated", EVERY_STEP, ""),
        ("late", [1], "records nothing from step 2 on, since the ranks were not together (rank 0 waited 0.5 s"),
        ("before", [1, 3], "could not record step 2 (RuntimeError: rank 1: ZeroDivisionError: on one rank)"),
        ("probing", [1, 3], "could not record step 2 (ZeroDivisionError: on one rank)"),
    ],
)
def test_trouble_on_one_rank_costs_records_and_not_the_training(ranks, tmp_path, trouble, steps, message):
    (recorded, messages, *shards), (_, _, *other_shards) = ranks(with_trouble, tmp_path, trouble)
    assert recorded == steps
    assert message in " ".join(messages)
    bare = ranks(trained_by_torch, None, "FSDP 2")
    for found, (_, expected) in zip((shards[0], other_shards[0]), bare, strict=True):
        assert all(map(torch.equal, found, expected))
    assert meeting.PATIENCE == 15


# ---- the Trainer's own FSDP ----


def by_trainer(run: Path, way: str) -> tuple[str, list[int], bool]:
    """How accelerate trains, steps recorded, and whether a number reached this rank's log.

    On a processor accelerate trains by DDP whatever it is asked for: FSDP is looked at for accelerators alone. So it is
    told that there is one, and that tensors go to the processor.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    adapted = model()
    for module in adapted.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    callback = DynamicsCallback(run, probe_tasks(2), every=1, strict=True)
    options = {"max_steps": STEPS, "save_strategy": "no", "logging_steps": 1, "max_grad_norm": CLIP}
    with pytest.MonkeyPatch.context() as patch:
        if way == "FSDP":
            patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
            patch.setattr(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
            options |= {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
        training = trainer(run, [callback], adapted, **options)
        callback.attach(training)
        training.train()
    assert callback.recorder is not None
    logged = any("dynamics/gradient/norm_before_clip" in entry for entry in training.state.log_history)
    kind = str(training.accelerator.distributed_type)
    AcceleratorState._reset_state(reset_partial_state=True)
    return kind, callback.recorder.steps, logged


def test_by_the_trainer(ranks, tmp_path):
    kind = "DistributedType.MULTI_CPU"
    assert ranks(by_trainer, tmp_path / "DDP", "DDP") == [(kind, EVERY_STEP, True), (kind, [], False)]
    kind = "DistributedType.FSDP"
    assert ranks(by_trainer, tmp_path / "FSDP", "FSDP") == [(kind, EVERY_STEP, True), (kind, [], False)]
    worst = differences(tmp_path / "FSDP", tmp_path / "DDP")
    # Adam's first step leaves B nearly of lower rank, where the tangent space of a matrix turns with a last digit.
    assert worst.pop("fisher/gram") <= 1e-2
    assert len(worst) == 4
    assert max(worst.values()) <= 1e-5, worst
