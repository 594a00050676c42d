"""What a training should be told while it runs: signs in its records that something is not as its user thinks.

What a recorder watches in a model, what it refuses, and what is to be said of it from the beginning.

One record as a handful of numbers for a training log.

One Fisher record as a handful of numbers for a training log.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xarray as xr
from torch import nn

from dynamics.findings import Finding
from dynamics.fisher.concentration import captured
from dynamics.fisher.spectrum import fisher_eigenvectors, spectral_entropy
from dynamics.schema import GLOBAL
from dynamics.spectra.dataset import parts_of_sums
from dynamics.spectra.findings import NAMED
from dynamics.spectra.measures import dominant_ratio, effective_rank
from probes.watched import Found, find

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


#: So many names are given in a message.
_NAMED = 5


def watched_or_refused(model: nn.Module, matrices: str | None) -> Found:
    """The matrices to watch.

    Raises:
        ValueError: If there are none, or their parameters cannot be read.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "Expected parameters that can be read, got those of DeepSpeed ZeRO-3, which are in pieces on all ranks. "
            "Use FSDP 2, or ZeRO-2 with gradients=False."
        )
    found = find(model, matrices)
    if not found.watched:
        trained = sum(parameter.requires_grad for parameter in model.parameters())
        why = "; ".join(f"{path}: {reason}" for path, reason in list(found.skipped.items())[:_NAMED])
        asked = f" whose name {matrices!r} finds" if matrices is not None else ""
        raise ValueError(
            f"Expected at least one matrix to watch{asked}, found none among {trained} trainable parameters"
            f"{f' ({why})' if why else ''}. Give the recorder the model after its adapters were added and before they "
            "are merged, or another pattern."
        )
    return found


def notes_on(found: Found, *, gradients: bool) -> list[Finding]:
    """What is to be said of the model itself."""
    notes = []
    if found.uncovered:
        names = list(found.uncovered)
        notes.append(
            Finding(
                "OD306",
                f"{len(names)} trainable parameters belong to no watched matrix ({', '.join(names[:_NAMED])}"
                f"{', …' if len(names) > _NAMED else ''}); the watched matrices hold {found.covered_share:.1%} of what "
                "is trained.",
                evidence={"names": names[:_NAMED], "parameters": len(names), "covered_share": found.covered_share},
            )
        )
    notes += [
        Finding("OD310", f"This adapter is not watched: {reason}.", matrix=path)
        for path, reason in found.skipped.items()
    ]
    if not gradients:
        notes.append(Finding("OD311", "Gradients are not recorded: they cannot be read here, or were not asked for."))
    return notes


def notes_on_resuming(step: int | None, *, goes_on: bool) -> list[Finding]:
    """What is to be said where a training resumes, unless the capture goes on without a gap."""
    if step is None or goes_on:
        return []
    return [
        Finding(
            "OD307",
            f"The capture begins, or goes on, at step {step}, of which it had no record: there is no increment there, "
            "and the total of a dense weight is known only if its start is.",
            step=step,
        )
    ]


def update_numbers(update: xr.Dataset, gradient: xr.Dataset | None = None) -> dict[str, float]:
    """Norms over all matrices as one, and medians over matrices of two measures; what is not known is left out.

    Args:
        update, gradient: Raw datasets of one step.

    Returns:
        ``{total,increment}/{frobenius_norm,effective_rank_energy,dominant_ratio}`` and
        ``gradient/{norm_before_clip,norm_after_clip,effective_rank_energy}``.
    """
    numbers: dict[str, float] = {}
    alone = ~np.asarray(parts_of_sums(update["matrix"].values.tolist()), dtype=bool)
    for kind in update["kind"].values.tolist():
        values = update["singular_value"].sel(kind=kind).values[0]
        present = alone & (update["count"].sel(kind=kind).values[0] > 0)
        norms = np.where(np.isnan(values).all(-1), np.nan, np.sqrt(np.nansum(values**2, -1)))
        numbers[f"{kind}/frobenius_norm"] = _together(norms[present])
        numbers[f"{kind}/effective_rank_energy"] = _median(effective_rank(torch.from_numpy(values)).numpy())
        numbers[f"{kind}/dominant_ratio"] = _median(dominant_ratio(torch.from_numpy(values)).numpy())
    if gradient is not None:  # of what is trained now, which may be less than what has moved
        alone = ~np.asarray(parts_of_sums(gradient["matrix"].values.tolist()), dtype=bool)
        for name in ("norm_before_clip", "norm_after_clip"):
            numbers[f"gradient/{name}"] = _together(gradient[name].values[0][alone])
        values = torch.from_numpy(gradient["singular_value"].values[0])
        numbers["gradient/effective_rank_energy"] = _median(effective_rank(values).numpy())
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _together(norms: np.ndarray) -> float:
    """Norm over all; not known if there is none, or one is not."""
    return math.sqrt(float((norms**2).sum())) if len(norms) else math.nan


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan


#: Leading directions whose share of the update is logged.
LEADING = 16


def fisher_numbers(record: xr.Dataset | None) -> dict[str, float]:
    """Plug-in SE and ρ of all trainable parameters, and the update's share in 16 directions; unknown ones are left out.

    To watch, not to conclude from: intervals and nulls are in the result.

    Args:
        record: The raw record of one step; without one there is nothing to log.

    Returns:
        ``fisher/{spectral_entropy,dominant_ratio,captured_16}``.
    """
    if record is None:
        return {}
    here = record.sel(block=GLOBAL).isel(step=0)
    known = np.isfinite(np.diagonal(here["gram"].values))
    if not known.any():
        return {}
    gram = here["gram"].values[np.ix_(known, known)][None]
    values, vectors = fisher_eigenvectors(gram)
    product = here["update_product"].values[known][None]
    norm = np.sqrt(here["update_norm_squared"].values)[None]
    total = float(values.sum())
    numbers = {
        "fisher/spectral_entropy": float(spectral_entropy(values)[0]),
        "fisher/dominant_ratio": float(values[0, 0]) / total if total > 0 else math.nan,
        f"fisher/captured_{LEADING}": float(captured(values, vectors, product, norm, [LEADING])[0, 0]),
    }
    return {name: number for name, number in numbers.items() if math.isfinite(number)}
