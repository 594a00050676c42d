"""Scores are means over samples with an honest error, and evaluating leaves no trace."""

from __future__ import annotations

import inspect
import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probes.scores import Score, evaluate, mean_and_standard_error
from probes.tasks import Task
from tests.families import FAMILIES


def numbers(*values: float) -> list[dict[str, Any]]:
    return [{"x": float(value), "image": index // 2} for index, value in enumerate(values)]


def itself(model: nn.Module, batch: Any) -> Tensor:
    return batch["x"]


def dependent(groups: int, size: int, draw: torch.Generator) -> tuple[Tensor, list[str]]:
    """Values whose mean is 0; half of their variance is common to a group."""
    common = torch.randn(groups, 1, generator=draw).expand(groups, size)
    return (common + torch.randn(groups, size, generator=draw)).flatten(), [
        str(n // size) for n in range(groups * size)
    ]


def test_mean_and_direction() -> None:
    tasks = [
        Task("accuracy", numbers(0, 1, 1, 0, 1), score=itself, batch_size=2, higher_is_better=True),
        Task("error", numbers(1, 3), score=itself, higher_is_better=False),
    ]
    accuracy, error = evaluate(nn.Identity(), tasks)
    assert (accuracy.task, accuracy.score, accuracy.items, accuracy.higher_is_better) == ("accuracy", 0.6, 5, True)
    assert accuracy.standard_error == pytest.approx(np.std([0, 1, 1, 0, 1], ddof=1) / math.sqrt(5), rel=1e-14)
    assert error == Score("error", 2.0, 2, 1.0, False)


@pytest.mark.parametrize("format", [torch.bool, torch.int64, torch.bfloat16, torch.float64], ids=str)
def test_any_format(format: torch.dtype) -> None:
    task = Task("a", numbers(0, 1, 1, 0), score=lambda model, batch: batch["x"].to(format))
    assert evaluate(nn.Identity(), [task])[0].score == 0.5


def test_default_score() -> None:
    model, batch = FAMILIES["llama"].model_and_batch()
    task = Task("a", [{key: value[n] for key, value in batch.items()} for n in (0, 1)])
    score = evaluate(model, [task])[0]
    assert score.score == pytest.approx(-model.eval()(**batch).loss.item(), rel=1e-6)
    assert score.higher_is_better


def test_values_that_are_not_finite() -> None:
    task = Task("a", numbers(1, math.nan, 2, math.inf), score=itself, batch_size=3)
    score = evaluate(nn.Identity(), [task])[0]
    assert math.isnan(score.score)
    assert math.isnan(score.standard_error)
    assert (score.items, score.broken) == (4, ("a/1", "a/3"))


def test_standard_error_of_groups_of_one() -> None:
    values = torch.randn(7, generator=torch.Generator().manual_seed(0)).double()
    expected = (values.std(correction=1) / math.sqrt(7)).item()
    assert mean_and_standard_error(values, list("abcdefg"))[1] == pytest.approx(expected, rel=1e-14)


def test_standard_error_of_one_group_is_missing() -> None:
    assert math.isnan(
        evaluate(nn.Identity(), [Task("a", numbers(1, 2), score=itself, group="image")])[0].standard_error
    )


def test_standard_error_of_dependent_samples() -> None:
    draw = torch.Generator().manual_seed(0)
    results = [(*mean_and_standard_error(*(sample := dependent(30, 7, draw))), sample[0]) for _ in range(500)]
    true = math.sqrt(1 / 30 + 1 / 210)
    means, errors, samples = zip(*results, strict=True)
    assert np.std(means) == pytest.approx(true, rel=0.1)
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(true, rel=0.05)
    naive = np.mean([sample.std().item() / math.sqrt(210) for sample in samples])
    assert naive < 0.55 * true


def test_no_trace() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    model[0].weight.grad = torch.ones(4, 1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    random.seed(0)
    expected = (torch.rand(()).item(), random.random())

    def noisy(inner: nn.Module, batch: Any) -> Tensor:
        assert not inner.training
        assert not torch.is_grad_enabled()
        return inner(batch["x"][:, None])[:, 0] + torch.rand(()) + random.random()

    task = Task("a", numbers(1, 2, 3), score=noisy)
    torch.manual_seed(0)
    random.seed(0)
    inspect.unwrap(evaluate)(model, [task])  # beartype, which checks calls in tests, draws random numbers
    assert (torch.rand(()).item(), random.random()) == expected
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model[0].weight.grad.tolist() == [[1.0]] * 4
    assert torch.is_grad_enabled()


def test_a_score_that_is_averaged() -> None:
    task = Task("a", numbers(1, 2), score=lambda model, batch: batch["x"].mean())
    message = (
        "Expected Task 'a': score(model, batch) to return one number for each of 2 samples, got a tensor of shape (). "
        "Do not average over the batch."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(nn.Identity(), [task])


def test_no_tasks() -> None:
    with pytest.raises(ValueError, match=r"^Expected at least one task, got none\.$"):
        evaluate(nn.Identity(), [])
