"""Makes runs: files of checkpoints from given factors, records without a model, and tiny trainings by the Trainer.

A training is the same to the last bit whenever it is made with the same arguments. ``transformers`` and ``peft`` are
imported by what needs them alone, for the sake of the many tests that do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynamics.checkpoints.checkpoint import CheckpointContent
from dynamics.checkpoints.trajectory import MatrixShape, OpenCheckpoint, Trajectory
from dynamics.spectra import raw
from dynamics.spectra.raw import GradientSpectrum
from dynamics.spectra.walk import Previous, solve_batch
from dynamics.store import RecordWriter
from probes.low_rank import LowRankMatrix

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

#: Name of the matrix -> (B, A): shapes (out, rank) and (rank, in).
Factors = Mapping[str, tuple[Tensor, Tensor]]

NAMES = tuple(f"model.layers.{layer}.self_attn.{role}" for layer in range(2) for role in ("q_proj", "v_proj"))


# ---- checkpoints ----


def random_factors(
    names: Sequence[str] = NAMES,
    out: int = 12,
    in_: int = 10,
    rank: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Gaussian factors for each name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(out, rank, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(rank, in_, generator=generator, dtype=torch.float64).to(dtype),
        )
        for name in names
    }


def drifting(steps: Sequence[int], seed: int = 0, **shape: Any) -> dict[int, dict[str, tuple]]:
    """Step to factors that drift, as a training's do; for ``write_run`` and ``write_records`` alike."""
    start = random_factors(seed=seed, **shape)
    noises = {step: random_factors(seed=seed + 1 + step, **shape) for step in steps}
    return {
        step: {
            name: (left * 0.01 * step + noises[step][name][0] * 0.02, right + noises[step][name][1] * 0.02)
            for name, (left, right) in start.items()
        }
        for step in steps
    }


def adapter_config(rank: int = 4, alpha: float = 8, **changes: Any) -> dict[str, Any]:
    """A LoRA ``adapter_config.json`` with the keys that matter; ``changes`` are set on top."""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        **changes,
    }


def adapter_tensors(factors: Factors, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """Factors under the keys that PEFT gives them."""
    tensors = {}
    for name, (left, right) in factors.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = right.contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = left.contiguous()
    return tensors


def write_adapter(
    folder: Path,
    factors: Factors | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    binary: bool = False,
) -> Path:
    """One adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

    Args:
        folder: Made if it is not there.
        factors: Matrices, written under PEFT's keys; by default random ones.
        config: The configuration; by default one whose rank is that of the first matrix. ``{}`` writes none.
        tensors: Written as they are, in place of factors.
        extra: Written beside the factors as they are.
        binary: Write ``adapter_model.bin``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        factors = random_factors() if factors is None else factors
        tensors = adapter_tensors(factors)
        if config is None:
            config = adapter_config(rank=next(iter(factors.values()))[0].shape[1])
    tensors = {key: tensor.contiguous() for key, tensor in {**tensors, **(extra or {})}.items()}
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapter_config() if config is None else config
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def log_history(until: int, every: int = 5, loss: float = 2.0, **scalars: float) -> list[dict[str, float]]:
    """A log whose loss falls from ``loss``; two logs of different ``loss`` are of different trainings."""
    return [
        {"epoch": step / 100, "learning_rate": 1e-4, "loss": loss * 0.99**step, "step": step, **scalars}
        for step in range(every, until + 1, every)
    ]


def write_state(folder: Path, step: int, log: Sequence[Mapping[str, Any]] | None = None, **changes: Any) -> Path:
    """``trainer_state.json`` of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": step / 100,
        "global_step": step,
        "log_history": log_history(step) if log is None else list(log),
        "logging_steps": 5,
        "max_steps": 100,
        "num_train_epochs": 1,
        "save_steps": 10,
        "total_flos": 1e6 * step,
        "train_batch_size": 4,
        **changes,
    }
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(state))  # NaN is written bare, as the Trainer does
    return path


