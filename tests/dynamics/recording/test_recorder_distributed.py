"""In two processes one store is written, and its numbers are those of one process on the joined batch."""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import dynamics
from dynamics import DynamicsCallback, Recorder
from dynamics.spectra import walk
from dynamics.store import RecordsExist
from dynamics.store.record_folders import RECORDS_KIND
from tests.distributed import RANKS, Ranks
from tests.records import records_of
from tests.runs import VOCABULARY, arguments, llama, lora_llama, trainer
from tests.updates import probe_tasks

STEPS = 3


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(timeout=120) as processes:
        yield processes


def model() -> nn.Module:
    """LoRA on a Llama in float64, without dropout; B is not zero, so that both factors have gradients."""
    return lora_llama(2, lora_dropout=0.0, init_lora_weights=False).double().eval()


def dense() -> nn.Module:
    """A Llama that is trained whole."""
    return llama(num_hidden_layers=2).double().eval()


def batches() -> Tensor:
    """(step, rank, sample, token)"""
    return torch.randint(VOCABULARY, (STEPS, RANKS, 2, 6), generator=torch.Generator().manual_seed(1))


def train(run: Path, model: nn.Module, rows: Tensor, first: int = 1, **options: Any) -> int:
    """Plain training; the number of records that this process wrote."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    with Recorder(run, model, preset="full", every=1, **options) as recorder:
        if recorder._probes is not None:  # sharpness and losses are compared in test_probing_ranks_training
            recorder._probes._preset = replace(recorder.preset, sharpness=False, predictions=False)
        for step, batch in enumerate(rows, start=first):
            with recorder.step(step, optimizer):
                model(input_ids=batch, labels=batch).loss.backward()
                nn.utils.clip_grad_norm_(parameters, 0.1)
                optimizer.step()
                optimizer.zero_grad()
        return len(recorder.steps)


def intervening() -> dict[str, Any]:
    """Options: at the last step the update is taken apart."""
    return {"tasks": probe_tasks(), "intervene": [STEPS], "arms": ["on"], "k": 2}


def with_ddp(run: Path) -> int:
    return train(run, DistributedDataParallel(model()), batches()[:, dist.get_rank()], **intervening())


def sharded(model: nn.Module) -> nn.Module:
    """By FSDP 2, layer by layer."""
    for layer in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]:
        fully_shard(layer)
    return fully_shard(model)


class Gathers:
    """While this is on: the most numbers in tensors that were gathered and not yet let go."""

    def __init__(self) -> None:
        self._alive: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0

    def __enter__(self) -> Gathers:
        self._full_tensor = DTensor.full_tensor
        DTensor.full_tensor = lambda parameter, **options: self._noted(self._full_tensor(parameter, **options))
        return self

    def __exit__(self, *_: object) -> None:
        DTensor.full_tensor = self._full_tensor

    def _noted(self, whole: Tensor) -> Tensor:
        gc.collect()  # whatever waits for it does not count
        # By their storage: a view keeps it alive without the tensor.
        self._alive = [(storage, size) for storage, size in self._alive if not storage.expired()]
        self._alive.append((StorageWeakRef(whole.untyped_storage()), whole.numel()))
        self.peak = max(self.peak, sum(size for _, size in self._alive))
        return whole


def with_fsdp(run: Path, build: Callable[[], nn.Module]) -> tuple[int, int]:
    """Records written, and the most numbers that were gathered at once; each batch is one matrix."""
    walk.BATCH_BYTES = {"cpu": 1}
    with Gathers() as gathers:
        return train(run, sharded(build()), batches()[:, dist.get_rank()]), gathers.peak


def with_fsdp_resumed(run: Path) -> tuple[int, int]:
    """Records that there were after all but the last step, and after a second recorder went on."""
    trained, rows = sharded(model()), batches()[:, dist.get_rank()]
    before = train(run, trained, rows[:-1])
    return before, train(run, trained, rows[-1:], first=STEPS, resume_from=STEPS - 1)


def with_trainer(run: Path, batch: int = 2) -> tuple[int, int, bool]:
    """Processes that the Trainer counts, records written, and whether a number reached this rank's log."""
    callback = DynamicsCallback(run, preset="full", every=1)
    model = lora_llama(2, lora_dropout=0.0)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # random numbers differ between one process and two
    changes = {"max_steps": STEPS, "save_strategy": "no", "logging_steps": 1}
    training = trainer(run, [callback], model, per_device_train_batch_size=batch, **changes)
    callback.attach(training)
    training.train()
    assert callback.recorder is not None
    logged = any("dynamics/total/frobenius_norm" in entry for entry in training.state.log_history)
    return training.args.world_size, len(callback.recorder.steps), logged


