"""A catalogue of hard inputs: the same matrices for every property and every truth test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from probes import LowRankMatrix

SPECTRA: dict[str, list[float]] = {
    "flat": [1.0] * 6,
    "rank one": [3.0, 0.0, 0.0, 0.0],
    "geometric": [2.0**-i for i in range(8)],
    "power law": [1 / (i + 1) for i in range(8)],
    "twelve decades": [10.0**-i for i in range(12)],
    "repeated": [5.0, 5.0, 1.0, 1.0, 1.0],
    "single": [0.7],
}
SCALES = (1e-10, 1e-3, 1.0, 1e4, 1e10)
SHAPES = {"square": (40, 40), "tall": (90, 30), "wide": (30, 90)}


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """Haar-distributed columns, ``(rows, columns)`` float64."""
    normal = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)))
    factor = torch.linalg.qr(normal)
    return factor.Q * factor.R.diagonal().sign()


def planted(spectrum: Sequence[float], out: int, in_: int, seed: int = 0) -> LowRankMatrix:
    """U diag(σ) Vᵀ, with the σ split evenly between float64 factors."""
    root = torch.tensor(spectrum, dtype=torch.float64).sqrt()
    left = orthonormal(out, len(spectrum), seed) * root
    return LowRankMatrix(left, root[:, None] * orthonormal(in_, len(spectrum), seed + 1).mT)


def random_lora(out: int, in_: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LowRankMatrix:
    """A Gaussian product with an awkward scale, as rsLoRA has it."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(out, rank, generator=generator, dtype=torch.float64).to(dtype)
    right = torch.randn(rank, in_, generator=generator, dtype=torch.float64).to(dtype)
    return LowRankMatrix(left, right, scale=16 / rank**0.5)


def moved(matrix: LowRankMatrix, relative: float, seed: int) -> LowRankMatrix:
    """The matrix after a step of the given relative size in both factors."""
    generator = torch.Generator().manual_seed(seed)

    def step(factor: Tensor) -> Tensor:
        noise = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
        return factor + (relative * noise * factor.double().norm() / noise.norm()).to(factor.dtype)

    return LowRankMatrix(step(matrix.left_factor), step(matrix.right_factor), matrix.scale)
