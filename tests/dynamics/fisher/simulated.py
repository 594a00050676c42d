"""Gradients whose population Fisher is known, many independent data sets at once: ``[data set, sample, direction]``."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynamics.fisher.samples import StackedGram
from probes import ProbeGram


def power_law(directions: int, exponent: float = 1.0) -> np.ndarray:
    return 1 / np.arange(1, directions + 1) ** exponent


def gradients(
    generator: np.random.Generator,
    sets: int,
    samples: int,
    spectrum: np.ndarray,
    mean: np.ndarray | float = 0.0,
    per_group: int = 1,
    correlation: float = 0.0,
) -> np.ndarray:
    """Normal gradients of covariance diag(spectrum); samples of a group are correlated."""
    own = generator.standard_normal((sets, samples, len(spectrum)))
    common = np.repeat(generator.standard_normal((sets, samples // per_group, len(spectrum))), per_group, axis=1)
    return mean + np.sqrt(spectrum) * (np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own)


#: Laws of ln‖g‖ − ln‖g₀‖, of samples whose directions do not depend on it.
NORMS = ("alike", "lognormal", "t", "rare")


def norms(generator: np.random.Generator, law: str, sets: int, samples: int) -> np.ndarray:
    """Factors of each gradient, ``[data set, sample, 1]``, which leave F/tr F as it is.

    ``"lognormal"``: squares with a logarithm of standard deviation 2. ``"t"``: gradients of Student's t with 3 degrees
    of freedom. ``"rare"``: 3 % of samples are ten times as large.
    """
    shape = (sets, samples, 1)
    if law == "lognormal":
        return np.exp(generator.standard_normal(shape))
    if law == "t":
        return np.sqrt(3 / generator.chisquare(3, shape))
    return np.where(generator.random(shape) < 0.03, 10.0, 1.0) if law == "rare" else np.ones(shape)


def grams(gradients: np.ndarray) -> np.ndarray:
    return gradients @ gradients.swapaxes(-1, -2)


def probe_gram(gram: Any, product: Any = None, norm: Any = None, dimension: Any = None, **more: Any) -> ProbeGram:
    """K of one block or a mapping of blocks, with b, ‖δ‖ and d (of each block, or the same for all) beside it."""
    blocks = gram if isinstance(gram, dict) else {"global": gram}

    def by_block(value: Any) -> dict[str, Any]:
        return {} if value is None else value if isinstance(value, dict) else dict.fromkeys(blocks, value)

    squares = {block: float(value) ** 2 for block, value in by_block(norm).items()}
    return ProbeGram(blocks, by_block(product), squares, dimension=by_block(dimension), **more)


def stacked(gram: np.ndarray, product: np.ndarray, norm: np.ndarray, **more: Any) -> StackedGram:
    """Blocks of K, b and ‖δ‖, each ``[block, …]``, as the room takes them."""
    blocks = [{str(number): part for number, part in enumerate(parts)} for parts in (gram, product, norm)]
    return StackedGram.of(probe_gram(*blocks, **more))


def planted(eigenvalues: np.ndarray, samples: int, directions: int, seed: int = 0) -> np.ndarray:
    """One data set whose own Fisher GᵀG/N has exactly these eigenvalues."""
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((samples, len(eigenvalues))))[0]
    right = np.linalg.qr(generator.standard_normal((directions, len(eigenvalues))))[0]
    return left * np.sqrt(samples * eigenvalues) @ right.T


def within_three_errors(draws: np.ndarray, truth: float) -> bool:
    """Whether the mean of independent draws is within three of its standard errors of the truth."""
    return bool(abs(draws.mean() - truth) < 3 * draws.std(ddof=1) / len(draws) ** 0.5)
