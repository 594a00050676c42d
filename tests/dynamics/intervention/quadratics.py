"""Losses whose critical step is known: samples of populations of quadratics, a network at its edge of stability."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor, nn

import dynamics
from dynamics.fisher.samples import SampleGroups
from dynamics.intervention.sharpness import Search
from probes import Task

#: Parameters, and samples of a group.
DIMENSION, MEMBERS = 6, 4


@dataclass(frozen=True)
class Case:
    """A population ℓ = g_iᵀx + ½xᵀH_i x + quartic·(xᵀH_i x)², x = tδ, and how its samples vary.

    Args:
        gradient_spread: Of g_i about the population's, relative to its norm, half of the variance between groups.
        hessian_spread: Of ln |H_i|, likewise.
        tail: Degrees of freedom of the gradients' variation; normal by default.
        quartic: Size of the quartic term.
        own: Whether δ is down the samples' own mean gradient, not a direction that is given.
    """

    gradient_spread: float = 1.0
    hessian_spread: float = 0.5
    tail: float = np.inf
    quartic: float = 0.0
    own: bool = False


CASES: Mapping[str, Case] = {
    "samples agree": Case(0.3, 0.3),
    "gradients vary as much as their mean": Case(),
    "gradients vary four times as much": Case(4.0),
    "heavy tails (Student's t, 3 degrees of freedom)": Case(1.0, tail=3.0),
    "curvatures vary by a factor of e": Case(1.0, 1.0),
    "no quadratic: a quartic term of the quadratic's size": Case(quartic=0.5),
    "down the samples' own gradient": Case(4.0, own=True),
}


@dataclass(frozen=True)
class Tally:
    """What was found in each set.

    Args:
        estimate: t_c over the population's.
        holds: Whether the interval holds the population's.
        resolved: Whether it is bounded and above 0.
    """

    estimate: Float[np.ndarray, " set"]
    holds: Bool[np.ndarray, " set"]
    resolved: Bool[np.ndarray, " set"]


def tally(case: Case, sets: int, groups: int, rng: np.random.Generator) -> Tally:
    """Return what the search finds in sets of samples."""
    labels = SampleGroups.of_one_task(np.repeat(np.arange(groups), MEMBERS))
    rows = [_one(case, labels, rng) for _ in range(sets)]
    estimate, holds, resolved = (np.array(column) for column in zip(*rows, strict=True))
    return Tally(estimate, holds, resolved)


def _one(case: Case, labels: SampleGroups, rng: np.random.Generator) -> tuple[float, bool, bool]:
    turn, _ = np.linalg.qr(rng.standard_normal((DIMENSION, DIMENSION)))
    hessian = turn * np.logspace(-1, 1, DIMENSION) @ turn.T
    mean = rng.standard_normal(DIMENSION)
    scale = case.gradient_spread * np.linalg.norm(mean) / np.sqrt(DIMENSION)
    gradients = mean + scale * _varied(rng, labels, DIMENSION, case.tail)
    # E exp(s z − s²/2) = 1: the mean curvature is the population's.
    size = np.exp(case.hessian_spread * _varied(rng, labels, 1)[:, 0] - case.hessian_spread**2 / 2)
    towards = mean + 0.3 * np.linalg.norm(mean) * rng.standard_normal(DIMENSION) / np.sqrt(DIMENSION)
    step = -gradients.mean(0) if case.own else -towards * np.sign(towards @ mean)
    slopes, curvature = gradients @ step, step @ hessian @ step

    def loss(t: float, slope: np.ndarray | float, size: np.ndarray | float, square: np.ndarray | float) -> np.ndarray:
        bend = curvature * t**2
        return np.asarray(slope * t + size * bend / 2 + case.quartic * square * bend**2 / abs(mean @ step))

    found = Search(lambda n: loss(2 ** (n / 16), slopes, size, size**2)).critical(1.0, labels)
    truth = _root(lambda t: float(loss(t, mean @ step, 1.0, np.exp(case.hessian_spread**2))))
    return found.step / truth, bool(found.low <= truth <= found.high), found.low > 0


def _varied(
    rng: np.random.Generator, labels: SampleGroups, columns: int, tail: float = np.inf
) -> Float[np.ndarray, "sample column"]:
    """Return numbers of mean 0 and variance 1, half of which is between groups."""
    groups = int(labels.groups[0])

    def draw(rows: int) -> np.ndarray:
        if np.isinf(tail):
            return rng.standard_normal((rows, columns))
        return rng.standard_t(tail, (rows, columns)) / np.sqrt(tail / (tail - 2))

    return np.sqrt(0.5) * (draw(groups)[labels.group] + draw(len(labels.group)))


def _root(loss: Callable[[float], float]) -> float:
    """Return where a loss that falls at first is 0 again, by bisection; NaN if it never falls."""
    low, high = 1e-9, 1e9
    if loss(low) >= 0:
        return np.nan
    for _ in range(200):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if loss(middle) < 0 else (low, middle)
    return low


def edge_of_stability(lr: float, steps: int, every: int = 20) -> xr.Dataset:
    """Return `/sharpness` along the gradient over steps of full-batch gradient descent on random labels.

    Beside it, the largest eigenvalue of the Hessian.
    """
    torch.manual_seed(0)
    inputs = torch.randn(200, 10, dtype=torch.float64)
    targets = torch.randn(200, 1, dtype=torch.float64).sign()
    layers = nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)
    model = nn.Sequential(*layers).double()
    rows = [{"x": x, "y": y} for x, y in zip(inputs, targets, strict=True)]
    task = Task("fit", rows, loss=lambda model, batch: (model(batch["x"]) - batch["y"])[:, 0] ** 2 / 2, batch_size=200)
    batch = next(iter(task.batches()))
    results: list[xr.Dataset] = []
    for step in range(steps + 1):
        if step % every == 0:
            start = results[-1] if results else None
            result = dynamics.critical_sharpness(model, [task], lr=lr, start=start, relative=False, step=step)
            result["eigenvalue"] = ("step", [_largest_eigenvalue(task.losses(model, batch).mean(), model)])
            results.append(result)
        model.zero_grad()
        task.losses(model, batch).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= lr * parameter.grad
    return xr.concat(results, "step")


def _largest_eigenvalue(loss: Tensor, model: nn.Module, iterations: int = 30) -> float:
    """Return the Hessian's eigenvalue of largest size, by power iteration."""
    parameters = [*model.parameters()]
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, create_graph=True)])
    vector = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(iterations):
        vector = vector / vector.norm()
        product = torch.autograd.grad(gradient, parameters, vector, retain_graph=True)
        vector = torch.cat([part.flatten() for part in product])
    return float(vector.norm())
