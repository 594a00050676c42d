"""Did it train, everywhere?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from dynamics.report.answers.answer import Answer, Evidence, Verdict
from dynamics.routing.dataset import matrices_by_expert
from dynamics.spectra.dataset import parts_of_sums
from dynamics.spectra.findings import LOST
from dynamics.spectra.outlying_sizes import FACTOR, is_expert, outlying, relative_sizes
from dynamics.text import counted, listed, number, percent

#: Predicted share of rounding in an update's energy, from which on the update is mostly rounding.
ROUNDING = 0.5
#: Formats that resolve any training step.
_FINE = ("F32", "F64")
#: Roles that are named of a fault.
_NAMED = 3
_RECORD = "Record the training (DynamicsCallback) to see whether gradients reach these matrices."
_BASE = "Pass the weights before training (--base), or keep two checkpoints."
_LOST_MERGE = "a merge lost the adapter, or nothing was trained"
_NOT_GATHERED = "Gather the weights of all processes before saving."


def did_it_train(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Did it train, everywhere?"

    The matrices of the last step are looked at, of several adapters on one matrix each adapter. A matrix has not moved
    if its update is not finite, is exactly zero, differs from the base by rounding alone, or is less than 1/30 of its
    role's median and 10 robust standard deviations below it (:func:`dynamics.spectra.outlying_sizes.outlying`; not for
    experts, nor in roles of fewer than 3). One that has moved is faulty if it is as far above its role's median, was
    saved in part (OD139), is more than half rounding of its storage format, or, in 32 bits, did not change in the last
    interval while others did. Causes are told where gradients, learning rates, routing or earlier steps show them; else
    the possible ones are named.

    - ``yes``: every matrix has moved, and none is faulty; whole roles of dense weights that are as at the start, and
      whole roles that did not change in the last interval, count as frozen on purpose, and are told;
    - ``mixed``: not every one;
    - ``no``: none has moved;
    - ``undecided``: no update is known, or the only step is before training.

    An update that merging would mostly round away (``lost_in_merge`` above 0.5) has trained; the answer adds that.

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    matrices = _Matrices.of(tree)
    if not matrices.names:
        return Answer("trained", "undecided", "No update is known, so nothing tells whether it trained.", surer=_BASE)
    if matrices.is_before_training:
        return Answer("trained", "undecided", "The only step is 0, before training, when every update is zero.")
    faults = [*_faults(tree, matrices)]
    still = np.zeros(len(matrices.names), dtype=bool)
    for fault in faults:
        still |= fault.members & fault.is_still
    verdict: Verdict = "no" if still.all() else "yes" if all(fault.is_meant for fault in faults) else "mixed"
    parts = [_moved(matrices, int((~still).sum()), len(summary["segments"]))]
    parts += [fault.words(matrices) for fault in faults] or _smallest(matrices)
    evidence = [Evidence("/update/frobenius_norm"), *(fault.evidence for fault in faults if fault.evidence)]
    lost = _lost_in_merge(tree, matrices)
    if lost is not None:
        parts.append(lost.words(matrices))
        evidence.append(lost.evidence or Evidence("/base/lost_in_merge"))
    surer = " ".join(dict.fromkeys(fault.remedy for fault in faults if fault.remedy))
    return Answer("trained", verdict, f"{'; '.join(parts)}.", tuple(evidence), surer=surer)


@dataclass(frozen=True)
class _Matrices:
    """The matrices with a known update at the last step.

    Args:
        newest: ``/update`` of these matrices, at the steps of the newest training.
        names, roles: Of each.
        sizes: Root mean square of the entries of each total, where that is unknown of its largest increment; NaN where
            it is not finite.
        has_step: Whether the last step is known: of an adapter alone it is 0 for want of a number.
    """

    newest: xr.Dataset
    names: Sequence[str]
    roles: Sequence[str]
    sizes: Float[np.ndarray, " matrix"]
    has_step: bool

    @classmethod
    def of(cls, tree: xr.DataTree) -> _Matrices:
        """Return the matrices of a result."""
        update = tree["update"].to_dataset()[["count", "frobenius_norm", "quantisation_noise_share"]]
        names = update["matrix"].values.tolist()
        sums = {name.rpartition("@")[0] for name, is_part in zip(names, parts_of_sums(names), strict=True) if is_part}
        newest = update.isel(step=update["segment"].values == update["segment"].values[-1])
        present = (newest["count"].values[-1] > 0).any(0) & ~np.isin(names, list(sums))
        newest = newest.isel(matrix=present).load()
        total, increment = (newest["frobenius_norm"].sel(kind=kind).values for kind in ("total", "increment"))
        has_total = newest["count"].sel(kind="total").values[-1] > 0
        largest = np.where(np.isnan(increment[-1]), np.nan, np.nan_to_num(increment).max(0, initial=0.0))
        entries = newest["out"].values.astype(np.float64) * newest["in"].values
        paths = [str(entry["path"]) for entry in json.loads(tree.attrs["inputs"]) if entry.get("role") != "base"]
        return cls(
            newest,
            newest["matrix"].values.tolist(),
            newest["role"].values.tolist(),
            np.where(has_total, total[-1], largest) / np.sqrt(np.maximum(entries, 1.0)),
            bool(newest["step"].values[-1]) or "captured" in tree.attrs or any("/" in path for path in paths),
        )

    @property
    def step(self) -> int:
        """The last one."""
        return int(self.newest["step"].values[-1])

    @property
    def is_before_training(self) -> bool:
        """Whether nothing can have moved yet."""
        return self.step == 0 and self.has_step and bool((self.sizes == 0).all())

    def at_end(self, name: str, kind: str = "total") -> np.ndarray:
        """Return a variable of ``/update`` at the last step."""
        return self.newest[name].sel(kind=kind).values[-1]

    def aligned(self, array: xr.DataArray) -> np.ndarray:
        """Return an array of other matrices at these ones, NaN where it has none."""
        return array.reindex(matrix=self.names).values


@dataclass(frozen=True)
class _Fault:
    """What is wrong with some matrices.

    Args:
        members: Which ones.
        state: What they are, and why.
        is_still: Whether they have not moved.
        evidence: The number behind it, if there is another one than the norm.
        worst: Number of the matrix that is named as the worst; by default the first is named.
        remedy: What to do, or to measure.
        count: How many they are, where ``members`` are only the first of them.
        is_meant: Whether it is as likely meant, and no fault.
    """

    members: Bool[np.ndarray, " matrix"]
    state: str
    is_still: bool = True
    evidence: Evidence | None = None
    worst: int | None = None
    remedy: str = ""
    count: int = 0
    is_meant: bool = False

    def words(self, matrices: _Matrices) -> str:
        """Return how many matrices have the fault, what it is, and which they are."""
        roles = np.asarray(matrices.roles)
        of_role, by_role = Counter(roles.tolist()), Counter(roles[self.members].tolist())
        count = max(sum(by_role.values()), self.count)
        everything = count == len(roles) > 1
        where = [f"{members:,} of {of_role[role]:,} {role}" for role, members in by_role.most_common(_NAMED)]
        if len(by_role) > _NAMED:
            where.append(counted(len(by_role) - _NAMED, "other role"))
        name = matrices.names[int(np.argmax(self.members)) if self.worst is None else self.worst]
        example = f"{'first' if self.worst is None else 'worst'} {name}" if count > 1 else name
        which = example if everything or self.count > sum(by_role.values()) else f"{listed(where)}; {example}"
        return f"{'all' if everything else f'{count:,}'} {'is' if count == 1 else 'are'} {self.state} ({which})"


def _moved(matrices: _Matrices, moved: int, trainings: int) -> str:
    """Return how many matrices moved."""
    by = f" by step {matrices.step:,}" if matrices.has_step else ""
    newest = f" of the newest of {trainings} trainings" if trainings > 1 else ""
    count = len(matrices.names)
    total = counted(count, "matrix", "matrices")
    if not moved and not np.isfinite(matrices.sizes).any():
        return f"None of {total}{newest} has a finite update{by}" if count > 1 else f"The update is not finite{by}"
    if not moved:
        return f"None of {total}{newest} moved{by}" if count > 1 else f"The one matrix{newest} did not move{by}"
    if moved < count:
        return f"{moved:,} of {total}{newest} moved{by}"
    return f"All {total}{newest} moved{by}" if count > 1 else f"The one matrix{newest} moved{by}"


def _smallest(matrices: _Matrices) -> list[str]:
    """Return the smallest update beside its role's median, in one part of a sentence, if a role has a median."""
    relative = relative_sizes(matrices.sizes, matrices.roles)
    if np.isnan(relative).all():
        return []
    smallest = int(np.nanargmin(relative))
    return [f"the smallest update is {number(relative[smallest], 2)} of its role's median ({matrices.names[smallest]})"]


