r"""What chance alone would give: spectra of random matrices of the same shape.

*Random LoRA*: ΔW = B A with independent standard normal factors. The singular values of a product depend on
its factors only through their triangular factors, and the R of a Gaussian matrix is Bartlett's triangle:
χ-distributed diagonal, standard normal above. So one draw costs O(r³), whatever the matrix's size.

*Gaussian*: a dense matrix of independent standard normals. Its singular values are those of a bidiagonal
matrix of χ variables (Dumitriu & Edelman 2002), its mean purity and entropy have closed forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigvalsh_tridiagonal
from scipy.special import digamma
from torch import Tensor

from dynamics.spectra import measures

#: Draws of a null model: enough that its 5 % and 95 % points are known to about 1.5 percentiles.
DRAWS = 256
#: Of dense shapes, fewer where they are large: a large random spectrum hardly varies from draw to draw.
_DENSE_VALUES = 2**16
_FEWEST_DRAWS = 16
SEED = 0
QUANTILES = (0.05, 0.95)


def bartlett_triangle(rows: int, rank: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """R of the QR decomposition of a Gaussian ``(rows, rank)`` matrix: ``(draws, min(rows, rank), rank)``.

    Bartlett 1933: R_ii ~ χ(rows − i), i from 0; R_ij ~ N(0, 1) for j > i; all independent.
    """
    height = min(rows, rank)
    triangle = np.triu(generator.standard_normal((draws, height, rank)), 1)
    diagonal = np.arange(height)
    triangle[:, diagonal, diagonal] = np.sqrt(generator.chisquare(rows - diagonal, (draws, height)))
    return triangle


@lru_cache(maxsize=256)
def random_lora_spectra(
    out: int, in_: int, rank: int, draws: int = DRAWS, seed: int = SEED
) -> Float[Tensor, "draws k"]:
    """Singular values of B A, B ``(out, rank)`` and A ``(rank, in)`` standard normal: ``(draws, min(out, in, rank))``.

    The seed is spread over the shape, so that a shape has the same null in every run.
    """
    generator = np.random.default_rng([seed, out, in_, rank])
    left = torch.from_numpy(bartlett_triangle(out, rank, draws, generator))
    right = torch.from_numpy(bartlett_triangle(in_, rank, draws, generator))
    return torch.linalg.svdvals(left @ right.mT)


@lru_cache(maxsize=64)
def gaussian_spectra(out: int, in_: int, draws: int = DRAWS, seed: int = SEED) -> Float[Tensor, "draws k"]:
    """Singular values of a standard normal ``(out, in)`` matrix: ``(draws, min(out, in))``.

    From the bidiagonal model L of Dumitriu & Edelman 2002: diagonal χ(max − i), off-diagonal χ(min − 1 − i). LLᵀ is
    tridiagonal, so a draw costs O(min²) and no matrix is formed.
    """
    long, short = max(out, in_), min(out, in_)
    generator = np.random.default_rng([seed, out, in_])
    index = np.arange(short)
    diagonal = generator.chisquare(long - index, (draws, short))
    below = generator.chisquare(short - index[1:], (draws, short - 1)) if short > 1 else np.empty((draws, 0))
    squares = np.empty((draws, short))
    for row in range(draws):
        beside = np.sqrt(diagonal[row, :-1] * below[row])
        squares[row] = eigvalsh_tridiagonal(diagonal[row] + np.append(0.0, below[row]), beside)
    return torch.from_numpy(np.sqrt(squares.clip(0)[:, ::-1]))


def gaussian_purity(out: int, in_: int) -> float:
    """Mean of Σp² (energy) of a Gaussian ``(out, in)`` matrix: (m + n + 1)/(mn + 2), exact for real entries.

    >>> round(gaussian_purity(64, 64), 6)
    0.031479
    """
    return (out + in_ + 1) / (out * in_ + 2)


def page_entropy(out: int, in_: int) -> float:
    """Mean energy entropy of a Gaussian ``(out, in)`` matrix in nats, by Page's formula.

    ψ(mn + 1) − ψ(max + 1) − (min − 1)/(2 max). Exact for complex entries (Page 1993, proved by Sen 1996); for real
    ones within 0.007 at 64×64 and 3e-4 at 16×4096.

    >>> round(page_entropy(16, 4096), 4)
    2.7706
    """
    long, short = max(out, in_), min(out, in_)
    return float(digamma(out * in_ + 1) - digamma(long + 1) - (short - 1) / (2 * long))


def top_to_median(spectra: Float[Tensor, "draws k"], quantile: float = 0.99) -> float:
    """The ``quantile`` of σ_1/median σ over draws: the edge beyond which a singular value stands out."""
    return float((spectra[:, 0] / spectra.quantile(0.5, dim=-1)).quantile(quantile))


def outliers(values: Float[Tensor, "... k"], edge: float) -> Float[Tensor, ...]:
    """How many singular values exceed ``edge`` times their own median.

    The median sets the noise scale (Gavish & Donoho 2014). For a low-rank update the edge is that of the random
    LoRA, :func:`top_to_median`: the Marchenko–Pastur law of a product of two thin Gaussians has no bulk of
    min(out, in) values to take a median of.

    >>> float(outliers(torch.tensor([9.0, 1.1, 1.0, 1.0, 0.9]), edge=2.0))
    1.0
    """
    median = values.nanquantile(0.5, dim=-1, keepdim=True)
    count = (values > edge * median).sum(-1).double()
    enough = (~values.isnan()).sum(-1) > 2
    return torch.where((median[..., 0] > 0) & enough, count, torch.nan)


@dataclass(frozen=True)
class NullModel:
    """Measures of a null model over its draws.

    Args:
        entropies: ``(draws,)`` energy entropies, ascending; for percentiles.
        edge: See :func:`top_to_median`.
        spectrum_low, spectrum_high: ``(k,)`` 5 % and 95 % points of each σ/‖σ‖.
        mean, low, high: Measure to number; low and high are the 5 % and 95 % points.
    """

    entropies: Float[Tensor, " draws"]
    edge: float
    spectrum_low: Float[Tensor, " k"]
    spectrum_high: Float[Tensor, " k"]
    mean: Mapping[str, float]
    low: Mapping[str, float]
    high: Mapping[str, float]

    def percentile(self, entropy: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Where an entropy lies among the draws, 0 to 100: small means more concentrated than chance.

        NaN where all draws agree, as for a single singular value: then chance leaves nothing to compare with.
        """
        if self.entropies[-1] - self.entropies[0] < 1e-9:
            return torch.full_like(entropy, torch.nan)
        below = torch.searchsorted(self.entropies, entropy.contiguous())
        return torch.where(entropy.isnan(), torch.nan, 100.0 * below / self.entropies.numel())


