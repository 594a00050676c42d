"""Updates of tiny models: a few steps of training, then back to where they began, with probe samples beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dynamics.recording.checkpoint_probe import _change, _matrices
from probes import Task
from probes.blocks import trained_parameters
from probes.watched import Matrix, find
from tests.runs import VOCABULARY, llama, lora_llama


def texts(count: int, length: int = 8, seed: int = 0) -> list[dict[str, object]]:
    """Texts in which a token often follows its double; two of each group."""
    generator = torch.Generator().manual_seed(seed)
    samples: list[dict[str, object]] = []
    for number in range(count):
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        for position in range(1, length):
            if torch.rand((), generator=generator) < 0.7:
                ids[position] = 2 * ids[position - 1] % (VOCABULARY - 1) + 1
        samples.append({"input_ids": ids, "labels": ids, "image": f"image-{number // 2}"})
    return samples


def probe_tasks(groups: int = 8, batch_size: int = 8) -> list[Task]:
    """Two tasks, each with one sample of each group."""
    samples = texts(2 * groups, seed=1)
    return [
        Task(name, samples[first::2], group="image", batch_size=batch_size)
        for name, first in (("report", 0), ("vqa", 1))
    ]


def adapted_model(dtype: torch.dtype = torch.float64, layers: int = 1) -> nn.Module:
    """A Llama with LoRA whose B is not zero."""
    return lora_llama(layers, lora_dropout=0.0, init_lora_weights=False).to(dtype).eval()


def small_llama() -> nn.Module:
    """One layer with LoRA on two matrices, dropout in it, and B = 0: for trainings with several interventions."""
    return lora_llama(target_modules=["q_proj", "v_proj"])


def dense_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A Llama that is trained whole."""
    return llama().to(dtype).eval()


def trained(
    model: nn.Module, steps: int = 3, lr: float = 0.1
) -> tuple[dict[str, Matrix], dict[str, Tensor], Mapping[str, Tensor]]:
    """Train, and set the model back.

    Returns:
        The change of each block; that of each parameter, in float64; the trained values.
    """
    parameters = trained_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    before = _matrices(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=lr)
    samples = texts(16, seed=2)
    ids = torch.stack([sample["input_ids"] for sample in samples])  # pyright: ignore[reportArgumentType]
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    matrices = {name: _change(matrix, before[name]) for name, matrix in _matrices(model).items()}
    after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    moved = {name: after[name].double() - start[name].double() for name in parameters}
    of_matrices = {id(p) for watched in find(model).watched for p in watched.parameters}
    matrices |= {name: moved[name] for name, p in parameters.items() if id(p) not in of_matrices}
    for name, parameter in parameters.items():
        parameter.data.copy_(start[name])
    return matrices, moved, after