def refused(run: Path, **options: Any) -> str:
    try:
        Recorder(run, sharded(model()), every=1, **options)
    except (RecordsExist, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, xr.Dataset]:
    """One process, the batches of both ranks joined."""
    run = tmp_path_factory.mktemp("alone")
    train(run, model(), batches().flatten(1, 2), **intervening())
    return numbers(run)


@pytest.fixture(scope="module")
def together(ranks, tmp_path_factory) -> Path:
    """Both processes."""
    run = tmp_path_factory.mktemp("together") / "run"
    assert ranks(with_ddp, run) == [STEPS, 0]
    return run


@pytest.fixture
def run(together, tmp_path) -> Path:
    return shutil.copytree(together, tmp_path / "run")


def numbers(run: Path) -> dict[str, xr.Dataset]:
    tree = dynamics.open_run(run)
    groups = {"update", "gradient", "intervention"} & set(tree.children)
    return {name: tree[name].to_dataset().load() for name in groups}


def assert_same(found: dict[str, xr.Dataset], expected: dict[str, xr.Dataset], tolerance: float = 1e-6) -> None:
    update, gradient = found["update"], found["gradient"]
    assert update["step"].values.tolist() == list(range(1, STEPS + 1))
    assert update["matrix"].values.tolist() == expected["update"]["matrix"].values.tolist()
    for name in ("singular_value", "increment_cosine"):
        np.testing.assert_allclose(update[name], expected["update"][name], rtol=tolerance, atol=tolerance / 1e3)
    for name in ("norm_before_clip", "norm_after_clip", "singular_value"):
        np.testing.assert_allclose(gradient[name], expected["gradient"][name], rtol=tolerance, atol=tolerance / 1e3)


def test_ddp(together, alone):
    found = numbers(together)
    assert_same(found, alone)
    effects, expected = (each["intervention"]["effect"] for each in (found, alone))
    assert effects["step"].values.tolist() == [STEPS]
    np.testing.assert_allclose(effects, expected, atol=1e-6 * float(np.abs(expected).max()))


def test_fsdp2_gathers_the_factors_of_one_batch_at_a_time(ranks, alone, tmp_path):
    (written, peak), (none, others_peak) = ranks(with_fsdp, tmp_path, model)
    assert (written, none) == (STEPS, 0)
    assert_same(numbers(tmp_path), alone)
    batch = 2 * 3 * (16 + 24)  # values and gradients of the largest matrix
    assert batch <= peak < 2 * batch  # not just the same: gloo's thread lets go of a tensor a little later
    assert batch <= others_peak < 2 * batch
    assert sum(p.numel() for p in model().parameters() if p.requires_grad) == 1488


def test_fsdp2_gathers_one_dense_weight_at_a_time(ranks, tmp_path):
    run, twin = tmp_path / "run", tmp_path / "alone"
    (written, peak), (none, others_peak) = ranks(with_fsdp, run, dense)
    train(twin, dense(), batches().flatten(1, 2))
    assert (written, none) == (STEPS, 0)
    assert_same(numbers(run), numbers(twin))
    batch = 2 * VOCABULARY * 16  # value and gradient of an embedding
    assert batch <= peak < 2 * batch
    assert batch <= others_peak < 2 * batch
    assert sum(p.numel() for p in dense().parameters()) > 5 * peak