@lru_cache(maxsize=256)
def random_lora_null(out: int, in_: int, rank: int, draws: int = DRAWS, seed: int = SEED) -> NullModel:
    """The random-LoRA null of one shape, all measures."""
    return _null_model(random_lora_spectra(out, in_, rank, draws, seed))


@lru_cache(maxsize=256)
def gaussian_null(out: int, in_: int, draws: int | None = None, seed: int = SEED) -> NullModel:
    """The null of a dense matrix, independent standard normal entries, all measures.

    >>> gaussian_null(3, 5).mean["stable_rank"] < 3
    True
    """
    chosen = draws or dense_draws(out, in_)
    return _null_model(gaussian_spectra(out, in_, chosen, seed))


def dense_draws(out: int, in_: int) -> int:
    """How many draws the null of a dense shape is made of.

    >>> dense_draws(64, 64), dense_draws(1024, 4096), dense_draws(11008, 4096)
    (256, 64, 16)
    """
    return max(_FEWEST_DRAWS, min(DRAWS, _DENSE_VALUES // min(out, in_)))


def _null_model(spectra: Float[Tensor, "draws k"]) -> NullModel:
    values = {name: measure.function(spectra) for name, measure in measures.MEASURES.items()}
    edge = top_to_median(spectra)
    values["marchenko_pastur_outliers"] = outliers(spectra, edge)
    quantiles = torch.tensor(QUANTILES, dtype=torch.float64)
    bounds = {name: value.quantile(quantiles) for name, value in values.items()}
    shape = (spectra / torch.linalg.vector_norm(spectra, dim=-1, keepdim=True)).quantile(quantiles, dim=0)
    return NullModel(
        entropies=values["entropy_energy"].sort().values,
        edge=edge,
        spectrum_low=shape[0],
        spectrum_high=shape[1],
        mean={name: float(value.mean()) for name, value in values.items()},
        low={name: float(bound[0]) for name, bound in bounds.items()},
        high={name: float(bound[1]) for name, bound in bounds.items()},
    )