# --- faults -----------------------------------------------------------------------------------------------------------


def _faults(tree: xr.DataTree, matrices: _Matrices) -> Iterator[_Fault]:
    """Yield what is wrong; no matrix is told twice, but for those that were saved in part."""
    sizes = matrices.sizes
    left = np.isfinite(sizes)
    if not left.all():
        yield _Fault(~left, "not finite, as after a loss that diverged")
    if (sizes == 0).any():
        yield from _zero(tree, matrices)
    left &= sizes > 0
    changed = _beside_base(tree, matrices, "changed_share")
    is_adapter = np.isfinite(_beside_base(tree, matrices, "lost_in_merge"))
    rounded = left & (changed == 0) & ~is_adapter
    if rounded.any():
        state = f"equal to the base but for rounding to another format: {_LOST_MERGE}"
        yield _Fault(rounded, state, evidence=Evidence("/base/changed_share", 0.0))
    left &= ~rounded
    yield from _outlying(matrices, np.where(left, sizes, np.nan))
    share = matrices.at_end("quantisation_noise_share")
    noisy = left & (np.nan_to_num(share) > ROUNDING)
    if noisy.any():
        formats = listed(sorted(set(matrices.newest["storage"].values[noisy].tolist())))
        worst = int(np.argmax(np.where(noisy, share, 0.0)))
        evidence = Evidence("/update/quantisation_noise_share", float(share[worst]))
        state = f"mostly rounding of the format in which it is stored ({formats})"
        yield _Fault(noisy, state, is_still=False, evidence=evidence, worst=worst, remedy="Save in float32.")
    yield from _saved_in_part(tree, matrices)
    yield from _stopped(matrices, left & ~noisy)