def test_fsdp2_goes_on_in_the_same_records(ranks, alone, tmp_path):
    assert ranks(with_fsdp_resumed, tmp_path) == [(STEPS - 1, STEPS), (0, 0)]
    found, expected = numbers(tmp_path), alone
    for group in ("update", "gradient"):
        values = [each[group]["singular_value"] for each in (found, expected)]
        np.testing.assert_allclose(*values, rtol=1e-6, atol=1e-9)
    assert found["update"]["from_step"].values.tolist() == list(range(STEPS))


def test_what_the_first_rank_refuses_all_refuse(ranks, run):
    first, second = ranks(refused, run)
    assert first == second
    assert first.startswith("RecordsExist: ")
    assert f"holds {STEPS} captured steps" in first


@pytest.mark.parametrize(
    ("broken", "content", "message"),
    [
        ("run.json", f'{{"kind": "{RECORDS_KIND}", "format": 99}}', "are of format 99"),
        ("start.safetensors", "broken", "does not open"),
    ],
)
def test_what_the_first_rank_cannot_read_all_refuse(ranks, run, broken, content, message):
    (run / "dynamics" / "records" / broken).write_text(content)
    first, second = ranks(refused, run, resume_from=STEPS)
    assert first == second
    assert message in first


def test_a_record_of_other_weights_all_refuse(ranks, run):
    first, second = ranks(refused, run, resume_from=STEPS)
    assert first == second
    assert f"has a record of step {STEPS} whose spectra differ from the model's" in first


def test_the_callback_in_a_trainer_on_two_processes(ranks, tmp_path):
    run, twin = tmp_path / "run", tmp_path / "alone"
    assert ranks(with_trainer, run) == [(RANKS, STEPS, True), (RANKS, 0, False)]
    assert with_trainer(twin, 2 * RANKS) == (1, STEPS, True)
    assert_same(numbers(run), numbers(twin), 1e-4)  # in float32


# ---- DeepSpeed ----


def test_zero_3_without_its_optimizer_is_refused(tmp_path):
    """Its parameters are known by the number that DeepSpeed gives them."""
    weights = nn.Linear(2, 2)
    weights.weight.ds_id = 0
    message = (
        "Expected parameters that can be read, got those of DeepSpeed ZeRO-3 without their optimizer. Make the "
        "recorder after deepspeed.initialize, and install deepspeed>=0.19. Or use FSDP 2."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Recorder(tmp_path, weights)
    assert list(tmp_path.iterdir()) == []


class DeepSpeedOptimizerWrapper:
    """Named as Accelerate's, which the Trainer hands over under DeepSpeed."""


@pytest.mark.parametrize(
    ("deepspeed", "optimizer"), [("zero2.json", None), (None, DeepSpeedOptimizerWrapper())], ids=["Trainer", "wrapper"]
)
def test_where_zero_does_not_show_itself_updates_are_recorded_and_gradients_are_not(tmp_path, deepspeed, optimizer):
    """An engine takes gradients out of `.grad` as they come, clips and steps; the callback sees the same events."""
    weights = nn.Linear(2, 2)
    options = arguments(tmp_path, save_strategy="no")
    options.deepspeed = deepspeed  # afterwards: DeepSpeed itself is not needed here
    state, control = TrainerState(max_steps=1), TrainerControl()
    callback = DynamicsCallback(tmp_path, every=1)
    events = {"args": options, "state": state, "control": control, "optimizer": optimizer}
    callback.on_train_begin(model=weights, **events)
    callback.on_step_begin(**events)
    weights(torch.ones(2)).sum().backward()
    weights.zero_grad()
    callback.on_pre_optimizer_step(**events)
    with torch.no_grad():
        weights.weight += 1
    state.global_step = 1
    callback.on_step_end(**events)
    callback.close()
    capture = records_of(tmp_path)
    assert list(capture.records[1]) == ["update"]
    assert [finding["code"] for finding in capture.attributes["findings"]] == ["OD306", "OD311"]
    assert capture.attributes["gaps"] == []
    total = capture.records[1]["update"]["singular_value"].sel(kind="total", step=1)
    np.testing.assert_allclose(total.values, [[2, 0]], atol=1e-6)
