"""From raw datasets to the result: merged, measured, labelled, with where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.findings import Finding
from dynamics.fisher import measured as measured_fisher
from dynamics.fisher.findings import notes as fisher_notes
from dynamics.spectra import findings as notes
from dynamics.spectra.measured import measured
from dynamics.spectra.null_models import SEED
from dynamics.spectra.quantiles import known_quantiles
from dynamics.store import encodable_dataset, provenance
from dynamics.store.merge import merge, translated
from dynamics.store.probed import with_probed
from dynamics.store.records import Captured
from dynamics.text import encodable

#: Of a gradient, over the steps: its size, and the measures.
_OF_GRADIENTS = ("norm_before_clip", "norm_after_clip", "frobenius_norm", *schema.MEASURES)
_BOUNDS = ("", "_low", "_high")


@dataclass(frozen=True)
class Parts:
    """What a result is made of.

    Args:
        run: The run's name.
        checkpoints: Raw update of the checkpoints, ``None`` if there are none.
        captured: The records of the training, ``None`` if there are none.
        logs: Groups that are in the result as they are: ``training``, ``score``, ``path``, ``base``.
        findings: What was found about the checkpoints; those of the records are their own.
        inputs: Fingerprints of the weight files.
        fisher: K and b of probed checkpoints, ``None`` if none was probed.
        score: Their scores, ``None`` if there are none.
    """

    run: str
    checkpoints: xr.Dataset | None = None
    captured: Captured | None = None
    logs: Mapping[str, xr.Dataset] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    inputs: Sequence[Mapping[str, Any]] = ()
    fisher: xr.Dataset | None = None
    score: xr.Dataset | None = None


def result_tree(parts: Parts, configuration: Mapping[str, Any]) -> xr.DataTree:
    """The result of one run.

    Where records and checkpoints were merged, ``/checkpoints`` and ``/probed`` keep what the checkpoints alone say, so
    that both can be merged again when the training has gone on.

    Raises:
        ValueError: If there are neither checkpoints nor captured steps.
    """
    checkpoints, captured = parts.checkpoints, parts.captured
    if captured is None:
        raw_update, found = merge(checkpoints, None)
        groups = measured(raw_update)
    else:
        live = None if checkpoints is None else translated(checkpoints, captured.live_names)
        raw_update, found = merge(live, captured.update)
        groups = measured(raw_update, captured.gradient)
        if "gradient" in groups:
            groups["summary_gradient"] = quantiles_of_gradients(groups["gradient"], groups["null_gradient"])
        if checkpoints is not None:
            groups["checkpoints"] = checkpoints
    found += notes.notes(groups["update"])
    groups |= parts.logs
    if captured is not None and "base" in groups:
        groups["base"] = _live(groups["base"], captured.live_names)
    fisher, news = with_probed(None if captured is None else captured.fisher, parts.fisher)
    found += news
    if captured is not None and parts.fisher is not None:
        groups["probed"] = parts.fisher
    if fisher is not None:
        probed = measured_fisher(fisher)
        groups |= probed
        found += fisher_notes(probed)
    scores = [each for each in (captured and captured.score, parts.score, parts.logs.get("score")) if each is not None]
    if scores:
        groups["score"] = reduce(_scores, scores)
    tree = xr.DataTree.from_dict({f"/{name}": encodable_dataset(group) for name, group in groups.items()})
    inputs, own = list(parts.inputs), _own_findings(parts)
    if captured is not None:
        inputs.append(captured.input)
        found = [*captured.findings, *found]
    tree.attrs = provenance(parts.run, configuration, inputs, SEED)
    tree.attrs["findings"] = as_json([*own, *found])
    if captured is not None:
        steps = [] if checkpoints is None else checkpoints["step"].values.tolist()
        tree.attrs["captured"] = json.dumps(encodable({**captured.stamp, "checkpoints": steps}))
        tree.attrs["checkpoint_findings"] = as_json(parts.findings)
    return tree


def _live(group: xr.Dataset, live_names: Mapping[str, str]) -> xr.Dataset:
    """Under the names of the live model."""
    names = group["matrix"].values.tolist()
    return group.assign_coords(matrix=("matrix", [live_names.get(name, name) for name in names], group["matrix"].attrs))


def _scores(first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
    """Scores of both; where both have one, that of the first."""
    return first.combine_first(second).assign_attrs(second.attrs)


def as_json(findings: Sequence[Finding]) -> str:
    """Findings as the root attribute holds them."""
    return json.dumps(encodable([finding.to_dict() for finding in findings]), allow_nan=False)


def _own_findings(parts: Parts) -> list[Finding]:
    """Where the records say what matrices are called on disk, names as on disk need no mention."""
    known = parts.captured is not None and isinstance(parts.captured.attributes.get("disk_names"), dict)
    return [finding for finding in parts.findings if not (known and finding.code == "OD117")]


def quantiles_of_gradients(gradient: xr.Dataset, null: xr.Dataset) -> xr.Dataset:
    """``/summary_gradient``: quartiles over matrices, and medians of the null's mean and band."""
    quartiles = {
        f"{name}_quantile": (
            ("step", "quantile"),
            _over_matrices(gradient[name].values, schema.QUANTILES),
            {"units": schema.GRADIENT[name].units, "long_name": f"{name} of the gradient, quartiles over matrices"},
        )
        for name in _OF_GRADIENTS
    }
    bands = {
        f"{name}_null{bound}": (
            "step",
            _over_matrices(null[f"{name}{bound}"].values, (0.5,))[:, 0],
            {"units": null[f"{name}{bound}"].attrs["units"], "long_name": f"{name} of the null, median over matrices"},
        )
        for name in schema.MEASURES
        for bound in _BOUNDS
        if f"{name}{bound}" in null
    }
    coords = {"step": gradient["step"].variable, "quantile": list(schema.QUANTILES)}
    return xr.Dataset({**quartiles, **bands}, coords=coords)


def _over_matrices(values: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Quantiles of the finite numbers of each step, ``(step, quantile)``; NaN where there are none."""
    return known_quantiles(np.where(np.isfinite(values), values, np.nan), quantiles)
