"""What a training should be told while it runs: signs in its records that something is not as its user thinks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xarray as xr

from dynamics.findings import Finding
from dynamics.spectra.findings import NAMED
from dynamics.spectra.measures import dominant_ratio

#: A total counts as collapsed if one direction holds this share of its energy at two captured steps in a row.
COLLAPSED = 0.99


class Signs:
    """Reads records in the order of their steps, and keeps no more than it needs for :meth:`findings`.

    Args:
        warmup_steps: Optimizer steps in which the learning rate rises: what is seen up to the one after does not count
            against an adapter.
    """

    def __init__(self, warmup_steps: int = 0) -> None:
        self._warmup = warmup_steps
        self._gradients_seen = 0
        self._with_gradient: set[str] = set()
        self._without_gradient: tuple[str, ...] = ()
        self._unseen_gradient: dict[str, int] = {}
        self._unmoved: tuple[int, tuple[str, ...]] = (0, ())
        self._collapsed_before: frozenset[str] = frozenset()
        self._collapsed: tuple[int, tuple[str, ...]] = (0, ())
        self._not_finite: dict[str, int] = {}
        self._broken: dict[str, int] = {}

    def see(self, update: xr.Dataset, gradient: xr.Dataset | None = None) -> None:
        """Takes in the raw update and the raw gradient of one step."""
        step = int(update["step"].values[0])
        names = update["matrix"].values.tolist()
        totals = update["singular_value"].sel(kind="total").values[0]
        present = update["count"].sel(kind="total").values[0] > 0
        broken = present & np.isnan(totals).all(-1)
        self._broken = {name: self._broken.get(name, step) for name in _chosen(names, broken)} | self._broken
        if gradient is not None:
            self._see_gradient(step, gradient)
        if step <= self._warmup + 1:
            return
        zero = present & ~broken & (np.nan_to_num(totals) == 0).all(-1) & (update["adapter_rank"].values > 0)
        self._unmoved = (step, _chosen(names, zero))
        several = update["factor_rank"].sel(kind="total").values[0] > 1
        ratio = dominant_ratio(torch.from_numpy(totals)).numpy() if totals.shape[-1] else np.full(len(names), np.nan)
        wide = np.minimum(update["out"].values, update["in"].values) > 1
        collapsed = _chosen(names, several & wide & (np.nan_to_num(ratio) >= COLLAPSED))
        self._collapsed = (step, tuple(name for name in collapsed if name in self._collapsed_before))
        self._collapsed_before = frozenset(collapsed)

    def _see_gradient(self, step: int, gradient: xr.Dataset) -> None:
        names = gradient["matrix"].values.tolist()
        norm = np.stack([gradient[name].values[0] for name in ("norm_before_clip", "norm_after_clip")])
        known = np.asarray(~np.isnan(norm).all(0))
        for name in _chosen(names, np.asarray(~known)):
            self._unseen_gradient.setdefault(name, step)
        if not known.any():
            return
        self._gradients_seen += 1
        # What is not known is not zero either.
        self._with_gradient |= set(_chosen(names, ~known | (np.nan_to_num(norm) != 0).any(0)))
        self._without_gradient = tuple(name for name in names if name not in self._with_gradient)
        if step <= self._warmup + 1 and self._gradients_seen < 2:
            self._without_gradient = ()
        for name in _chosen(names, np.asarray(np.isinf(norm).any(0))):
            self._not_finite.setdefault(name, step)

    def findings(self) -> list[Finding]:
        """What holds now; a sign that went away is not among them."""
        return [*self._gradient_findings(), *self._update_findings()]

    def _gradient_findings(self) -> Iterator[Finding]:
        if self._without_gradient:
            yield Finding(
                "OD301",
                f"{_words(self._without_gradient)} had no gradient, or one of zero, at any of the "
                f"{self._gradients_seen} steps captured so far.",
                remedy="Look whether the loss depends on it: a branch that the data never takes, inputs that do not "
                "require gradients under gradient checkpointing, or an expert that is never chosen.",
                matrix=_single(self._without_gradient),
                evidence=_evidence(self._without_gradient),
            )
        if self._unseen_gradient:
            names, first = tuple(self._unseen_gradient), min(self._unseen_gradient.values())
            yield Finding(
                "OD311",
                f"{_words(names)} had no gradient left to be measured, first at step {first}: norms are NaN there. "
                "Updates are recorded as ever.",
                remedy="An optimizer that steps within the backward pass (LOMO, layer-wise GaLore) frees each gradient "
                "at once; the same optimizer without that leaves them to be measured.",
                matrix=_single(names),
                step=first,
                evidence=_evidence(names),
            )
        if self._not_finite:
            names, first = tuple(self._not_finite), min(self._not_finite.values())
            yield Finding(
                "OD304",
                f"The gradient of {_words(names, start=False)} was not finite, first at step {first}.",
                remedy="Lower the learning rate or clip gradients; under fp16 loss scaling single such steps are "
                "skipped by the scaler and harmless.",
                matrix=_single(names),
                step=first,
                evidence={**_evidence(names), "steps": sorted(set(self._not_finite.values()))[:NAMED]},
            )

    def _update_findings(self) -> Iterator[Finding]:
        step, names = self._unmoved
        if names:
            yield Finding(
                "OD302",
                f"At step {step} the update of {_words(names, start=False)} is still exactly zero, after "
                f"{self._warmup} steps of warm-up.",
                remedy="Look at its gradient, its learning rate, and whether the optimizer was given its parameters.",
                matrix=_single(names),
                step=step,
                evidence=_evidence(names),
            )
        step, names = self._collapsed
        if names:
            yield Finding(
                "OD303",
                f"At step {step} and at the captured step before, one direction holds more than {COLLAPSED:.0%} of the "
                f"update's energy in {_words(names, start=False)}, whose adapter has room for more.",
                remedy="A learning rate that is too high does this; a smaller rank would hold the same update.",
                matrix=_single(names),
                step=step,
                evidence={"threshold": COLLAPSED, **_evidence(names)},
            )
        if self._broken:
            names, first = tuple(self._broken), min(self._broken.values())
            yield Finding(
                "OD201",
                f"The weights of {_words(names, start=False)} were not finite, first at step {first}; their spectra "
                "are NaN.",
                remedy="Look for a diverged loss before this step; the other matrices are recorded.",
                matrix=_single(names),
                step=first,
                evidence=_evidence(names),
            )


def _chosen(names: Sequence[str], mask: np.ndarray) -> tuple[str, ...]:
    return tuple(name for name, chosen in zip(names, mask.tolist(), strict=True) if chosen)


def _words(names: Sequence[str], *, start: bool = True) -> str:
    """How many matrices, to begin a sentence or not."""
    if len(names) == 1:
        return "This matrix" if start else "this matrix"
    return f"{len(names)} matrices"


def _single(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ""


def _evidence(names: Sequence[str]) -> dict[str, object]:
    return {"matrices": len(names), "names": list(names[:NAMED])}
