"""Findings about the Fisher's numbers: one for each subject, not one for each block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr

from dynamics.findings import Finding
from dynamics.fisher.concentration import LEAST_GRADIENTS, LEAST_GROUPS
from dynamics.schema import ALL, GLOBAL
from dynamics.text import percent, some
from probes.preconditioner import NO_OPTIMIZER

#: Below this many groups an interval is wide, and its Student's t leans on normality.
FEW_GROUPS = 8
#: More of an update than this share outside the space is worth a warning.
OUTSIDE = 0.1
#: Tasks differ in their number of samples if the largest exceeds the smallest by more than this factor.
UNEQUAL = 1.1
#: The update is called concentrated if more than this share of cases is: so many would be by chance.
CHANCE = 0.05
#: With fewer effective groups than this share of the groups, few samples dominate the Fisher.
EFFECTIVE = 0.25
#: A group with more than this share of tr K, and more than twice its share of the groups, dominates the Fisher.
LARGEST_GROUP = 0.2
#: Largest number of names in one finding's evidence.
_NAMED = 8
_ROUNDING = 1e-3


def findings_of(groups: Mapping[str, xr.Dataset]) -> list[Finding]:
    """Return the findings about the groups ``fisher``, ``concentration`` and ``tasks`` of ``measure_fisher``."""
    fisher, concentration, tasks = (groups[name] for name in ("fisher", "concentration", "tasks"))
    return [
        *_few_groups(fisher),
        *_not_finite(fisher),
        *_outside(concentration),
        *_unresolved(tasks),
        *_null(fisher, concentration),
        *_momentum(fisher, concentration),
        *_concentrated(concentration),
        *_beside_optimizer(concentration),
        *_clustered(fisher),
        *_unequal(fisher),
        *_heavy(fisher),
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
            "and below three groups there are none.",
            "Probe samples of more images, patients or documents.",
            evidence={"groups": few},
        )


def _not_finite(fisher: xr.Dataset) -> Iterator[Finding]:
    diagonal = np.diagonal(fisher["gram"].values, axis1=2, axis2=3)
    absent = np.asarray(~np.isfinite(diagonal).any(1))  # samples that were left out at a step
    pairs = ~absent[:, :, None] & ~absent[:, None, :]
    empty = np.asarray(absent.all(-1))[:, None]
    broken = np.asarray((~np.isfinite(fisher["gram"].values) & pairs[:, None]).any((2, 3)) | empty)
    broken &= np.isfinite(fisher["dimension"].values)  # a block that is not trained at a step has no Gram matrix there
    if broken.any():
        names = fisher["block"].values[broken.any(0)].tolist()
        yield Finding(
            "OD402",
            f"The Gram matrix of {_named(names)} is not finite at {int(broken.any(1).sum())} of {len(broken)} steps; "
            "its measures are NaN there.",
            "Look for samples with an infinite or NaN loss, or for overflow in half precision.",
            evidence={"blocks": names[:_NAMED]},
        )


def _outside(concentration: xr.Dataset) -> Iterator[Finding]:
    share = concentration["share_outside_space"].max("step")
    far = share.values > OUTSIDE
    if far.any():
        names = share["block"].values[far].tolist()
        yield Finding(
            "OD403",
            f"Up to {percent(float(np.nanmax(share.values)))} of the update of {_named(names)} cannot be reached by "
            "one step's gradients and is left out of the concentration.",
            "Capture more often to reduce this.",
            evidence={"largest": float(np.nanmax(share.values)), "blocks": names[:_NAMED]},
        )


def _unresolved(tasks: xr.Dataset) -> Iterator[Finding]:
    between = tasks["unresolved"].drop_sel(task=ALL, task_=ALL).values
    apart = ~np.eye(between.shape[-1], dtype=bool)
    share = float(between[..., apart].mean()) if apart.any() else 0.0
    if share > 0:
        yield Finding(
            "OD404",
            f"{percent(share)} of the cosines between tasks are undecided (NaN): with these samples the mean gradient "
            "of one of the tasks is indistinguishable from zero.",
            "Probe more samples of each task.",
            evidence={"share": share},
        )


def _null(fisher: xr.Dataset, concentration: xr.Dataset) -> Iterator[Finding]:
    if not np.isfinite(concentration["captured"].values).any():
        return
    batch, samples = concentration["null_batch"].values, fisher["samples"].sel(task=ALL).values
    few = bool((fisher["groups"].sel(task=ALL) < LEAST_GROUPS).any())
    if np.isnan(batch).any() or few:
        reason = f"there are fewer than {LEAST_GROUPS} groups" if few else "the batch size of the training is unknown"
        yield Finding(
            "OD406",
            f"The update has no gradient null, since {reason}. Its captured share can only be compared with the "
            "isotropic null, which every gradient exceeds.",
            "Probe more groups." if few else "State the optimizer's effective batch size.",
        )
        return
    limit = concentration["null_batch_limit"].values
    if (batch > limit).any():
        yield Finding(
            "OD413",
            f"The gradient null imitates batches of up to {int(batch.max()):,} samples, more than eight times half of "
            f"the probe samples ({int(limit.min()):,}). Such updates are not called concentrated: up to 9 % would be "
            "by chance.",
            "Probe more samples, or capture more often.",
            evidence={"null_batch": int(batch.max()), "most": int(limit.min()), "steps": int((batch > limit).sum())},
        )
    elif (batch > samples / 2).any():
        yield Finding(
            "OD405",
            f"The gradient null imitates batches of {int(batch.max()):,} samples but rests on "
            f"{int(samples.min()) // 2:,} probe samples, so its interval is wide.",
            "Probe more samples, or capture more often.",
            evidence={"null_batch": int(batch.max()), "samples": int(samples.min())},
        )


def _cases(concentration: xr.Dataset, null: str = "") -> tuple[int, int]:
    """Return in how many cases the update is concentrated, and how many there are."""
    concentrated = concentration[f"concentrated{null}"]
    possible = np.isfinite(concentration[f"gain{null}_low"]) & np.isfinite(concentration[f"gain{null}_low_centred"])
    possible &= concentration["null_batch"] <= concentration["null_batch_limit"]
    return int(concentrated.sum()), int(possible.sum())


def _concentrated(concentration: xr.Dataset) -> Iterator[Finding]:
    concentrated, cases = _cases(concentration)
    share = concentrated / max(cases, 1)
    if share > CHANCE:
        yield Finding(
            "OD407",
            f"In {concentrated} of {cases} cases (step, block, k) the update is more concentrated along "
            "informative directions than a plain gradient of as many samples: the 95 % interval of the gain lies above "
            "1, also for centred gradients. Up to 5 % of cases would be by chance; cases share samples, so they would "
            "be so together.",
            evidence={"cases": concentrated, "of": cases, "share": share},
        )


def _beside_optimizer(concentration: xr.Dataset) -> Iterator[Finding]:
    compared, beside = (concentration[name].notnull().any(("block", "k")).values for name in ("gain", "gain_optimizer"))
    lacking, young = compared & ~beside, concentration["optimizer_gradients"].values < LEAST_GRADIENTS
    reason, told = str(concentration.attrs.get("unpreconditioned", "")), lacking & ~young
    if lacking.any() and young[lacking].all() and not beside.any():  # else there are others to look at
        reason, told = f"the optimizer's second moments rest on fewer than {LEAST_GRADIENTS} gradients there", lacking
    # Of checkpoints nobody can tell what their optimizer would have done.
    if reason and told.any():
        steps, several = int(told.sum()), int(compared.sum())
        yield Finding(
            "OD335",
            f"At {steps} of {several} steps the update is not compared with steps of its optimizer along fresh "
            f"gradients: {reason}. Adam's scaling alone can bring a gain below 1.",
            "Pass the optimizer to recorder.step(step, optimizer)."
            if reason == NO_OPTIMIZER
            else "Compare other steps, or updates of the same optimizer with each other.",
            evidence={"steps": steps, "of": several, "reason": reason},
        )
    elif (
        reason
        and beside.any()
        and (unknown := concentration["gain_optimizer"].isnull().all(("step", "k")).values).any()
    ):
        names = concentration["block"].values[unknown].tolist()
        yield Finding(
            "OD335",
            f"The update of {_named(names)} is not compared with steps of its optimizer along fresh gradients: "
            f"{reason}.",
            evidence={"blocks": names[:_NAMED], "reason": reason},
        )
    concentrated, cases = _cases(concentration, "_optimizer")
    share = concentrated / max(cases, 1)
    same = bool((concentration["gain_optimizer"].fillna(0) == concentration["gain"].fillna(0)).all())  # plain SGD
    if share > CHANCE and not same:
        yield Finding(
            "OD336",
            f"In {concentrated} of {cases} cases (step, block, k) the update is more concentrated along informative "
            "directions than a step of its optimizer along a fresh gradient: the optimizer's scaling alone does not "
            "explain it. Up to 5 % of cases would be by chance; cases share samples, so they would be so together.",
            evidence={"cases": concentrated, "of": cases, "share": share},
        )


def _clustered(fisher: xr.Dataset) -> Iterator[Finding]:
    samples, groups = (float(fisher[name].sel(task=ALL).max()) for name in ("samples", "groups"))
    if samples > groups:
        yield Finding(
            "OD408",
            f"The {int(samples)} probe samples come in {int(groups)} groups. Samples of a group resemble each other, "
            "which lowers the plug-in SE. Participation ratio and rarefied curves count groups.",
            "Compare ln_participation_ratio, or rarefied_spectral_entropy at the same n.",
            evidence={"samples": int(samples), "groups": int(groups)},
        )


def _unequal(fisher: xr.Dataset) -> Iterator[Finding]:
    samples = fisher["samples"].drop_sel(task=ALL)
    if samples.sizes["task"] > 1 and float(samples.max()) > UNEQUAL * float(samples.min()):
        yield Finding(
            "OD409",
            f"Tasks have {int(samples.min())} to {int(samples.max())} probe samples. Plug-in SE and ρ depend on that "
            "number and cannot be compared between them.",
            "Compare ln_participation_ratio, or rarefied_spectral_entropy at the same n.",
            evidence={"fewest": int(samples.min()), "most": int(samples.max())},
        )


def _heavy(fisher: xr.Dataset) -> Iterator[Finding]:
    of_all = fisher.sel(block=GLOBAL) if GLOBAL in fisher["block"].values else fisher
    groups, effective, largest = (of_all[name] for name in ("groups", "effective_groups", "largest_group_share"))
    few = effective < EFFECTIVE * groups
    dominated = few | (largest > np.maximum(LARGEST_GROUP, 2 / groups))
    if dominated.any():
        tasks = dominated.any([dim for dim in dominated.dims if dim != "task"])
        names = tasks["task"].values[tasks.values].tolist()
        worst = of_all.isel((effective / groups).where(dominated).argmin(...))
        counts = {name: float(worst[name]) for name in ("groups", "effective_groups", "largest_samples_share")}
        yield Finding(
            "OD412",
            f"Few samples dominate the Fisher of {_named(names)}. For {str(worst['task'].item())!r} at step "
            f"{int(worst['step'])} the {int(counts['groups'])} groups are worth {counts['effective_groups']:.1f} of "
            f"equal size, and the three largest samples hold {percent(counts['largest_samples_share'])} of the trace. "
            "Intervals assume samples of similar size: those of the noise scale are too short, those of the "
            "participation ratio may be slightly too short.",
            "Compare ln_participation_ratio_directional, in which all samples weigh the same. Probe more samples, or "
            "use the mean loss over tokens instead of the sum where long answers dominate.",
            evidence=counts | {"largest_group_share": float(worst["largest_group_share"]), "tasks": names[:_NAMED]},
            step=int(worst["step"]),
        )


def _momentum(fisher: xr.Dataset, concentration: xr.Dataset) -> Iterator[Finding]:
    batch, gain = concentration["null_batch"].values, concentration["gain"].max(("block", "k")).values
    momentum = fisher["momentum"].values if "momentum" in fisher else np.full(len(batch), np.nan)
    if (np.isfinite(batch) & np.isfinite(gain) & np.isnan(momentum)).any():
        yield Finding(
            "OD414",
            "The optimizer's momentum is unknown, and the gradient null assumes none. With β = 0.9 the update of one "
            "step averages up to 19 batches, so momentum alone may explain a gain above 1.",
            "Give Recorder.step the optimizer, or let the --probe function return model, tasks, batch_size, momentum.",
        )


def _foreign_product(concentration: xr.Dataset) -> Iterator[Finding]:
    share = concentration["captured"].max(("step", "k"))
    beyond = share.values > 1 + _ROUNDING
    if beyond.any():
        names = share["block"].values[beyond].tolist()
        yield Finding(
            "OD410",
            f"The update products of {_named(names)} give shares above 1: b = Gδ and ‖δ‖ are of different updates, or "
            "b and K of different gradients.",
            evidence={"largest": float(np.nanmax(share.values)), "blocks": names[:_NAMED]},
        )


def _named(names: Mapping[str, int] | list[str]) -> str:
    return some(map(repr, names))
