r"""A seeded random projection of per-sample gradients to k numbers, where N·d would not fit into memory.

With S ``(d, k)`` of independent normal entries of variance 1/k, Ĝ = GS has

.. math:: E\,\hat K_{ij} = K_{ij}, \qquad E\,\hat K_{ij}^2 = K_{ij}^2 + (K_{ii} K_{jj} + K_{ij}^2)/k :

inner products without bias, and a participation ratio whose bias is known and taken out again
(:func:`dynamics.fisher.participation.without_projection`). Spectra keep a bias: SE is too large or small by up to about
N/(2k) nat. S is never stored, but made again from its seed for each batch.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from probes.sample_gradients import SampleGradient

#: Bytes of S that are made at once.
PROJECTION_BUDGET = 2**26


def projected(gradient: SampleGradient, dimension: int, seed: int, like: Tensor) -> Float[Tensor, "sample k"]:
    """Gradients of one parameter, projected.

    Args:
        gradient: Of N samples.
        dimension: k.
        seed: Of S; the same for all batches, another for each parameter.
        like: Format and device of a gradient that is zero.

    Returns:
        In single precision at least. The same on the same kind of device.

    >>> from probes.sample_gradients import Materialised
    >>> gradient = SampleGradient((2,), 1, [Materialised(torch.tensor([[3.0, 4.0]]))])
    >>> projected(gradient, 10000, 0, torch.ones(1)).norm().round().item()
    5.0
    """
    columns = max(1, math.prod(gradient.shape[1:]))
    step = max(1, PROJECTION_BUDGET // (4 * columns * dimension))
    found = like.new_zeros(gradient.samples, dimension, dtype=torch.promote_types(like.dtype, torch.float32))
    generator = torch.Generator(device=like.device).manual_seed(seed)
    for first in range(0, gradient.shape[0] if gradient.terms else 0, step):
        last = min(first + step, gradient.shape[0])
        rows = sum(term.rows(first, last) for term in gradient.terms).flatten(1)  # pyright: ignore[reportAttributeAccessIssue]
        part = torch.randn(rows.shape[1], dimension, generator=generator, dtype=found.dtype, device=like.device)
        found += rows.to(found.dtype) @ part
    return found / dimension**0.5