def write_run(
    folder: Path,
    steps: Sequence[int] | Mapping[int, Factors] = (10, 20, 30),
    config: Mapping[str, Any] | None = None,
    *,
    states: bool = True,
    seed: int = 0,
    **shape: Any,
) -> Path:
    """A Trainer output folder.

    Args:
        folder: Made if it is not there.
        steps: Steps with random factors that drift from one to the next, or step to factors.
        config: The same configuration for each checkpoint.
        states: Whether each checkpoint has a ``trainer_state.json`` of one training.
        seed: Of the random factors.
        **shape: ``names``, ``out``, ``in_``, ``rank``, ``dtype`` of the random factors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = steps if isinstance(steps, Mapping) else drifting(steps, seed, **shape)
    for step, factors in runs.items():
        checkpoint = write_adapter(folder / f"checkpoint-{step}", factors, config)
        if states:
            write_state(checkpoint, step)
    return folder


# ---- records ----

#: What a recorder notes about a training, apart from what a test is about.
ATTRIBUTES: Mapping[str, Any] = {
    "run_id": "0123456789abcdef",
    "findings": [],
    "configuration": '{"preset": "standard"}',
    "toolkit_version": "1.2.3",
    "library_versions": "{}",
    "created": "2026-01-02T03:04:05+00:00",
    "disk_names": {},
    "resumptions": [],
    "gaps": [],
    "covered_share": 1.0,
    "seed": 0,
}


def counted_openings(monkeypatch: pytest.MonkeyPatch, trajectory: Trajectory) -> Callable[[], int]:
    """Return a function that tells how many checkpoints were open at most at one time."""
    opened = [0, 0]

    @contextmanager
    def counted(self: CheckpointContent) -> Iterator[OpenCheckpoint]:
        opened[0] += 1
        opened[1] = max(opened)
        with actual(self) as matrices:
            yield matrices
        opened[0] -= 1

    actual = CheckpointContent.open
    monkeypatch.setattr(CheckpointContent, "open", counted)
    for checkpoint in trajectory.checkpoints:
        object.__setattr__(checkpoint, "open", checkpoint.open.__self__.open)
    return lambda: opened[1]


def records(
    steps: Mapping[int, Factors],
    *,
    gradients: Sequence[int] | None = None,
    spectra: bool = True,
    from_start: bool = True,
) -> dict[int, dict[str, xr.Dataset]]:
    """Records of consecutive captured steps.

    Args:
        steps: Step to factors, ascending.
        gradients: Steps at which gradients were measured; all by default.
        spectra: Whether singular values of the gradients were.
        from_start: Whether the first increment is since the start (``from_step`` 0), or not known (−1).
    """
    scale = adapter_config()["lora_alpha"] / adapter_config()["r"]
    made, before, previous = {}, None, 0 if from_start else -1
    for number, (step, factors) in enumerate(steps.items()):
        now = [LowRankMatrix(left, right, scale) for left, right in factors.values()]
        if before is None and from_start:
            nothing = [LowRankMatrix(torch.zeros_like(left), right, scale) for left, right in factors.values()]
            before = Previous(nothing, [0.0] * len(nothing))
        solved = solve_batch(now, before)
        places = {
            name: MatrixShape(left.shape[0], right.shape[1], left.shape[1], "F32")
            for name, (left, right) in factors.items()
        }
        results = {(step, name): each.spectra for name, each in zip(factors, solved, strict=True)}
        made[step] = {"update": raw.raw_update({step: (0, previous)}, places, results)}
        if gradients is None or step in gradients:
            made[step]["gradient"] = _gradient(step, places, number, spectra)
        cores = [each.cores for each in solved]
        known = [core for core in cores if core is not None]
        linked = len(known) == len(cores) and before is not None
        before = Previous(
            now,
            [each.spectra.total_noise for each in solved],
            known if linked else None,
            before.matrices if linked else None,
        )
        previous = step
    return made


def _gradient(step: int, places: Mapping[str, MatrixShape], number: int, spectra: bool) -> xr.Dataset:
    generator = torch.Generator().manual_seed(step)
    gradients = {}
    for name, place in places.items():
        values = torch.rand(2 * place.rank, generator=generator, dtype=torch.float64).sort(descending=True).values
        norm = 2.0 / (1 + number) + float(values[0])
        gradients[name] = GradientSpectrum(norm, min(norm, 1.0), *((values, 2 * place.rank) if spectra else ()))
    return raw.raw_gradient(step, places, gradients)


def write_records(
    run: Path,
    steps: Sequence[int] | Mapping[int, Factors] = (5, 10, 15, 20),
    *,
    seed: int = 0,
    attributes: Mapping[str, Any] | None = None,
    **how: Any,
) -> Path:
    """``run/dynamics/records/``, complete and closed; more steps are added to one that is there.

    Args:
        run: The run folder; made if it is not there.
        steps: Steps whose factors drift, or step to factors.
        seed: Of the drifting factors.
        attributes: On top of ``ATTRIBUTES``.
        **how: See ``records``.
    """
    folder = run / "dynamics"
    factors = steps if isinstance(steps, Mapping) else drifting(steps, seed)
    with RecordWriter.resume(folder, 10**9, {**ATTRIBUTES, **(attributes or {})}) as writer:
        there = writer.steps
        for step, record in records(factors, **how).items():
            if step not in there:
                writer.write(step, record)
    return folder / "records"


# ---- trainings ----

VOCABULARY = 32


class Tokens(Dataset):
    """Random sequences, always the same."""

    def __init__(self, length: int = 64) -> None:
        self._rows = torch.randint(VOCABULARY, (length, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def llama(**changes: Any) -> LlamaForCausalLM:
    """One layer, with dropout; a test of what lies between layers asks for two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, attention_dropout=0.1, **{**sizes, **changes})
    return LlamaForCausalLM(config)


def lora_llama(layers: int = 1, **changes: Any) -> nn.Module:
    """The same with LoRA on every linear layer, and dropout in it; ``changes`` are of its configuration."""
    from peft import LoraConfig, get_peft_model

    lora = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(llama(num_hidden_layers=layers), LoraConfig(**{**lora, **changes}))


def loss_of(model: nn.Module, data: Tokens) -> Tensor:
    """Return the loss of the first two samples."""
    rows = torch.stack([data[index]["input_ids"] for index in range(2)])
    return model(input_ids=rows, labels=rows).loss


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    """Eight steps of two accumulated batches, clipped, saved every four."""
    from transformers import TrainingArguments

    chosen: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.2,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 3,
        **changes,
    }
    return TrainingArguments(str(out), **chosen)


def trainer(
    out: Path, callbacks: Sequence[TrainerCallback] = (), model: nn.Module | None = None, **changes: Any
) -> Trainer:
    """A Trainer that has not trained yet, and a seed from which everything follows."""
    from transformers import Trainer, set_seed

    set_seed(5)
    model = lora_llama() if model is None else model
    set_seed(5)
    return Trainer(model, arguments(out, **changes), train_dataset=Tokens(), callbacks=list(callbacks))


def random_states() -> list[Any]:
    """Of torch and NumPy; equal lists are equal states."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), name, keys.tolist(), rest]


def losses(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without the callback's numbers and without times."""
    kept = [
        {name: value for name, value in entry.items() if not name.startswith(("dynamics/", "train_"))}
        for entry in history
    ]
    return [entry for entry in kept if set(entry) - {"epoch", "step", "total_flos"}]
