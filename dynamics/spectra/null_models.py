r"""What chance alone would give: spectra of random matrices of the same shape.

*Random LoRA*: ΔW = B A with independent standard normal factors. The singular values of a product depend on
its factors only through their triangular factors, and the R of a Gaussian matrix is Bartlett's triangle:
χ-distributed diagonal, standard normal above. So one draw costs O(r³), whatever the matrix's size.

*Increment of a LoRA*: (B + ΔB)(A + ΔA) − BA with the factors as they were and white noise for their changes. It has up
to 2r directions of two sizes, ‖B‖‖ΔA‖ and ‖A‖‖ΔB‖, so its null depends on how far training has come. With R the
triangular factors of B and Aᵀ, Z Gaussian and T Bartlett's triangle,

.. math:: \begin{pmatrix} R_B & Z \\ 0 & T_{out-r} \end{pmatrix} \begin{pmatrix} 0 & I \\ I & I \end{pmatrix}
          \begin{pmatrix} R_A & Z' \\ 0 & T'_{in-r} \end{pmatrix}^\top

has its singular values, with [Z; T] scaled to ‖ΔB‖ and [Z'; T'] to ‖ΔA‖. White noise has no preferred directions, so
the singular values of B and A stand for R_B and R_A.

*Gaussian*: a dense matrix of independent standard normals. Its singular values are those of a bidiagonal
matrix of χ variables (Dumitriu & Edelman 2002), its mean purity and entropy have closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigvalsh_tridiagonal
from scipy.special import digamma, stdtrit
from torch import Tensor

from dynamics.spectra import measures
from dynamics.spectra.workers import mapped

#: Draws of a null model: enough that its 5 % and 95 % points are known to about 1.5 percentiles.
DRAWS = 256
#: Of dense shapes, fewer where they are large: a large random spectrum hardly varies from draw to draw.
_DENSE_VALUES = 2**16
_FEWEST_DRAWS = 16
#: Of increments every matrix at every step has draws of its own, fewer of many columns; the mean entropy is then known
#: to about 1e-3 nat (512 × 512, r = 16) or better.
_INCREMENT_WORK = 2**13
_FEWEST_OF_INCREMENTS = 8
#: Below so many draws the 5 %, 95 % and 99 % points are Student's, not order statistics.
_ENOUGH_TO_SORT = 100
#: Numbers in one batch of cores, and batches that are drawn before they are needed.
_BATCH, _AHEAD = 2**18, 16
SEED = 0
QUANTILES = (0.05, 0.95)


def bartlett_triangle(rows: int, rank: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Return R of the QR decomposition of a Gaussian ``(rows, rank)`` matrix: ``(draws, min(rows, rank), rank)``.

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
    """Return singular values of B A, both factors standard normal: ``(draws, min(out, in, rank))``.

    The seed is spread over the shape, so that a shape has the same null in every run.
    """
    generator = np.random.default_rng([seed, out, in_, rank])
    left = torch.from_numpy(bartlett_triangle(out, rank, draws, generator))
    right = torch.from_numpy(bartlett_triangle(in_, rank, draws, generator))
    return torch.linalg.svdvals(left @ right.mT)


@lru_cache(maxsize=64)
def gaussian_spectra(out: int, in_: int, draws: int = DRAWS, seed: int = SEED) -> Float[Tensor, "draws k"]:
    """Return singular values of a standard normal ``(out, in)`` matrix: ``(draws, min(out, in))``.

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


def page_entropy(out: int, in_: int) -> float:
    """Return the mean energy entropy of a Gaussian ``(out, in)`` matrix in nats, by Page's formula.

    ψ(mn + 1) − ψ(max + 1) − (min − 1)/(2 max). Exact for complex entries (Page 1993, proved by Sen 1996); for real
    ones within 0.007 at 64×64 and 3e-4 at 16×4096.

    >>> round(page_entropy(16, 4096), 4)
    2.7706
    """
    long, short = max(out, in_), min(out, in_)
    return float(digamma(out * in_ + 1) - digamma(long + 1) - (short - 1) / (2 * long))