def _zero(tree: xr.DataTree, matrices: _Matrices) -> Iterator[_Fault]:
    """Yield a fault for each cause of updates that are exactly zero, the surest cause first."""
    left = matrices.sizes == 0
    totals = np.nan_to_num(matrices.newest["frobenius_norm"].sel(kind="total").values)
    gradient = _largest_gradient(tree, matrices)
    experts = np.array([is_expert(role) for role in matrices.roles])
    adapters = matrices.newest["adapter_rank"].values > 0
    unchanged = _beside_base(tree, matrices, "changed_share") == 0
    recorded = Evidence("/gradient/norm_before_clip")
    unreached = _without_tokens(tree, matrices)
    rates_are_zero = np.full(len(left), _rates_are_zero(tree, matrices))
    whole = _whole_roles(left & ~adapters, matrices)
    causes = (
        (totals.any(0), "although not at an earlier step: lost when saved, or reset", None, ""),
        (unreached, "since no token reached the expert at any captured step", Evidence("/routing/assigned", 0.0), ""),
        (gradient == 0, "since no gradient reached it", recorded, ""),
        (rates_are_zero, "since the learning rate was 0", Evidence("/training/value", 0.0), ""),
        (gradient > 0, "despite its gradients: not in the optimizer, or a learning rate of 0", recorded, ""),
        (experts, "as if their experts were never chosen", None, _RECORD),
        (adapters, "as before the first step: no gradient, a learning rate of 0, or lost when saved", None, _RECORD),
        (unchanged & unchanged.all(), f"equal to the base: {_LOST_MERGE}", Evidence("/base/changed_share", 0.0), ""),
        (whole, "in whole roles, as if frozen on purpose", None, ""),
        (left, "as if frozen", None, ""),
    )
    for applies, cause, evidence, remedy in causes:
        members = left & applies
        if members.any():
            is_meant = applies is whole and not whole.all()
            yield _Fault(members, f"exactly zero, {cause}", evidence=evidence, remedy=remedy, is_meant=is_meant)
        left = left & ~members


def _whole_roles(members: Bool[np.ndarray, " matrix"], matrices: _Matrices) -> Bool[np.ndarray, " matrix"]:
    """Return the members of roles of which every matrix is one."""
    roles = np.asarray(matrices.roles)
    return members & ~np.isin(roles, roles[~members])


def _without_tokens(tree: xr.DataTree, matrices: _Matrices) -> Bool[np.ndarray, " matrix"]:
    """Return the matrices of experts to which no token was sent at any captured step of the newest training."""
    unreached = np.zeros(len(matrices.names), dtype=bool)
    if "routing" not in tree.children:
        return unreached
    routing = tree["routing"].to_dataset()
    routing = routing.isel(step=routing["step"].values >= matrices.newest["step"].values[0]).load()
    assigned = routing["assigned"].values
    dead = (np.nan_to_num(assigned) == 0).all(0) & np.isfinite(assigned).any(0)
    for layer, expert, matrix in matrices_by_expert(routing, matrices.names):
        unreached[matrix] = dead[layer, expert]
    return unreached


