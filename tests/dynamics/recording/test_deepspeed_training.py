"""One training in two processes by DeepSpeed ZeRO, and in one: the records hold the same numbers.

Run as a module, it prints the table of docs/recording.md, with the ways of test_probing_ranks_training.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import xarray as xr

import dynamics
from dynamics import DynamicsCallback, Recorder
from dynamics.recording import meeting
from tests.distributed import RANKS, Ranks
from tests.one_training import (
    CLIP,
    COLUMNS,
    MICRO,
    STEPS,
    TOLERANCES,
    WAYS,
    batches,
    differences,
    loss_of,
    model,
    optimizer_of,
    trained_alone,
    trained_by_torch,
)
from tests.records import records_of
from tests.runs import trainer
from tests.updates import probe_tasks

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install -e .[deepspeed]"
    ),
]

ZERO = ("ZeRO-1", "ZeRO-2", "ZeRO-3")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(timeout=180) as processes:
        yield processes


# ---- one training in several ways ----


def engine_of(stage: int, **changes: Any) -> Any:
    """DeepSpeed's engine around the model; every parameter is split in stage 3, be it small."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would have to be compiled
    trained = model()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    configuration = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        **changes,
    }
    optimizer = optimizer_of(parameters)
    return deepspeed.initialize(model=trained, model_parameters=parameters, optimizer=optimizer, config=configuration)[
        0
    ]


def trained_by_zero(
    run: Path | None,
    stage: int,
    precision: str = "float32",
    before: Callable[[Recorder, int], None] = lambda recorder, step: None,
    strict: bool = True,
    **options: Any,
) -> tuple[list[int], str, list[str]]:
    """Steps that this process recorded (without a folder none), a digest of the weights, and warnings."""
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    changes = {"torch_autocast": autocast} if precision == "bf16 autocast" else {}
    engine = engine_of(stage, **changes)
    recorder = None if run is None else Recorder(run, engine, every=1, strict=strict, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, micro_batches in enumerate(batches(dist.get_rank()), 1):
            if recorder is not None:
                before(recorder, step)
            with nullcontext() if recorder is None else recorder.step(step, engine):
                for micro in micro_batches:
                    engine.backward(loss_of(engine, micro))
                    engine.step()
    steps = [] if recorder is None else recorder.steps
    if recorder is not None:
        recorder.close()
    return steps, digest(engine), [str(each.message) for each in caught if "optimization-dynamics" in str(each.message)]


def digest(engine: Any) -> str:
    from deepspeed.utils import safe_get_full_fp32_param

    hashed = hashlib.sha256()
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            hashed.update(safe_get_full_fp32_param(parameter).numpy().tobytes())
    engine.destroy()
    return hashed.hexdigest()


def trained(run: Path, way: str, precision: str, **options: Any) -> list[int]:
    """The steps that this process recorded."""
    if way in ZERO:
        return trained_by_zero(run, int(way[-1]), precision, **options)[0]
    return trained_by_torch(run, way, precision, **options)[0]


# ---- one truth ----


@pytest.mark.parametrize("precision", TOLERANCES)
def test_records_are_those_of_one_process(ranks, tmp_path, precision):
    trained_alone(tmp_path / "alone", precision)
    for way in ZERO:
        run = tmp_path / way
        assert ranks(trained, run, way, precision) == [list(range(1, STEPS + 1)), []], way
        worst = differences(run, tmp_path / "alone")
        assert max(worst.values()) <= TOLERANCES[precision], (way, worst)


def gram(run: Path) -> xr.DataArray:
    return dynamics.open_run(run)["fisher"]["gram"].load()


def test_tasks_are_probed_under_zero_1_and_2(ranks, tmp_path):
    trained_alone(tmp_path / "alone", tasks=probe_tasks())
    expected = gram(tmp_path / "alone")
    for stage in (1, 2):
        run = tmp_path / str(stage)
        first, second = ranks(trained_by_zero, run, stage, tasks=probe_tasks())
        assert first[0] == list(range(1, STEPS + 1))
        np.testing.assert_allclose(gram(run), expected, atol=1e-5 * float(np.abs(expected).max()))
        bare = ranks(trained_by_zero, None, stage)
        assert [first[1], second[1]] == [digest for _, digest, _ in bare]


def refused(run: Path) -> str:
    engine = engine_of(3)
    try:
        Recorder(run, engine, every=1, tasks=probe_tasks())
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return "not refused"


def test_tasks_are_refused_under_zero_3(ranks, tmp_path):
    message = (
        "Expected parameters that are whole on each rank, got shards of ZeRO-3 or tensor parallelism, of which "
        "per-sample gradients are not measured. Use FSDP 2, or leave tasks out and probe checkpoints: "
        "python -m dynamics.analyze RUN --probe module:function"
    )
    assert ranks(refused, tmp_path) == [message] * RANKS


# ---- a guest ----


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_is_the_same_with_and_without(ranks, tmp_path, stage):
    (steps, *watched), other = ranks(trained_by_zero, tmp_path, stage)
    assert steps == list(range(1, STEPS + 1))
    bare = ranks(trained_by_zero, None, stage)
    assert [watched[0], other[1]] == [digest for _, digest, _ in bare]


def broken(recorder: Recorder, step: int) -> None:
    """On the second rank the second step cannot be recorded."""
    if dist.get_rank() == 1:
        recorder._transition = _fails if step == 2 else type(recorder)._transition.__get__(recorder)


def _fails(**_: Any) -> None:
    raise ZeroDivisionError("on one rank")


@pytest.mark.parametrize("stage", [2, 3])
def test_what_fails_on_one_rank_costs_a_record(ranks, tmp_path, stage):
    first, second = ranks(trained_by_zero, tmp_path, stage, before=broken, strict=False)
    assert first[0] == [1, 3]
    assert "could not record step 2 (RuntimeError: rank 1: ZeroDivisionError: on one rank)" in first[2][0]
    assert [first[1], second[1]] == [digest for _, digest, _ in ranks(trained_by_zero, None, stage)]


def late(recorder: Recorder, step: int) -> None:
    """On the second rank the second step's record takes longer than the first rank waits."""
    assert recorder._zero is not None
    if dist.get_rank() == 0:
        recorder._zero.meeting.patience = 0.2
    elif step == 2:
        recorder._transition = _takes_long


def _takes_long(**_: Any) -> None:
    time.sleep(1.0)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_is_late_ends_the_record_and_not_the_training(ranks, tmp_path, stage):
    first, second = ranks(trained_by_zero, tmp_path, stage, before=late, strict=False)
    assert first[0] == [1]
    assert "records nothing from step 2 on" in first[2][0]
    assert "rank 0 waited 0.2 s for another" in first[2][0]
    assert [first[1], second[1]] == [digest for _, digest, _ in ranks(trained_by_zero, None, stage)]
    assert meeting.PATIENCE == 15


# ---- half precision, and the Trainer ----


def in_half(run: Path, stage: int) -> list[int]:
    engine = engine_of(stage, bf16={"enabled": True})
    with Recorder(run, engine, every=1, strict=True) as recorder:
        for step, micro_batches in enumerate(batches(dist.get_rank()), 1):
            with recorder.step(step):
                for micro in micro_batches:
                    engine.backward(loss_of(engine, micro))
                    engine.step()
    engine.destroy()
    return recorder.steps


def test_in_half_precision_the_weights_are_those_that_zero_keeps(ranks, tmp_path):
    trained_alone(tmp_path / "alone", "bf16 autocast")
    for stage in (1, 2, 3):
        run = tmp_path / str(stage)
        assert ranks(in_half, run, stage) == [list(range(1, STEPS + 1)), []]
        worst = differences(run, tmp_path / "alone")
        assert max(worst.values()) <= 0.1, (stage, worst)  # the weights themselves are rounded to 8 bits for each pass
        assert not dynamics.open_run(run)["update"]["quantisation_limited"].any()


def by_trainer(run: Path, stage: int) -> tuple[list[int], bool]:
    """Steps recorded, and whether a number reached the log."""
    from accelerate.state import AcceleratorState, PartialState

    engine_of(1).destroy()  # imports DeepSpeed as the tests need it
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    adapted = model()
    for module in adapted.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    callback = DynamicsCallback(run, every=1, strict=True)
    options: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "no", "logging_steps": 1, "max_grad_norm": CLIP}
    if stage:
        zero_options = {"stage": stage, "stage3_param_persistence_threshold": 0}
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": zero_options,
            "zero_allow_untested_optimizer": True,
        }
    training = trainer(run, [callback], adapted, **options)
    callback.attach(training)
    training.train()
    assert callback.recorder is not None
    logged = any("dynamics/gradient/norm_before_clip" in entry for entry in training.state.log_history)
    return callback.recorder.steps, logged


