"""Concentration of an update along informative directions, by block and k: K and b in, a dataset out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from dynamics.described import labelled
from dynamics.fisher.concentration import captured, isotropic_null, rayleigh_ratio, relative_rayleigh_ratio
from dynamics.fisher.gradient_null import DRAWS, MOST_TIMES, matched_gain
from dynamics.fisher.pairs import Labels
from dynamics.fisher.samples import blocks_of, codes_of, numbers_of, own, require_exact, vectors_of
from dynamics.fisher.spectrum import fisher_eigenvectors
from dynamics.fisher.splits import SPLITS
from dynamics.fisher.variables import CONCENTRATION

#: Numbers of leading directions in which the share of an update is measured.
LEADING = (1, 2, 4, 8, 16)
#: A share above 1 by more than rounding means that b, ‖δ‖ and K do not belong together.
_SHARE_LIMIT = 1 + 1e-3


def concentration(
    gram: Any,
    update_product: Any = None,
    update_norm: Mapping[str, Any] | float | int | None = None,
    *,
    groups: Sequence[Any] | np.ndarray | None = None,
    batch_size: int | None = None,
    dimension: Mapping[str, Any] | float | int | None = None,
    k: Sequence[int] = LEADING,
    splits: int = SPLITS,
    draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """Share of an update inside the Fisher's leading directions, beside an isotropic and a gradient null.

    Args:
        gram: K = GGᵀ of probe samples that took no part in the update; as in :func:`fisher_measures`.
        update_product: b = Gδ: ``[sample]``, a mapping of block to such, or left out where the Gram has its own.
        update_norm: ‖δ‖, not squared, inside the space in which gradients live; or left out likewise.
        groups: What samples belong to; without it each is taken to be independent.
        batch_size: Samples behind the update: the optimizer's batch times the steps; with momentum β the batch of a
            single step counts (1 + β)/(1 − β) times. Without it there is no gradient null, and nothing is called
            concentrated.
        dimension: d, for the isotropic null; by default the Gram's own.
        k: Numbers of leading directions.
        splits, draws, seed: Of random halves and null gradients.

    Returns:
        Variables over ``block`` and ``k``, each with its definition. ``captured`` has directions from all samples, and
        belongs beside ``null_isotropic``; ``captured_split`` has those of half of them, and belongs beside
        ``null_gradient``. ``concentrated`` only where both gains, centred and not, are above 1 with their intervals,
        and ``batch_size`` is at most ``null_batch_limit``. Decoupled weight decay is part of the update as given.

    Raises:
        ValueError: If shapes or blocks do not fit, or b and ‖δ‖ cannot belong to K.

    >>> found = concentration(np.diag([4.0, 1.0]), np.array([2.0, 0.0]), 1.0, dimension=10, k=[1, 2])
    >>> found["captured"].values.tolist(), found["null_isotropic"].values.tolist()
    ([[1.0, 1.0]], [[0.1, 0.2]])
    """
    require_exact(gram)
    names, stacked = blocks_of(gram)
    samples = stacked.shape[-1]
    if not len(k) or min(k) < 1:
        raise ValueError(f"Expected numbers of leading directions of at least 1, got {list(k)}.")
    group = codes_of(groups, samples, "group")
    norm = _norm_of(gram, update_norm, names)
    product = vectors_of(own(update_product, gram, "update_product"), names, samples, "an update product b = Gδ")
    size = numbers_of(own(dimension, gram, "dimension"), names, "dimension")
    spectrum = fisher_eigenvectors(stacked)
    found = concentration_dataset(
        names, stacked, spectrum, product, norm, group, batch_size or 0, size, k, splits=splits, draws=draws, seed=seed
    )
    share = np.nan_to_num(found["captured"].values).max(1)
    if (share > _SHARE_LIMIT).any():
        place = int(share.argmax())
        raise ValueError(
            f"Expected b = Gδ and ‖δ‖ of one update, got a share of {share[place]:.3g} of "
            f"block {names[place]!r} in its directions, above 1. Give K unnormalised, and ‖δ‖, not its square."
        )
    return found


def _norm_of(gram: Any, update_norm: Any, names: Sequence[str]) -> np.ndarray:
    if update_norm is None:
        update_norm = {name: value**0.5 for name, value in getattr(gram, "update_norm_squared", {}).items()}
        if not update_norm:
            raise ValueError("Expected update_norm = ‖δ‖ of each block, got none, and the Gram has no update.")
    return numbers_of(update_norm, names, "update norm ‖δ‖")


def concentration_dataset(
    names: Sequence[str],
    stacked: np.ndarray,
    spectrum: tuple[np.ndarray, np.ndarray],
    product: np.ndarray,
    norm: np.ndarray,
    group: np.ndarray,
    batch_size: int,
    size: np.ndarray,
    k: Sequence[int],
    *,
    splits: int = SPLITS,
    draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """:func:`concentration` of blocks already stacked, without its check of b and ‖δ‖ against K."""
    values, vectors = spectrum
    labels = Labels(group, np.ones((len(group), 1), dtype=bool))
    most = MOST_TIMES * (len(group) // 2)
    ratio = rayleigh_ratio(stacked, product, norm, size, labels)
    null, null_low, null_high = isotropic_null(size, k)
    arrays = {
        "captured": captured(values, vectors, product, norm, k),
        "null_isotropic": null,
        "null_isotropic_low": null_low,
        "null_isotropic_high": null_high,
    }
    for suffix in ("", "_centred"):
        gain = matched_gain(
            stacked, product, norm, group, batch_size, k, centre=bool(suffix), splits=splits, draws=draws, seed=seed
        )
        arrays |= {
            f"captured_split{suffix}": gain.captured,
            f"null_gradient{suffix}": gain.null,
            f"null_gradient_low{suffix}": gain.null_low,
            f"null_gradient_high{suffix}": gain.null_high,
            f"gain{suffix}": gain.gain,
            f"ln_gain{suffix}": gain.ln_gain,
            f"gain_low{suffix}": gain.low,
            f"gain_high{suffix}": gain.high,
        }
    arrays |= {
        "concentrated": (batch_size <= most) & (arrays["gain_low"] > 1) & (arrays["gain_low_centred"] > 1),
        "null_batch": np.array(batch_size if batch_size > 0 else np.nan),
        "null_batch_limit": np.array(float(most)),
        "rayleigh_ratio": ratio.estimate,
        "rayleigh_ratio_low": ratio.low,
        "rayleigh_ratio_high": ratio.high,
        "relative_rayleigh_ratio": relative_rayleigh_ratio(values, product, norm),
        "update_norm": norm,
    }
    return xr.Dataset(labelled(CONCENTRATION, arrays), {"block": list(names), "k": list(k)})