def _largest_gradient(tree: xr.DataTree, matrices: _Matrices) -> Float[np.ndarray, " matrix"]:
    """Return the largest recorded norm of each matrix's gradient in the newest training; NaN where none is known."""
    unknown = np.full(len(matrices.names), np.nan)
    if "gradient" not in tree.children:
        return unknown
    norm = tree["gradient"].to_dataset()["norm_before_clip"]
    norm = matrices.aligned(norm.isel(step=norm["step"].values >= matrices.newest["step"].values[0]))
    largest = np.nan_to_num(norm, nan=-1.0).max(0, initial=-1.0)
    return np.where(largest >= 0, largest, unknown)


def _rates_are_zero(tree: xr.DataTree, matrices: _Matrices) -> bool:
    """Return whether the log of the newest training has learning rates, all of them 0."""
    log = tree["training"].to_dataset() if "training" in tree.children else xr.Dataset({"metric": []})
    if "learning_rate" not in log["metric"].values:
        return False
    rates = (
        log["value"]
        .sel(metric="learning_rate")
        .values[log["log_segment"].values == matrices.newest["segment"].values[-1]]
    )
    return bool(rates.size) and bool((rates == 0).all())


def _beside_base(tree: xr.DataTree, matrices: _Matrices, name: str) -> Float[np.ndarray, " matrix"]:
    """Return a variable of ``/base``; NaN where it is not known."""
    if "base" not in tree.children or name not in tree["base"]:
        return np.full(len(matrices.names), np.nan)
    return matrices.aligned(tree["base"].to_dataset()[name])


def _outlying(matrices: _Matrices, sizes: Float[np.ndarray, " matrix"]) -> Iterator[_Fault]:
    """Yield matrices that are nearly zero, and those that are far too large, beside their role."""
    side, relative = outlying(sizes, matrices.roles), relative_sizes(sizes, matrices.roles)
    for sign, than in ((-1, f"smaller than 1/{FACTOR:.0f} of"), (1, f"larger than {FACTOR:.0f} times")):
        members = side == sign
        if members.any():
            worst = int(np.argmax(np.where(members, sign * np.nan_to_num(relative), -np.inf)))
            state = f"{than} the median of its role, at worst {number(float(relative[worst]), 2)} of it"
            evidence = Evidence("/update/frobenius_norm", float(matrices.at_end("frobenius_norm")[worst]))
            yield _Fault(members, state, sign < 0, evidence, worst)


def _saved_in_part(tree: xr.DataTree, matrices: _Matrices) -> Iterator[_Fault]:
    """Yield matrices of which one process's part was saved (OD139)."""
    for finding in json.loads(tree.attrs.get("findings", "[]")):
        evidence = finding["evidence"]
        if finding["code"] == "OD139" and matrices.step in evidence["steps"]:
            members = np.isin(matrices.names, evidence["names"])
            share = percent(evidence["share"])
            state = f"saved only in part: {share} of their rows or columns, as one process of several holds"
            if members.any():
                yield _Fault(members, state, False, remedy=_NOT_GATHERED, count=int(evidence["matrices"]))


def _stopped(matrices: _Matrices, left: Bool[np.ndarray, " matrix"]) -> Iterator[_Fault]:
    """Yield matrices that did not change in the last interval, in which others did."""
    change = matrices.newest["frobenius_norm"].sel(kind="increment").values
    fine = np.isin(matrices.newest["storage"].values, _FINE) & ~np.array([is_expert(role) for role in matrices.roles])
    stopped = left & fine & (change[-1] == 0)
    if not (np.nan_to_num(change[-1]) > 0).any():
        return
    since, whole = int(matrices.newest["from_step"].values[-1]), _whole_roles(stopped, matrices)
    if whole.any():
        state = f"as at step {since:,}, in whole roles, as if frozen on purpose"
        yield _Fault(whole, state, is_still=False, is_meant=True)
    if (stopped & ~whole).any():
        yield _Fault(stopped & ~whole, f"as at step {since:,}: frozen since, or without a gradient", is_still=False)


def _lost_in_merge(tree: xr.DataTree, matrices: _Matrices) -> _Fault | None:
    """Return the updates that merging would mostly round away."""
    lost = np.nan_to_num(_beside_base(tree, matrices, "lost_in_merge"))
    if not (lost > LOST).any():
        return None
    worst = int(lost.argmax())
    state = f"mostly rounded away when merged into the base's format, which loses {percent(lost[worst], 0)} at worst"
    return _Fault(lost > LOST, state, False, Evidence("/base/lost_in_merge", float(lost[worst])), worst)
