"""Simulated trainings whose course is known: gradient descent and Adam, on a quadratic or a logistic loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from dynamics.relate.stability import Training

#: Curvatures of the quadratic, from flat to steep.
CURVATURE = np.geomspace(0.003, 1.0, 120)


@dataclass(frozen=True)
class Kind:
    """A kind of training.

    Args:
        far: Distance of the start from the optimum in standard deviations of the noise there; 0: at the optimum.
        noise: Of a gradient, relative to the root of the curvature.
        steps, checkpoints: How many.
        burn_in: Steps before those that are seen.
        rate: Learning rate; of ``adam`` that of Adam.
        schedule: Learning rate relative to ``rate``, of the share of steps done.
        momentum: Of gradient descent.
        adam: Whether Adam is the optimizer.
        spike: Step share at which one batch is a hundred times as strong; 0: none.
        overfit: Distance between the optimum in training and of the held-out samples, relative to the start.
        directions: How many the quadratic has.
        tails: Degrees of freedom of Student's t of the noise; 0: normal.
        logistic: Whether the loss is logistic instead of quadratic.
    """

    far: float = 0.0
    noise: float = 1.0
    steps: int = 800
    checkpoints: int = 16
    burn_in: int = 0
    rate: float = 0.05
    schedule: Callable[[float], float] = field(default=lambda done: 1.0)
    momentum: float = 0.0
    adam: bool = False
    spike: float = 0.0
    overfit: float = 0.0
    directions: int = 120
    tails: int = 0
    logistic: bool = False


def cosine(done: float) -> float:
    """Learning rate of a cosine schedule to 0."""
    return 0.5 * (1 + np.cos(np.pi * done))


def early(done: float) -> float:
    """Learning rate that has fallen to a thousandth after a third of the steps."""
    return 1.0 if done < 0.33 else 1e-3


#: Each kind, and the states that are true of it.
KINDS: Mapping[str, tuple[Kind, tuple[str, ...]]] = {
    "far from the optimum, SGD": (Kind(far=30.0, steps=400), ("moving",)),
    "far, SGD with momentum": (Kind(far=30.0, steps=400, rate=0.01, momentum=0.9), ("moving",)),
    "far, Adam": (Kind(far=30.0, steps=400, rate=0.01, adam=True), ("moving",)),
    "far, logistic loss": (Kind(far=1.0, steps=400, rate=0.01, logistic=True), ("moving",)),
    "far, cosine schedule": (Kind(far=30.0, steps=400, schedule=cosine), ("moving",)),
    "far, schedule decayed early": (Kind(far=30.0, steps=400, schedule=early), ("moving",)),
    "stationary noise, SGD": (Kind(), ("wandering",)),
    "stationary noise, momentum": (Kind(rate=0.01, momentum=0.9), ("wandering",)),
    "stationary noise, Adam": (Kind(burn_in=4000, rate=0.01, adam=True), ("wandering",)),
    "stationary noise, cosine schedule": (Kind(schedule=cosine), ("wandering",)),
    "stationary noise, 4 directions": (Kind(directions=4), ("wandering", "undecided")),
    "stationary noise, heavy tails": (Kind(tails=3, burn_in=1000), ("wandering", "unstable")),
    "converged without noise": (Kind(far=30.0, noise=0.0, steps=4000, rate=1.0), ("converged",)),
    "diverging": (Kind(far=1.0, rate=2.02, steps=400), ("unstable",)),
    "one spike": (Kind(spike=0.8), ("unstable",)),
    "overfitting while the loss falls": (Kind(far=30.0, noise=0.3, steps=1600, overfit=1.0), ("overfitting",)),
    "3 checkpoints, far": (Kind(far=30.0, steps=400, checkpoints=3), ("moving",)),
    "3 checkpoints, stationary": (Kind(checkpoints=3), ("undecided",)),
}


def trainings(kind: Kind, rng: np.random.Generator, count: int) -> Iterator[Training]:
    """Yield so many trainings of one kind."""
    curvature = CURVATURE[:: len(CURVATURE) // kind.directions]
    dimension = len(curvature)
    stationary = np.sqrt(kind.rate / (1 - kind.momentum) / 2)
    start = stationary * rng.standard_normal((count, dimension))
    if kind.far:
        start = kind.far * stationary * np.sign(start)
    teacher = rng.standard_normal((count, dimension)) / np.sqrt(dimension)
    offset = kind.overfit * start * (curvature < 0.05)
    theta, velocity, square = start.copy(), np.zeros_like(start), np.zeros_like(start)
    if kind.logistic:
        theta = np.zeros_like(start)
    every_checkpoint, every_log = kind.steps // kind.checkpoints, max(kind.steps // 80, 1)
    points, logs, rates, evaluations = [], [], [], []
    begin = theta
    for step in range(1 - kind.burn_in, kind.steps + 1):
        rate = kind.rate * kind.schedule(max(step, 0) / kind.steps)
        if kind.logistic:
            inputs = rng.standard_normal((count, 16, dimension))
            margin = np.einsum("cbd,cd->cb", inputs, theta)
            target = (np.einsum("cbd,cd->cb", inputs, 3 * teacher) + rng.logistic(size=margin.shape)) > 0
            loss = np.logaddexp(0, np.where(target, -margin, margin)).mean(-1)
            gradient = np.einsum("cb,cbd->cd", 1 / (1 + np.exp(-margin)) - target, inputs) / 16
        else:
            strength = 100.0 if 0 < step == int(kind.spike * kind.steps) else 1.0
            noise = strength * kind.noise * np.sqrt(curvature) * _noise(rng, theta.shape, kind.tails)
            gradient = curvature * theta + noise
            loss = 0.5 * (curvature * theta**2).sum(-1) * (1 + 0.1 * rng.standard_normal(count)) + 1.0
        passed = step + kind.burn_in
        if kind.adam:
            velocity = 0.9 * velocity + 0.1 * gradient
            square = 0.99 * square + 0.01 * gradient**2
            change = velocity / (1 - 0.9**passed) / (np.sqrt(square / (1 - 0.99**passed)) + 1e-8)
        else:
            velocity = kind.momentum * velocity + gradient
            change = velocity
        with np.errstate(over="ignore", invalid="ignore"):
            theta = theta - rate * change
        if step == 0:
            begin = theta
        if step <= 0:
            continue
        if step % every_log == 0:
            logs.append(loss)
            rates.append(rate)
        if step % every_checkpoint == 0:
            points.append(theta - begin)
            evaluations.append(0.5 * (curvature * (theta - offset) ** 2).sum(-1) + 1.0)
    log_step = np.arange(1, len(logs) + 1) * every_log
    checkpoints = np.arange(1, len(points) + 1) * every_checkpoint
    for path, loss, evaluation in zip(np.stack(points, 1), np.stack(logs, 1), np.stack(evaluations, 1), strict=True):
        held_out = evaluation if not kind.logistic else np.empty(0)
        moved = np.linalg.norm(np.diff(path, axis=0, prepend=0), axis=1)
        log = (log_step, loss, np.array(rates), checkpoints[: len(held_out)], held_out)
        yield Training(checkpoints, path @ path.T, *log, moved, checkpoints, checkpoints - every_checkpoint)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], tails: int) -> np.ndarray:
    return rng.standard_t(tails, shape) / np.sqrt(tails / (tails - 2)) if tails else rng.standard_normal(shape)
