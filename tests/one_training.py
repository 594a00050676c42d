"""One training in two processes, each in another way, and in one: their records hold the same numbers.

Two accumulated micro-batches, clipping, an uneven last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

import dynamics
from dynamics import Recorder
from tests.distributed import RANKS
from tests.runs import VOCABULARY, lora_llama

STEPS, MICRO, CLIP = 3, 2, 0.5
#: Ways of torch alone; in the first the loop reduces gradients itself.
WAYS = ("plain", "DDP", "FSDP 2")
#: Largest difference from one process, as a share of the matrix's largest number.
TOLERANCES = {"float32": 1e-5, "bf16 autocast": 1e-2}
#: What is compared.
COLUMNS = (
    "gradient/norm_before_clip",
    "gradient/norm_after_clip",
    "gradient/singular_value",
    "update/singular_value",
    "fisher/gram",
)


def model() -> nn.Module:
    """Two layers with LoRA on every linear one, and one weight that is trained whole."""
    adapted = lora_llama(2, lora_dropout=0.0).eval()
    adapted.get_output_embeddings().weight.requires_grad_(True)
    return adapted


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """By FSDP 2, layer by layer."""
    for layer in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer | MixtralDecoderLayer)]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def batches(rank: int) -> list[list[Tensor]]:
    """(step, micro-batch): tokens of two samples; the second rank's last micro-batch has one."""
    tokens = torch.randint(VOCABULARY, (STEPS, MICRO, RANKS, 2, 6), generator=torch.Generator().manual_seed(1))
    rows = [[micro[rank] for micro in step] for step in tokens]
    rows[-1][-1] = rows[-1][-1][: 2 - rank]
    return rows


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=2.0)


def autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16 autocast" else nullcontext()


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def trained_alone(
    run: Path, precision: str = "float32", *, split: bool = False, build: Any = None, **options: Any
) -> None:
    """One process, which goes through the micro-batches of both; or through their samples, one by one."""
    trained = model() if build is None else build()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer, rows = optimizer_of(parameters), [batches(rank) for rank in range(RANKS)]
    with Recorder(run, trained, every=1, strict=True, **options) as recorder:
        for step in range(STEPS):
            with recorder.step(step + 1, optimizer):
                micro_batches = [micro for rank in rows for micro in rank[step]]
                for micro in micro_batches:
                    parts: Sequence[Tensor] = micro.split(1) if split else [micro]
                    for part in parts:
                        with autocast(precision):
                            loss = loss_of(trained, part)
                        (loss / len(parts) / len(micro_batches)).backward()
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                optimizer.zero_grad()


def trained_by_torch(
    run: Path | None, way: str, precision: str = "float32", *, build: Any = None, **options: Any
) -> tuple[list[int], list[Tensor]]:
    """Steps that this process recorded (without a folder none), and its weights, or shards of them."""
    trained = model() if build is None else build()
    if way == "FSDP 2":
        trained = sharded(trained)
    elif way == "DDP":
        trained = DistributedDataParallel(trained)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = optimizer_of(parameters)
    recorder = None if run is None else Recorder(run, trained, every=1, strict=True, **options)
    for step, micro_batches in enumerate(batches(dist.get_rank()), 1):
        with nullcontext() if recorder is None else recorder.step(step, optimizer):
            for index, micro in enumerate(micro_batches, 1):
                waits = way == "DDP" and index < MICRO
                with trained.no_sync() if waits else nullcontext():
                    with autocast(precision):
                        loss = loss_of(trained, micro)
                    (loss / MICRO).backward()
            if way == "plain":
                _reduce(parameters)
                if recorder is not None:
                    recorder.before_clipping()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
    steps = [] if recorder is None else recorder.steps
    if recorder is not None:
        recorder.close()
    weights = [getattr(p, "_local_tensor", p).detach().clone() for p in parameters]
    return steps, weights


def _reduce(parameters: Sequence[nn.Parameter]) -> None:
    """The mean of gradients over processes, as a loop of one's own takes it."""
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS


def differences(run: Path, alone: Path) -> dict[str, float]:
    """The largest difference between two runs, by variable: of norms relative, else in units of the largest number.

    Of K by block and step, and only where both runs have it.
    """
    found, expected = dynamics.open_run(run), dynamics.open_run(alone)
    assert found["update"]["matrix"].values.tolist() == expected["update"]["matrix"].values.tolist()
    assert found["update"]["step"].values.tolist() == list(range(1, STEPS + 1))
    worst = {}
    for column in COLUMNS:
        group, name = column.split("/")
        if group not in found.children or group not in expected.children:
            continue
        values, truth = found[group][name].load(), expected[group][name].load()
        np.testing.assert_array_equal(np.isnan(values), np.isnan(truth))
        reduced = [dimension for dimension in ("index", "sample", "sample_") if dimension in truth.dims]
        size = np.abs(truth).max(reduced) if reduced else truth
        worst[column] = float((np.abs(values - truth) / size.where(size > 0, 1.0)).max())
    return worst
