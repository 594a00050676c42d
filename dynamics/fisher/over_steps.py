"""Raw Fisher records, of a training or of probed checkpoints → the groups ``fisher``, ``concentration``, ``tasks``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from dynamics.fisher.dataset import fisher_dataset
from dynamics.fisher.gradient_null import effective_batches
from dynamics.fisher.labelled_concentration import LEADING, concentration_dataset
from dynamics.fisher.labelled_tasks import task_dataset
from dynamics.fisher.samples import blocks_of, codes_of, members_of
from dynamics.fisher.spectrum import fisher_eigenvectors

#: Variables of the record that the result keeps, so that everything else can be computed again.
_KEPT = ("gram", "update_product", "update_norm_squared", "dimension", "loss")
#: And what older records lack.
_STATED = ("momentum",)
_LABELS = ("sample_task", "sample_group", "sample_id")
_SHARE_OUTSIDE = {
    "units": "1",
    "long_name": "share of the update outside the space",
    "definition": "share of ‖δ‖² that no gradient in this space can produce",
}


def measured(record: xr.Dataset, *, k: Sequence[int] = LEADING, seed: int = 0) -> dict[str, xr.Dataset]:
    """Groups of the result from the raw records of all steps.

    Timing is the record's: gradients at the start of the increment (``evaluated_at_step``) if it is a capture's. The
    null gradient's batch is the optimizer's, times the :func:`effective_batches` of the steps between that and ``step``
    and of the momentum: what one batch of all those samples would give, which is the most concentrated that plain
    gradient descent could be. Unknown momentum counts as none, which a finding says.

    Args:
        record: ``gram(step, block, sample, sample_)``, ``update_product(step, block, sample)``,
            ``update_norm_squared``, ``share_outside_space``, ``dimension`` ``(step, block)``, ``loss(step, sample)``;
            task, group and id of each ``sample``; ``evaluated_at_step(step)``; attributes ``space``, ``fisher``,
            ``unit``, ``reduction``, ``batch_size`` (0 if not known). ``momentum(step)`` where it is known.
        k: Numbers of leading directions.
        seed: Of random halves, subsets, null gradients and permutations; the same at every step.

    Returns:
        ``fisher`` (with K and b themselves), ``concentration`` and ``tasks``, each with ``step`` in front. What is not
        known is NaN; a sample without gradients in every block at a step is left out there.

    Raises:
        ValueError: If a K is not a Gram matrix, or there is no step.
    """
    if not record.sizes["step"]:
        raise ValueError("Expected at least one record of the Fisher, got none.")
    found = [_of_step(record.isel(step=place), k, seed) for place in range(record.sizes["step"])]
    groups = {
        name: xr.concat([step[name] for step in found], dim=record["step"].variable.to_index(), join="outer")
        for name in ("fisher", "concentration", "tasks")
    }
    kept = record[[*_KEPT, *(name for name in _STATED if name in record)]].assign_coords(
        {name: record[name] for name in _LABELS}
    )
    groups["fisher"] = xr.merge([kept, groups["fisher"]], combine_attrs="drop_conflicts")
    groups["concentration"]["share_outside_space"] = record["share_outside_space"].assign_attrs(_SHARE_OUTSIDE)
    for group in groups.values():
        group.coords["evaluated_at_step"] = record["evaluated_at_step"]
        group.attrs = dict(record.attrs)
    return groups


def _of_step(record: xr.Dataset, k: Sequence[int], seed: int) -> dict[str, xr.Dataset]:
    names = record["block"].values.tolist()
    diagonal = np.diagonal(record["gram"].values, axis1=1, axis2=2)
    known = np.asarray(np.isfinite(diagonal).any(0))
    # No gradient at all: nothing is known of any sample.
    present = known if known.any() else np.ones_like(known)
    here = record.isel(sample=present, sample_=present)
    _, stacked = blocks_of(dict(zip(names, here["gram"].values, strict=True)))
    spectrum = fisher_eigenvectors(stacked)
    members = members_of(here["sample_task"].values, len(stacked[0]))
    group = codes_of(here["sample_group"].values, len(stacked[0]), "group")
    dimension = here["dimension"].values
    fisher = fisher_dataset(names, stacked, spectrum, group, members, dimension, seed)
    tasks = task_dataset(
        names,
        stacked,
        fisher["spectral_entropy"].values,
        group,
        members,
        losses=here["loss"].values,
        space=here.attrs["space"],
        seed=seed,
    )
    concentration = concentration_dataset(
        names,
        stacked,
        spectrum,
        here["update_product"].values,
        np.sqrt(here["update_norm_squared"].values),
        group,
        _batch_of(here),
        dimension,
        k,
        seed=seed,
    )
    return {"fisher": fisher, "concentration": concentration, "tasks": tasks}


def _batch_of(record: xr.Dataset) -> int:
    """Samples behind the update."""
    before = int(record["evaluated_at_step"])
    momentum = float(record["momentum"]) if "momentum" in record else 0.0
    return round(
        int(record.attrs["batch_size"]) * effective_batches(max(int(record["step"]) - before, 1), before, momentum)
    )
