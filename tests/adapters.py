"""Trains adapters of known need: a teacher of rank r* is learned by an adapter of rank r from noisy samples.

The teacher is Wx with ‖W‖ of r* singular values; a sample is x and Wx plus noise; the adapter sBA starts at B = 0 and
is trained by Adam or by gradient descent with momentum. Several trainings run side by side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.report.answers.rank import HARMLESS
from dynamics.spectra.measures import ENERGY, rank_at_energy
from dynamics.spectra.training_noise import STATES, energy_above_noise, states_of_rank

_SCALE = 2.0
_BATCH = 16


@dataclass(frozen=True)
class Setting:
    """What a training is like.

    Args:
        rank, needed: r and r*.
        adam: Adam, else gradient descent with momentum.
        rate: The learning rate after 10 steps of warm-up.
        schedule: ``constant``, ``cosine`` or ``linear``, down to 0.
        noise: Standard deviation of the labels' noise; the teacher's largest singular value is 1.
        weakest: The teacher's smallest singular value.
        decay: Weight decay.
        unequal: The j-th direction of the inputs has a standard deviation ∝ j^(−unequal).
        every: Steps between checkpoints.
    """

    rank: int
    needed: int
    adam: bool = True
    rate: float = 5e-3
    schedule: str = "cosine"
    noise: float = 0.5
    weakest: float = 0.5
    decay: float = 0.0
    unequal: float = 0.0
    every: int = 30


@dataclass(frozen=True)
class Trained:
    """Several trainings of one setting.

    Args:
        total: Singular values at the last checkpoint.
        increments: Of the change between two checkpoints.
        every, steps: Steps between checkpoints, and of the training.
        cost: By number of directions kept: what cutting the adapter to them adds to the expected loss, over what the
            whole adapter took from it.
    """

    total: Float[np.ndarray, "draw index"]
    increments: Float[np.ndarray, "interval draw index2"]
    every: int
    steps: int
    cost: Float[np.ndarray, "draw kept"]

    @property
    def needed(self) -> Float[np.ndarray, " draw"]:
        """Fewest directions that hold 99 % of the energy."""
        return rank_at_energy(torch.from_numpy(self.total), ENERGY).numpy()

    @property
    def states(self) -> list[str]:
        """The state of each adapter's rank."""
        intervals = [self.every] * len(self.increments)
        above = energy_above_noise(self.total, self.increments, intervals, self.steps)
        return states_of_rank(np.full(len(above), float(above.shape[1])), self.needed, above)


def train(setting: Setting, draws: int, seed: int, *, side: int = 32, checkpoints: int = 8) -> Trained:
    """Train several adapters of one setting."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    values = torch.logspace(0, math.log10(setting.weakest), setting.needed)
    left, right, basis = (
        torch.linalg.qr(normal(draws, side, columns)).Q for columns in (setting.needed, setting.needed, side)
    )
    teacher = (left * values) @ right.mT
    spread = torch.arange(1, side + 1) ** -setting.unequal
    inputs = basis * (spread / spread.square().mean().sqrt())
    down = (2 * torch.rand(draws, setting.rank, side, generator=generator) - 1) / math.sqrt(side)
    factors = [down, torch.zeros(draws, side, setting.rank)]
    moments = [[torch.zeros_like(factor) for factor in factors] for _ in range(2)]
    steps, saved = setting.every * checkpoints, []
    for step in range(1, steps + 1):
        x = inputs @ normal(draws, side, _BATCH)
        down, up = factors
        residual = _SCALE * up @ (down @ x) - teacher @ x + setting.noise * normal(draws, side, _BATCH)
        slope = _SCALE * residual @ x.mT / _BATCH
        rate = setting.rate * min(1.0, step / 10) * _SCHEDULES[setting.schedule](step / steps)
        for factor, gradient, first, second in zip(factors, (up.mT @ slope, slope @ down.mT), *moments, strict=True):
            factor.mul_(1 - rate * setting.decay)
            first.mul_(0.9).add_(gradient, alpha=0.1 if setting.adam else 1.0)
            if setting.adam:
                second.mul_(0.999).addcmul_(gradient, gradient, value=1e-3)
                size = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
                factor.sub_(rate * first / (1 - 0.9**step) / size)
            else:
                factor.sub_(rate * first)
        if step % setting.every == 0:
            saved.append((_SCALE * factors[1] @ factors[0]).double())
    updates = torch.stack(saved)
    u, sigma, vh = torch.linalg.svd(updates[-1])
    weighted = inputs.double()
    losses = []
    for kept in range(setting.rank + 1):
        cut = (u[..., :kept] * sigma[:, None, :kept]) @ vh[:, :kept]
        losses.append(((cut - teacher) @ weighted).square().sum((1, 2)))
    loss = torch.stack(losses, 1)
    gain = loss[:, :1] - loss[:, -1:]
    changes = torch.linalg.svdvals(updates.diff(dim=0))[..., : 2 * setting.rank]
    return Trained(
        sigma[:, : setting.rank].numpy(), changes.numpy(), setting.every, steps, ((loss - loss[:, -1:]) / gain).numpy()
    )


_SCHEDULES = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}


def random_settings(generator: np.random.Generator, rank: int, needed: int, count: int) -> list[Setting]:
    """Return random settings: both optimizers, all schedules, little to much noise, with and without weight decay."""
    drawn = []
    for _ in range(count):
        adam = bool(generator.random() < 0.6)
        rates = (1e-3, 5e-3, 2e-2) if adam else (3e-3, 1e-2)
        drawn.append(
            Setting(
                rank,
                needed,
                adam,
                float(generator.choice(rates)),
                str(generator.choice(list(_SCHEDULES))),
                float(generator.choice([0.1, 0.5, 2.0])),
                float(generator.choice([0.3, 0.7])),
                float(generator.choice([0.0, 0.1])),
                float(generator.choice([0.0, 0.5])),
                int(generator.choice([20, 30, 60])),
            )
        )
    return drawn


def claims(
    generator: np.random.Generator, ranks: Sequence[tuple[int, int]], *, settings: int, draws: int
) -> dict[str, tuple[int, int]]:
    """Return state → how often it was right, and how often it was said, over random trainings.

    ``used up`` is right where the teacher has as many directions as the adapter or more; ``idle`` and ``ends within``
    where an adapter without its second half, or its last direction, gives up to 1 % of the loss back that it won.

    Args:
        generator: Of the settings.
        ranks: r and r* of the trainings.
        settings: How many settings of each.
        draws: Trainings of each setting.
    """
    right, said = Counter[str](), Counter[str]()
    for rank, needed in ranks:
        for setting in random_settings(generator, rank, needed, settings):
            trained = train(setting, draws, int(generator.integers(2**31)))
            for state, cost in zip(trained.states, trained.cost, strict=True):
                is_right = {
                    "used up": needed >= rank,
                    "idle": cost[rank // 2] <= HARMLESS,
                    "ends within": cost[rank - 1] <= HARMLESS,
                    "unclear": True,
                }[state]
                right[state] += is_right
                said[state] += 1
    return {state: (right[state], said[state]) for state in STATES}
