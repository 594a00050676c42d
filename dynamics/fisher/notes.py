"""What a reader of the Fisher's numbers must know: one finding for each thing, not one for each block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr

from dynamics.findings import Finding
from dynamics.fisher.gradient_null import LEAST_GROUPS
from dynamics.schema import ALL

#: Below this many groups an interval is wide, and its Student's t leans on normality.
FEW_GROUPS = 8
#: More of an update than this share outside the space is worth a warning.
OUTSIDE = 0.1
#: Numbers of samples differ if the larger exceeds the smaller by this factor.
UNEQUAL = 1.1
#: Cases of which more than this share must be concentrated before the word is used; 2.5 % would be by chance.
CHANCE = 0.05
#: At most so many names are given in one finding's evidence.
_NAMED = 8
_ROUNDING = 1e-3


def notes(groups: Mapping[str, xr.Dataset]) -> list[Finding]:
    """Findings that follow from ``fisher``, ``concentration`` and ``tasks`` alone, as ``measured`` returns them."""
    fisher, concentration, tasks = (groups[name] for name in ("fisher", "concentration", "tasks"))
    return [
        *_few_groups(fisher),
        *_not_finite(fisher),
        *_outside(concentration),
        *_unresolved(tasks),
        *_null(fisher, concentration),
        *_concentrated(concentration),
        *_clustered(fisher),
        *_unequal(fisher),
        *_foreign_product(concentration),
    ]


def _few_groups(fisher: xr.Dataset) -> Iterator[Finding]:
    smallest = fisher["groups"].min("step")
    few = {str(task): int(count) for task, count in zip(smallest["task"].values, smallest.values, strict=True)}
    few = {task: count for task, count in few.items() if count < FEW_GROUPS}
    if few:
        yield Finding(
            "OD401",
            f"Expected at least {FEW_GROUPS} groups of probe samples, got fewer for {_named(few)}: intervals are wide, "
            "and missing below three.",
            "Probe samples of more images, patients or documents.",
            evidence={"groups": few},
        )


def _not_finite(fisher: xr.Dataset) -> Iterator[Finding]:
    diagonal = np.diagonal(fisher["gram"].values, axis1=2, axis2=3)
    absent = np.asarray(~np.isfinite(diagonal).any(1))  # samples that were left out at a step
    known = ~absent[:, :, None] & ~absent[:, None, :]
    nothing = np.asarray(absent.all(-1))[:, None]
    broken = np.asarray((~np.isfinite(fisher["gram"].values) & known[:, None]).any((2, 3)) | nothing)
    broken &= np.isfinite(fisher["dimension"].values)  # a block that is not trained at a step has no Gram matrix there
    if broken.any():
        names = fisher["block"].values[broken.any(0)].tolist()
        yield Finding(
            "OD402",
            f"The Gram matrix of {_named(names)} is not finite at {int(broken.any(1).sum())} of {len(broken)} steps; "
            "its measures are NaN there.",
            "Look for samples whose loss is not finite, or for overflow in half precision.",
            evidence={"blocks": names[:_NAMED]},
        )


def _outside(concentration: xr.Dataset) -> Iterator[Finding]:
    share = concentration["share_outside_space"].max("step")
    far = share.values > OUTSIDE
    if far.any():
        names = share["block"].values[far].tolist()
        yield Finding(
            "OD403",
            f"Up to {float(np.nanmax(share.values)):.0%} of the squared norm of the update lies outside the space of "
            f"the gradients, for {_named(names)}: concentration is that of the rest.",
            "Capture more often: the space is that of one step.",
            evidence={"largest": float(np.nanmax(share.values)), "blocks": names[:_NAMED]},
        )


def _unresolved(tasks: xr.Dataset) -> Iterator[Finding]:
    between = tasks["unresolved"].drop_sel(task=ALL, task_=ALL).values
    apart = ~np.eye(between.shape[-1], dtype=bool)
    share = float(between[..., apart].mean()) if apart.any() else 0.0
    if share > 0:
        yield Finding(
            "OD404",
            f"{share:.0%} of the cosines between tasks are not resolved: the mean gradient of a task cannot be told "
            "from 0 with these samples, and the cosine is NaN.",
            "Probe more samples of each task.",
            evidence={"share": share},
        )


def _null(fisher: xr.Dataset, concentration: xr.Dataset) -> Iterator[Finding]:
    if not np.isfinite(concentration["captured"].values).any():
        return
    batch, samples = concentration["null_batch"].values, fisher["samples"].sel(task=ALL).values
    few = bool((fisher["groups"].sel(task=ALL) < LEAST_GROUPS).any())
    if np.isnan(batch).any() or few:
        what = f"there are fewer than {LEAST_GROUPS} groups" if few else "the batch size of the training is not known"
        yield Finding(
            "OD406",
            f"The update has no gradient null, since {what}: its captured share stands beside the isotropic null "
            "alone, which every gradient exceeds.",
            "Probe more groups." if few else "State the optimizer's effective batch size.",
        )
    elif (batch > samples / 2).any():
        yield Finding(
            "OD405",
            f"The null gradients stand for up to {int(batch.max())} samples, of which half of {int(samples.min())} "
            "probe samples give the mean: where they do not resolve it, the null is wider and the gain's "
            "interval with it.",
            "Probe more samples, or capture more often, for a sharper comparison.",
            evidence={"null_batch": int(batch.max()), "samples": int(samples.min())},
        )


def _concentrated(concentration: xr.Dataset) -> Iterator[Finding]:
    proven = concentration["concentrated"]
    possible = np.isfinite(concentration["gain_low"]) & np.isfinite(concentration["gain_low_centred"])
    share, cells = float(proven.sum() / max(int(possible.sum()), 1)), int(possible.sum())
    if share > CHANCE:
        yield Finding(
            "OD407",
            f"In {int(proven.sum())} of {cells} cases (step, block, k) the update is more concentrated along "
            "informative directions than a gradient of its batch: the gain's 95 % interval lies above 1, centred "
            "too. Up to 2.5 % would by chance.",
            evidence={"cases": int(proven.sum()), "of": cells, "share": share},
        )


def _clustered(fisher: xr.Dataset) -> Iterator[Finding]:
    samples, groups = (float(fisher[name].sel(task=ALL).max()) for name in ("samples", "groups"))
    if samples > groups:
        yield Finding(
            "OD408",
            f"{int(samples)} probe samples come in {int(groups)} groups: samples of a group resemble each other, which "
            "lowers the plug-in SE. Participation ratio and rarefied curves count groups.",
            "Compare ln_participation_ratio, or rarefied_spectral_entropy at the same n.",
            evidence={"samples": int(samples), "groups": int(groups)},
        )


def _unequal(fisher: xr.Dataset) -> Iterator[Finding]:
    samples = fisher["samples"].drop_sel(task=ALL)
    if samples.sizes["task"] > 1 and float(samples.max()) > UNEQUAL * float(samples.min()):
        yield Finding(
            "OD409",
            f"Tasks have {int(samples.min())} to {int(samples.max())} probe samples: plug-in SE and ρ depend on the "
            "number and do not compare.",
            "Compare ln_participation_ratio, or rarefied_spectral_entropy at the same n.",
            evidence={"fewest": int(samples.min()), "most": int(samples.max())},
        )


def _foreign_product(concentration: xr.Dataset) -> Iterator[Finding]:
    share = concentration["captured"].max(("step", "k"))
    beyond = share.values > 1 + _ROUNDING
    if beyond.any():
        names = share["block"].values[beyond].tolist()
        yield Finding(
            "OD410",
            f"The update products of {_named(names)} give shares above 1: b = Gδ is of another update than ‖δ‖, or of "
            "other gradients than K.",
            evidence={"largest": float(np.nanmax(share.values)), "blocks": names[:_NAMED]},
        )


def _named(names: Mapping[str, int] | list[str]) -> str:
    listed = list(names)
    return ", ".join(repr(name) for name in listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
