"""What users should hear while a training runs: what is watched, what is refused, what goes wrong; numbers for its
log."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xarray as xr
from torch import nn

from dynamics.findings import Finding
from dynamics.fisher.concentration import energy_share
from dynamics.fisher.spectrum import fisher_eigenvectors, fisher_entropy
from dynamics.schema import ALL, GLOBAL
from dynamics.spectra.dataset import parts_of_sums
from dynamics.spectra.findings import NAMED
from dynamics.spectra.measures import dominant_ratio, effective_rank
from dynamics.text import counted, percent, some
from probes.watched import WatchedModel, find

#: A total counts as collapsed if one direction holds this share of its energy at two captured steps in a row.
COLLAPSED = 0.99


class TrainingMonitor:
    """Observe records in the order of their steps; keep no more than :meth:`findings` needs.

    Args:
        warmup_steps: Optimizer steps in which the learning rate rises: nothing up to the step after counts against an
            adapter.
    """

    def __init__(self, warmup_steps: int = 0) -> None:
        self._warmup = warmup_steps
        self._gradient_steps = 0
        self._with_gradient: set[str] = set()
        self._without_gradient: tuple[str, ...] = ()
        self._unmeasured_gradient: dict[str, int] = {}
        self._unmoved: tuple[int, tuple[str, ...]] = (0, ())
        self._collapsed_before: frozenset[str] = frozenset()
        self._collapsed: tuple[int, tuple[str, ...]] = (0, ())
        self._not_finite: dict[str, int] = {}
        self._broken: dict[str, int] = {}

    def observe(self, update: xr.Dataset, gradient: xr.Dataset | None = None) -> None:
        """Take in the raw update and the raw gradient of one step."""
        step = int(update["step"].values[0])
        names = update["matrix"].values.tolist()
        total = update["kind"].values.tolist().index("total")
        totals = update["singular_value"].values[0, total]
        present = update["count"].values[0, total] > 0
        broken = present & np.isnan(totals).all(-1)
        self._broken = {name: self._broken.get(name, step) for name in _chosen(names, broken)} | self._broken
        if gradient is not None:
            self._observe_gradient(step, gradient)
        if step <= self._warmup + 1:
            return
        zero = present & ~broken & (np.nan_to_num(totals) == 0).all(-1) & (update["adapter_rank"].values > 0)
        self._unmoved = (step, _chosen(names, zero))
        several = update["factor_rank"].values[0, total] > 1
        ratio = dominant_ratio(torch.from_numpy(totals)).numpy() if totals.shape[-1] else np.full(len(names), np.nan)
        wide = np.minimum(update["out"].values, update["in"].values) > 1
        collapsed = _chosen(names, several & wide & (np.nan_to_num(ratio) >= COLLAPSED))
        self._collapsed = (step, tuple(name for name in collapsed if name in self._collapsed_before))
        self._collapsed_before = frozenset(collapsed)

    def _observe_gradient(self, step: int, gradient: xr.Dataset) -> None:
        names = gradient["matrix"].values.tolist()
        norm = np.stack([gradient[name].values[0] for name in ("norm_before_clip", "norm_after_clip")])
        measurable = np.asarray(~np.isnan(norm).all(0))
        for name in _chosen(names, np.asarray(~measurable)):
            self._unmeasured_gradient.setdefault(name, step)
        if not measurable.any():
            return
        self._gradient_steps += 1
        # Unknown is not zero.
        self._with_gradient |= set(_chosen(names, ~measurable | (np.nan_to_num(norm) != 0).any(0)))
        self._without_gradient = tuple(name for name in names if name not in self._with_gradient)
        if step <= self._warmup + 1 and self._gradient_steps < 2:
            self._without_gradient = ()
        for name in _chosen(names, np.asarray(np.isinf(norm).any(0))):
            self._not_finite.setdefault(name, step)

    def findings(self) -> list[Finding]:
        """Return what holds now; what went away is left out."""
        return [*self._gradient_findings(), *self._update_findings()]

    def _gradient_findings(self) -> Iterator[Finding]:
        if self._without_gradient:
            yield Finding(
                "OD301",
                f"{_words(self._without_gradient)} had no gradient, or a gradient of zero, at each of the "
                f"{self._gradient_steps} steps captured so far.",
                remedy="Check that the loss depends on it. Common causes: a branch that the data never takes, inputs "
                "that do not require gradients under gradient checkpointing, an expert that is never chosen.",
                matrix=_single(self._without_gradient),
                evidence=_evidence(self._without_gradient),
            )
        if self._unmeasured_gradient:
            names, first = tuple(self._unmeasured_gradient), min(self._unmeasured_gradient.values())
            yield Finding(
                "OD311",
                f"{_words(names)} had no gradient left to measure, first at step {first}: norms are NaN there. "
                "Updates are recorded as usual.",
                remedy="An optimizer that steps within the backward pass (LOMO, layer-wise GaLore) frees each gradient "
                "at once. Use its variant that steps after the backward pass to record gradients.",
                matrix=_single(names),
                step=first,
                evidence=_evidence(names),
            )
        if self._not_finite:
            names, first = tuple(self._not_finite), min(self._not_finite.values())
            yield Finding(
                "OD304",
                f"The gradient of {_words(names, start=False)} was not finite, first at step {first}.",
                remedy="Lower the learning rate or clip gradients. Under fp16 loss scaling, single steps like this are "
                "harmless: the scaler skips them.",
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
                remedy="Check its gradient, its learning rate, and that the optimizer has its parameters.",
                matrix=_single(names),
                step=step,
                evidence=_evidence(names),
            )
        step, names = self._collapsed
        if names:
            yield Finding(
                "OD303",
                f"One direction holds more than {percent(COLLAPSED, 0)} of the update's energy in "
                f"{_words(names, start=False)} at step {step} and at the captured step before. The adapter has room "
                "for more.",
                remedy="The learning rate may be too high. A smaller rank would hold the same update.",
                matrix=_single(names),
                step=step,
                evidence={"threshold": COLLAPSED, **_evidence(names)},
            )
        if self._broken:
            names, first = tuple(self._broken), min(self._broken.values())
            yield Finding(
                "OD201",
                f"The weights of {_words(names, start=False)} were not finite, first at step {first}. Their spectra "
                "are NaN.",
                remedy="Check whether the loss diverged before this step. The other matrices are recorded.",
                matrix=_single(names),
                step=first,
                evidence=_evidence(names),
            )


def _chosen(names: Sequence[str], mask: np.ndarray) -> tuple[str, ...]:
    return tuple(name for name, chosen in zip(names, mask.tolist(), strict=True) if chosen)


def _words(names: Sequence[str], *, start: bool = True) -> str:
    """Return how many matrices, to begin a sentence or not."""
    if len(names) == 1:
        return "This matrix" if start else "this matrix"
    return f"{len(names)} matrices"


def _single(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ""


def _evidence(names: Sequence[str]) -> dict[str, object]:
    return {"matrices": len(names), "names": list(names[:NAMED])}


#: Names listed in a message.
_NAMED = 5


def watched_or_refused(model: nn.Module, matrices: str | None) -> WatchedModel:
    """Return the matrices to watch.

    Raises:
        ValueError: If there are none.
    """
    watched = find(model, matrices)
    if not watched.watched:
        trained = sum(parameter.requires_grad for parameter in model.parameters())
        why = "; ".join(f"{path}: {reason}" for path, reason in list(watched.skipped.items())[:_NAMED])
        condition = f" whose name matches {matrices!r}" if matrices is not None else ""
        raise ValueError(
            f"Expected at least one matrix to watch{condition}, found none among {trained} trainable parameters"
            f"{f' ({why})' if why else ''}. Give the recorder the model after adapters are added and before they are "
            "merged, or change the pattern."
        )
    return watched


def findings_on_model(watched: WatchedModel, *, gradients: bool) -> list[Finding]:
    """Return findings on what of a model is not watched."""
    findings = []
    if watched.uncovered:
        names = list(watched.uncovered)
        findings.append(
            Finding(
                "OD306",
                f"{counted(len(names), 'trainable parameter')} outside the watched matrices: {some(names, _NAMED)}. "
                f"The watched matrices hold {percent(watched.covered_share)} of what is trained.",
                evidence={"names": names[:_NAMED], "parameters": len(names), "covered_share": watched.covered_share},
            )
        )
    findings += [
        Finding("OD310", f"This adapter is not watched: {reason}.", matrix=path)
        for path, reason in watched.skipped.items()
    ]
    if not gradients:
        findings.append(Finding("OD311", "Gradients are not recorded: they cannot be read, or were not requested."))
    return findings


def findings_on_resuming(step: int | None, *, continues: bool) -> list[Finding]:
    """Return findings on a training that resumes, unless its records continue without a gap."""
    if step is None or continues:
        return []
    return [
        Finding(
            "OD307",
            f"Records begin, or continue, at step {step}, for which there was no record. The increment of the next "
            "record is unknown, and so is the total of a dense weight whose start is unknown.",
            step=step,
        )
    ]


def update_numbers(update: xr.Dataset, gradient: xr.Dataset | None = None) -> dict[str, float]:
    """Return norms over all matrices as one, and medians over matrices of two measures; unknown ones are left out.

    Args:
        update, gradient: Raw datasets of one step.

    Returns:
        ``{total,increment}/{frobenius_norm,effective_rank_energy,dominant_ratio}`` and
        ``gradient/{norm_before_clip,norm_after_clip,effective_rank_energy}``.
    """
    numbers: dict[str, float] = {}
    alone = ~np.asarray(parts_of_sums(update["matrix"].values.tolist()), dtype=bool)
    spectra, counts = (update[name].values[0] for name in ("singular_value", "count"))
    measures = (measure(torch.from_numpy(spectra)).numpy() for measure in (effective_rank, dominant_ratio))
    columns = zip(update["kind"].values.tolist(), spectra, counts, *measures, strict=True)
    for kind, values, count, ranks, ratios in columns:
        present = alone & (count > 0)
        norms = np.where(np.isnan(values).all(-1), np.nan, np.sqrt(np.nansum(values**2, -1)))
        numbers[f"{kind}/frobenius_norm"] = _together(norms[present])
        numbers[f"{kind}/effective_rank_energy"] = _median(ranks)
        numbers[f"{kind}/dominant_ratio"] = _median(ratios)
    if gradient is not None:  # of what is trained now, which may be less than what has moved
        alone = ~np.asarray(parts_of_sums(gradient["matrix"].values.tolist()), dtype=bool)
        for name in ("norm_before_clip", "norm_after_clip"):
            numbers[f"gradient/{name}"] = _together(gradient[name].values[0][alone])
        values = torch.from_numpy(gradient["singular_value"].values[0])
        numbers["gradient/effective_rank_energy"] = _median(effective_rank(values).numpy())
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _together(norms: np.ndarray) -> float:
    """Return the norm over all; NaN if there is none, or one is NaN."""
    return math.sqrt(float((norms**2).sum())) if len(norms) else math.nan


def _median(values: np.ndarray) -> float:
    numbers = values[~np.isnan(values)]
    return float(np.median(numbers)) if len(numbers) else math.nan


#: Leading directions whose share of the update is logged.
LEADING = 16


def fisher_numbers(record: xr.Dataset | None) -> dict[str, float]:
    """Return plug-in SE and ρ of all trainable parameters, and the update's share in 16 directions.

    Unknown ones are left out. For watching a training, not for conclusions: intervals and nulls are in the result.

    Args:
        record: The raw record of one step; ``None`` gives no numbers.

    Returns:
        ``fisher/{spectral_entropy,dominant_ratio,captured_16}``.
    """
    if record is None:
        return {}
    fisher = record.sel(block=GLOBAL).isel(step=0)
    finite = np.isfinite(np.diagonal(fisher["gram"].values))
    if not finite.any():
        return {}
    gram = fisher["gram"].values[np.ix_(finite, finite)][None]
    values, vectors = fisher_eigenvectors(gram)
    product = fisher["update_product"].values[finite][None]
    norm = np.sqrt(fisher["update_norm_squared"].values)[None]
    total = float(values.sum())
    numbers = {
        "fisher/spectral_entropy": float(fisher_entropy(values)[0]),
        "fisher/dominant_ratio": float(values[0, 0]) / total if total > 0 else math.nan,
        f"fisher/captured_{LEADING}": float(energy_share(values, vectors, product, norm, [LEADING])[0, 0]),
    }
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def intervention_numbers(record: xr.Dataset | None) -> dict[str, float]:
    """Return by how much the update, its part in leading directions and the rest lower the loss, over all tasks.

    Unknown ones are left out. For watching a training, not for conclusions: intervals are in the result.

    Args:
        record: The group ``intervention`` of one step; ``None`` gives no numbers.

    Returns:
        ``intervention/{full,on,off}``.
    """
    if record is None:
        return {}
    effects = record["effect"].isel(step=0, k=int(record["headline"].values[0].argmax())).sel(scale=1.0, task=ALL)
    arms = [arm for arm in ("full", "on", "off") if arm in effects["arm"].values]
    numbers = {f"intervention/{arm}": float(effects.sel(arm=arm)) for arm in arms}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}