def increment_draws(columns: int) -> int:
    """Return how many draws the null of an increment with so many columns (2r) is made of.

    >>> increment_draws(8), increment_draws(16), increment_draws(128)
    (128, 32, 8)
    """
    return max(_FEWEST_OF_INCREMENTS, min(DRAWS, _INCREMENT_WORK // columns**2))


def white_changes(
    out: int, in_: int, p: int, q: int, cells: int, draws: int, generator: np.random.Generator
) -> tuple[Float[Tensor, "cells draws rows q"], Float[Tensor, "cells draws p columns"]]:
    """Draw ΔB and ΔA of norm 1 in the bases of B's and A's singular vectors; of what is outside, the triangular factor.

    Args:
        out, in_: Dimensions of the matrix.
        p, q: Number of rows of ΔA and of columns of ΔB.
        cells, draws: Number of increments, and of draws for each.
        generator: Of the noise.
    """
    left = _white(out, min(out, p), q, (cells, draws), generator)
    return left, _white(in_, min(in_, q), p, (cells, draws), generator).mT


def increment_spectra(
    left: Float[Tensor, "cells p"],
    right: Float[Tensor, "cells q"],
    left_change: Float[Tensor, " cells"],
    right_change: Float[Tensor, " cells"],
    out: int,
    in_: int,
    changes: tuple[Float[Tensor, "cells draws rows q"], Float[Tensor, "cells draws p columns"]],
) -> Float[Tensor, "cells draws k"]:
    """Return singular values of (B + ΔB)(A + ΔA) − BA with ΔB and ΔA white: ``(cells, draws, min(out, in, p + q))``.

    Args:
        left: Singular values of B, ``(out, p)``; p is the number of rows of ΔA.
        right: Singular values of A, ``(q, in)``; q is the number of columns of ΔB.
        left_change, right_change: ‖ΔB‖_F and ‖ΔA‖_F.
        out, in_: Dimensions of the matrix.
        changes: What :func:`white_changes` draws.
    """
    p, q = left.shape[1], right.shape[1]
    a, b, shared = min(out, p), min(in_, q), min(p, q)
    # Each side relative to its largest number, so that squares neither overflow nor vanish.
    left_size, right_size = _largest(left, left_change), _largest(right, right_change)
    left_noise = changes[0] * (left_change / left_size)[:, None, None, None]
    right_noise = changes[1] * (right_change / right_size)[:, None, None, None]
    # B ΔA lies in the leading a rows, ΔB A in the leading b columns.
    product = left_noise[..., :shared] @ right_noise[:, :, :shared]
    product[:, :, :a] += (left / left_size[:, None])[:, None, :a, None] * right_noise[:, :, :a]
    product[:, :, :, :b] += left_noise[..., :b] * (right / right_size[:, None])[:, None, None, :b]
    gram = product @ product.mT if product.shape[-2] <= product.shape[-1] else product.mT @ product
    squares = torch.linalg.eigvalsh(gram).flip(-1)[..., : min(out, in_, p + q)]
    return squares.clamp_min(0).sqrt() * (left_size * right_size)[:, None, None]


def _largest(values: Float[Tensor, "cells k"], change: Float[Tensor, " cells"]) -> Float[Tensor, " cells"]:
    largest = torch.cat([values, change[:, None]], 1).amax(1)
    return torch.where(largest > 0, largest, 1.0)


def _white(rows: int, above: int, columns: int, batch: tuple[int, int], generator: np.random.Generator) -> Tensor:
    """Draw Gaussian matrices of norm 1, ``(*batch, ·, columns)``, in a basis whose first ``above`` vectors are given.

    Of the other rows only the triangular factor is kept.
    """
    draws = math.prod(batch)
    top = generator.standard_normal((draws, above, columns))
    below = bartlett_triangle(rows - above, columns, draws, generator)
    noise = torch.from_numpy(np.concatenate([top, below], 1)).unflatten(0, batch)
    return noise / torch.linalg.vector_norm(noise, dim=(-2, -1), keepdim=True)


def top_to_median(spectra: Float[Tensor, "*cells draws k"], quantile: float = 0.99) -> Float[Tensor, "*cells"]:
    """Return the ``quantile`` of σ_1/median σ over draws: the edge beyond which a singular value stands out."""
    return _points(spectra[..., 0] / spectra.quantile(0.5, dim=-1), (quantile,))[0]


def _points(values: Float[Tensor, "*cells draws"], quantiles: Sequence[float]) -> Tensor:
    """Return quantiles over the last axis, ``(quantiles, *cells)``; of few draws Student's prediction of one more."""
    draws = values.shape[-1]
    if draws >= _ENOUGH_TO_SORT:
        return values.quantile(torch.tensor(quantiles, dtype=torch.float64), dim=-1)
    deviation = values.std(-1) * math.sqrt(1 + 1 / draws)
    return torch.stack([values.mean(-1) + float(stdtrit(draws - 1, point)) * deviation for point in quantiles])


def outliers(values: Float[Tensor, "... k"], edge: Float[Tensor, "*cells"] | float) -> Float[Tensor, "*_"]:
    """Return how many singular values exceed ``edge`` times their own median.

    The median sets the noise scale (Gavish & Donoho 2014). For a low-rank update the edge is that of the random
    LoRA, :func:`top_to_median`: the Marchenko–Pastur law of a product of two thin Gaussians has no bulk of
    min(out, in) values to take a median of.

    >>> float(outliers(torch.tensor([9.0, 1.1, 1.0, 1.0, 0.9]), edge=2.0))
    1.0
    """
    median = values.nanquantile(0.5, dim=-1, keepdim=True)
    edge = torch.as_tensor(edge, dtype=values.dtype)
    count = (values > edge[..., None] * median).sum(-1).double()
    enough = (~values.isnan()).sum(-1) > 2
    return torch.where((median[..., 0] > 0) & enough, count, torch.nan)


@dataclass(frozen=True)
class NullModel:
    """Measures of a null model over its draws: of one shape, or of each of several cells.

    Args:
        entropies: Energy entropies of the draws; for percentiles.
        edge: See :func:`top_to_median`.
        spectrum_low, spectrum_high: 5 % and 95 % points of each σ/‖σ‖.
        mean, low, high: Measure to numbers; low and high are the 5 % and 95 % points.
    """

    entropies: Float[Tensor, "*cells draws"]
    edge: Float[Tensor, "*cells"]
    spectrum_low: Float[Tensor, "*cells k"]
    spectrum_high: Float[Tensor, "*cells k"]
    mean: Mapping[str, np.ndarray]
    low: Mapping[str, np.ndarray]
    high: Mapping[str, np.ndarray]

    def percentile(self, entropy: Float[Tensor, "*_"]) -> Float[Tensor, "*_"]:
        """Return where an entropy lies among the draws, 0 to 100: small means more concentrated than chance.

        NaN where all draws agree, as for a single singular value: then chance leaves nothing to compare with.
        """
        differ = self.entropies.amax(-1) - self.entropies.amin(-1) >= 1e-9
        below = (self.entropies < entropy[..., None]).double().mean(-1)
        return torch.where(entropy.isnan() | ~differ, torch.nan, 100.0 * below)


@lru_cache(maxsize=256)
def random_lora_null(out: int, in_: int, rank: int, draws: int = DRAWS, seed: int = SEED) -> NullModel:
    """Return the random-LoRA null of one shape, all measures."""
    return _null_model(random_lora_spectra(out, in_, rank, draws, seed))


@lru_cache(maxsize=256)
def gaussian_null(out: int, in_: int, draws: int | None = None, seed: int = SEED) -> NullModel:
    """Return the null of a dense matrix, independent standard normal entries, all measures.

    >>> bool(gaussian_null(3, 5).mean["stable_rank"] < 3)
    True
    """
    chosen = draws or dense_draws(out, in_)
    return _null_model(gaussian_spectra(out, in_, chosen, seed))


def increment_null(
    left: Float[Tensor, "cells p"],
    right: Float[Tensor, "cells q"],
    left_change: Float[Tensor, " cells"],
    right_change: Float[Tensor, " cells"],
    out: int,
    in_: int,
    executor: Executor,
    *,
    count: int,
    seed: int = SEED,
) -> Iterator[tuple[slice, NullModel]]:
    """Yield the null of LoRA increments of one shape, batch by batch; arguments as in :func:`increment_spectra`.

    Args:
        executor: Computes the batches; their noise is drawn here, in one order.
        count: How many singular values the increments have; more than the null's where columns did not move.
        seed: Of the noise.
    """
    p, q = left.shape[1], right.shape[1]
    generator = np.random.default_rng([seed, out, in_, p, q])
    draws = increment_draws(p + q)
    length = max(1, _BATCH // (draws * (p + q) ** 2))
    parts = [slice(first, min(first + length, len(left))) for first in range(0, len(left), length)]
    noise = ((part, white_changes(out, in_, p, q, part.stop - part.start, draws, generator)) for part in parts)

    def model(batch: tuple[slice, tuple[Tensor, Tensor]]) -> tuple[slice, NullModel]:
        cells, changes = batch
        spectra = increment_spectra(
            left[cells], right[cells], left_change[cells], right_change[cells], out, in_, changes
        )
        return cells, _null_model(torch.nn.functional.pad(spectra, (0, count - spectra.shape[-1])))

    yield from mapped(executor, model, noise, _AHEAD)


def dense_draws(out: int, in_: int) -> int:
    """Return how many draws the null of a dense shape is made of.

    >>> dense_draws(64, 64), dense_draws(1024, 4096), dense_draws(11008, 4096)
    (256, 64, 16)
    """
    return max(_FEWEST_DRAWS, min(DRAWS, _DENSE_VALUES // min(out, in_)))


def _null_model(spectra: Float[Tensor, "*cells draws k"]) -> NullModel:
    values = {name: measure(spectra) for name, measure in measures.MEASURES.items()}
    edge = top_to_median(spectra)
    values["marchenko_pastur_outliers"] = outliers(spectra, edge[..., None])
    low, high = zip(*(_points(value, QUANTILES) for value in values.values()), strict=True)
    relative = spectra / torch.linalg.vector_norm(spectra, dim=-1, keepdim=True)
    shape = _points(relative.mT, QUANTILES)
    return NullModel(
        entropies=values["entropy_energy"],
        edge=edge,
        spectrum_low=shape[0].clamp_min(0),
        spectrum_high=shape[1],
        mean={name: value.mean(-1).numpy() for name, value in values.items()},
        low=dict(zip(values, (bound.numpy() for bound in low), strict=True)),
        high=dict(zip(values, (bound.numpy() for bound in high), strict=True)),
    )