def test_through_the_trainer(ranks, tmp_path):
    every_step = list(range(1, STEPS + 1))
    assert ranks(by_trainer, tmp_path / "0", 0) == [(every_step, True), ([], False)]
    for stage in (1, 2, 3):
        run = tmp_path / str(stage)
        assert ranks(by_trainer, run, stage) == [(every_step, True), ([], False)]
        worst = differences(run, tmp_path / "0")
        assert max(worst.values()) <= 1e-3, (stage, worst)  # Adam divides small gradients by themselves
        codes = [finding["code"] for finding in records_of(run).attributes["findings"]]
        assert "OD311" not in codes


def table() -> None:
    """Print the table of docs/recording.md."""
    labels = ("norm before clipping", "norm after clipping", "gradient spectra", "update spectra", "K")
    print("| | " + " | ".join(labels) + " |")
    print("|---" * (len(labels) + 1) + "|")
    with tempfile.TemporaryDirectory() as folder, Ranks(timeout=180) as processes:
        for precision in TOLERANCES:
            alone, split = Path(folder, precision, "alone"), Path(folder, precision, "split")
            trained_alone(alone, precision, tasks=probe_tasks())
            trained_alone(split, precision, split=True, tasks=probe_tasks())
            runs = {"one process, another split": split}
            for way in (*WAYS, *ZERO):
                runs[way] = Path(folder, precision, way)
                processes(trained, runs[way], way, precision, tasks=None if way == "ZeRO-3" else probe_tasks())
            for way, run in runs.items():
                worst = differences(run, alone)
                shown = [f"{worst[name]:.1e}" if name in worst else "–" for name in COLUMNS]
                print(f"| {way}, {precision} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    table()
