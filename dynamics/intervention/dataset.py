"""Arms run and scored: the group ``/intervention``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import nn

from dynamics.fisher.samples import Estimate, SampleGroups, StackedGram
from dynamics.intervention.counterfactuals import PAIR, Arms, Counterfactuals, tasks_of
from dynamics.intervention.effects import adjusted_p, effects, part_and_rest, required_groups
from dynamics.intervention.update_vectors import energy
from dynamics.schema import GLOBAL, INTERVENTION, label_arrays
from probes.additions import added
from probes.low_rank import LowRankMatrix
from probes.scores import device_of
from probes.tasks import Task, one_each
from probes.undisturbed import undisturbed
from probes.watched import Matrix

#: Lengths λ at which ``full``, ``on`` and ``off`` are scored.
SCALES = (0.25, 0.5, 1.0)
_CURVES = ("full", "on", "off")


def intervene(
    model: nn.Module,
    tasks: Task | Sequence[Task],
    arms: Counterfactuals,
    *,
    scales: Sequence[float] = SCALES,
    step: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> xr.Dataset:
    r"""Run each arm on the groups that its directions do not come from, and return its effects with intervals.

    The effect of x on a task is D(x) = mean of ℓ(θ) − ℓ(θ + x): positive where x lowers the loss. Each sample is held
    out once a split, and its effect is the mean over splits. Intervals are 95 %, from the delete-one-group jackknife
    and the variance between splits; they are conditional on the directions. What ``on`` and ``off`` do apart and
    together is in :func:`dynamics.intervention.effects.part_and_rest`.

    Costs, with two splits, one k and the default arms and lengths, 25 forward passes over the probe samples and two
    passes forward and backward for the directions. Each further k takes 18 more. Scores of the tasks' own take passes
    of their own, 8 with the default arms. What no direction changes (``full``, arms of layers and of singular values)
    is run once, on all samples.

    Args:
        model: At the weights where the update began; it is left as it was.
        tasks: The probe samples. Where tasks have a score of their own, it is measured beside the loss, at λ = 1.
        arms: From :func:`dynamics.counterfactuals`.
        scales: Lengths λ at which ``full``, ``on`` and ``off`` are scored; 1 is always among them.
        step: Step at which the update ends, for the coordinate.
        progress: Called with the number of forward passes over samples made, and of all.

    Returns:
        The group ``/intervention`` for one step.

    Raises:
        ValueError: If the model has moved, the tasks or gradients are not those behind K, or a loss is not one number a
            sample.

    >>> from dynamics.intervention.counterfactuals import counterfactuals
    >>> from probes import gradient_gram
    >>> layer = nn.Linear(1, 1, bias=False).double()
    >>> _ = nn.init.zeros_(layer.weight)
    >>> def squares(model, batch):
    ...     return (model(batch["x"].double())[:, 0] - 1) ** 2 / 2
    >>> tasks = [Task("line", [{"x": [1.0]}] * 8, loss=squares)]
    >>> change = {"weight": torch.tensor([[1.0]], dtype=torch.float64)}
    >>> arms = counterfactuals(layer, tasks, gradient_gram(layer, tasks, update=change), change, k=1)
    >>> effects = intervene(layer, tasks, arms)
    >>> effects["effect"].sel(step=0, arm="full", k=1, scale=1.0, task="all").item()  # from ½ to 0
    0.5
    >>> effects["share"].sel(step=0, k=1, task="all").item()
    1.0
    """
    scales = tuple(sorted({*map(float, scales), 1.0}))
    if not all(np.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"Expected positive lengths, got {scales}.")
    tasks = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
    arms.require(model, tasks)
    stacked = StackedGram.of(arms.gram)
    run = _Run(model, tasks, arms, scales, progress)
    with undisturbed(model) as quiet, torch.no_grad():
        run.whole(quiet)
        for number, fold in enumerate(arms.folds):
            run.fold(quiet, fold.arms, number // 2)
    progress(run.passes, run.passes)
    return _dataset(run, stacked, step)


@dataclass
class _Run:
    """Effects on each sample of each split: of what no direction changes at once, of the rest fold by fold."""

    model: nn.Module
    tasks: tuple[Task, ...]
    arms: Counterfactuals
    scales: tuple[float, ...]
    progress: Callable[[int, int], None]
    differences: dict[tuple[str, int, float], np.ndarray] = field(default_factory=dict)
    scores: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    predicted: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    captured: dict[int, np.ndarray] = field(default_factory=dict)
    norms: dict[tuple[str, int], float] = field(default_factory=dict)
    base: np.ndarray = field(default_factory=lambda: np.zeros(0))
    base_scores: np.ndarray | None = None
    repeated: float = 0.0
    deviation: float = 0.0
    done: int = 0

    @property
    def plan(self) -> list[tuple[str, int, float]]:
        """Arm, k and λ of all that is run; ``matched`` as its two signs."""
        lines: list[tuple[str, int, float]] = []
        for arm in self.arms.names:
            ks = self.arms.k[:1] if _has_no_k(arm) else self.arms.k
            for name in PAIR if arm == "matched" else (arm,):
                lines += [(name, k, scale) for k in ks for scale in (self.scales if arm in _CURVES else (1.0,))]
        return lines

    def whole(self, model: nn.Module) -> None:
        """Run the model as it is, and what no direction changes, on all samples."""
        update = self.arms.update
        rows = np.arange(len(update.numbers))
        tasks = tasks_of(self.tasks, update.numbers)
        self.base = self._losses(model, tasks, None)
        self.arms.require_losses(rows, self.base)
        self.base_scores = self._scores(model, tasks, None)
        lines = [line for line in self.plan if _is_fixed(line[0])]
        self._run(model, tasks, self.arms.folds[0].arms, lines, (slice(None), rows), self.base)

    def fold(self, model: nn.Module, parts: Arms, split: int) -> None:
        """Run the arms of one fold on its held-out samples."""
        update = self.arms.update
        rows = np.setdiff1d(np.arange(len(update.numbers)), parts.rows)
        tasks = tasks_of(self.tasks, update.numbers[rows])
        with torch.enable_grad():
            self.deviation = max(self.deviation, parts.deviation)
        base = self._losses(model, tasks, None)  # in the batches of the arms, so that what batches do to it cancels
        lines = [line for line in self.plan if not _is_fixed(line[0])]
        self._run(model, tasks, parts, lines, (split, rows), base, folds=len(self.arms.folds))
        for k in self.arms.k:
            self._add(self.captured, k, (split, rows), np.full(len(rows), parts.captured("on", k)))
        if split == 0:  # once for each sample
            repeated = self._losses(model, tasks, None)
            self.repeated = max(self.repeated, float(np.abs(repeated - base).max()))
        parts.release()

    def _run(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        parts: Arms,
        lines: Sequence[tuple[str, int, float]],
        cells: tuple[int | slice, np.ndarray],
        base: Float[np.ndarray, " held_out"],
        folds: int = 1,
    ) -> None:
        """Add what arms do to samples.

        Args:
            tasks: With these samples alone.
            parts: The arms' changes.
            lines: As in the plan.
            cells: Splits and rows of K to which the samples' effects belong.
            base: Their losses without an arm.
            folds: In how many an arm is made, of whose squared norms the mean is taken.
        """
        rows = cells[1]
        for arm, k, scale in lines:
            change = _scaled(parts.matrices(arm, k), scale)
            name, half = ("matched", 0.5) if arm in PAIR else (arm, 1.0)
            fall = base - self._losses(model, tasks, change)
            self._add(self.differences, (name, k, scale), cells, half * fall)
            if scale == 1.0:
                share = half * energy(parts.change(arm, k)) / folds
                self.norms[name, k] = self.norms.get((name, k), 0.0) + share
                self._add(self.predicted, (name, k), cells, half * self._slopes(parts, arm, k, rows))
                if self.base_scores is not None and arm not in PAIR:
                    rise = self._scores(model, tasks, change) - self.base_scores[rows]
                    self._add(self.scores, (name, k), cells, rise)

    def _add(self, sums: dict, key: object, cells: tuple[int | slice, np.ndarray], values: np.ndarray) -> None:
        total = sums.setdefault(key, np.zeros((self.arms.splits, len(self.arms.update.numbers))))
        total[cells] += values

    def _slopes(self, parts: Arms, arm: str, k: int, rows: np.ndarray) -> np.ndarray:
        """Return −⟨g_i, x⟩ of the held-out samples, from K and b; NaN for an arm that they do not know."""
        update = self.arms.update
        full = -update.product[rows]
        if arm == "full":
            return full
        if arm in PAIR:  # z is orthogonal to δ, its products with gradients cancel in the pair
            return parts.captured("on", k) * full
        part = {"off": "on"}.get(arm, arm)
        if (part, k) not in parts.parts:
            return np.full(len(rows), np.nan)
        along = -update.gram[np.ix_(rows, parts.rows)] @ parts.parts[part, k].weights
        return full - along if arm == "off" else along

    def _losses(
        self, model: nn.Module, tasks: Sequence[Task], change: Mapping[str, Matrix] | None
    ) -> Float[np.ndarray, " held_out"]:
        self._count(tasks)
        device = device_of(model)
        with added(model, change) if change is not None else nullcontext():
            values = [task.losses(model, batch.to(device)).double().cpu() for task in tasks for batch in task.batches()]
        return torch.cat(values).numpy()

    def _scores(
        self, model: nn.Module, tasks: Sequence[Task], change: Mapping[str, Matrix] | None
    ) -> Float[np.ndarray, " held_out"] | None:
        """Return the score of each sample, NaN where its task has none; ``None`` if no task of the run has."""
        if all(task.score is None for task in self.tasks):
            return None
        device = device_of(model)
        values: list[torch.Tensor] = []
        with added(model, change) if change is not None else nullcontext():
            for task in tasks:
                if task.score is None:
                    values.append(torch.full((len(task),), torch.nan, dtype=torch.float64))
                    continue
                for batch in task.batches():
                    scores = one_each(
                        task.score(model, batch.to(device)), batch.samples, f"{task}: score(model, batch)"
                    )
                    values.append(scores.double().cpu())
        return torch.cat(values).numpy()

    @property
    def passes(self) -> int:
        """Forward passes over samples: of directions and the base once a split, of others and the base again once."""
        fixed = sum(_is_fixed(arm) for arm, _, _ in self.plan)
        return (self.arms.splits * (len(self.plan) - fixed + 1) + fixed + 2) * len(self.arms.update.numbers)

    def _count(self, tasks: Sequence[Task]) -> None:
        self.progress(self.done, self.passes)
        self.done = min(self.done + sum(map(len, tasks)), self.passes)


def _has_no_k(arm: str) -> bool:
    return arm == "full" or ":" in arm


def _is_fixed(arm: str) -> bool:
    """Return whether an arm is the same whatever the directions."""
    return _has_no_k(arm) or arm.startswith("sigma_")


def _scaled(change: Mapping[str, Matrix], scale: float) -> dict[str, Matrix]:
    if scale == 1.0:
        return dict(change)
    return {
        name: LowRankMatrix(m.left_factor, m.right_factor, scale * m.scale, column_scale=m.column_scale)
        if isinstance(m, LowRankMatrix)
        else scale * m
        for name, m in change.items()
    }


def _dataset(run: _Run, stacked: StackedGram, step: int) -> xr.Dataset:
    arms, labels = run.arms, stacked.labels
    ks, names, samples = sorted(arms.k), list(arms.names), len(labels.group)
    differences = np.full((arms.splits, len(names), len(ks), len(run.scales), samples), np.nan)
    predicted, scores = differences.copy(), differences[:, :, :, -1].copy()
    norms = np.full((len(names), len(ks)), np.nan)
    for row, arm in enumerate(names):
        for column, k in enumerate(ks):
            k_of_arm = arms.k[0] if _has_no_k(arm) else k
            for depth, scale in enumerate(run.scales):
                if (arm, k_of_arm, scale) in run.differences:
                    differences[:, row, column, depth] = run.differences[arm, k_of_arm, scale]
                    predicted[:, row, column, depth] = scale * run.predicted[arm, k_of_arm]
            scores[:, row, column] = run.scores.get((arm, k_of_arm), np.nan)
            norms[row, column] = np.sqrt(run.norms[arm, k_of_arm])
    arrays = {
        **_ends("effect", _effects(differences, labels)),
        "predicted_effect": _effects(predicted, labels).estimate,
        "norm": norms,
        "headline": np.array([k == arms.k[0] for k in ks]),
        **_decomposed(run, differences, ks, labels),
    }
    at_full_length = differences[:, :, :, run.scales.index(1.0)]
    arrays["required_groups"] = np.stack([required_groups(arm, labels) for arm in at_full_length.swapaxes(0, 1)])
    if run.scores:
        arrays |= _ends("score_effect", _effects(scores, labels))
    coords = {"step": [step], "arm": names, "k": ks, "scale": list(run.scales), "task": list(stacked.tasks)}
    variables = label_arrays(INTERVENTION, {name: values[None] for name, values in arrays.items()})
    return xr.Dataset(variables, coords, _attributes(run, labels))


def _attributes(run: _Run, labels: SampleGroups) -> dict[str, object]:
    share = run.arms.gram.share_outside_space.get(GLOBAL, np.nan)
    return {
        "space": run.arms.update.space,
        "splits": run.arms.splits,
        "groups": len(np.unique(labels.group)),
        "samples": len(labels.group),
        "share_outside_space": float(share),
        "norm_deviation": run.deviation,
        "repeat_deviation": run.repeated,
    }


def _decomposed(
    run: _Run, differences: Float[np.ndarray, "split arm k scale sample"], ks: Sequence[int], labels: SampleGroups
) -> dict[str, np.ndarray]:
    """Return what ``on`` and ``off`` do apart and together, for each k and task; nothing where they were not run."""
    names = run.arms.names
    if "on" not in names:
        return {}
    on, off = (differences[:, names.index(arm)] for arm in ("on", "off"))
    full = differences[:, names.index("full"), 0].mean(0)  # directions make no difference to it
    captured = np.stack([run.captured[k] for k in ks], axis=1)
    largest = np.full((len(ks), labels.member.shape[1]), np.nan)
    for depth, scale in enumerate(run.scales):
        parts = part_and_rest(on[:, :, depth], off[:, :, depth], full[depth], captured, labels)
        largest = np.where(parts.separable, scale, largest)
    at = run.scales.index(1.0)
    on, off, whole = on[:, :, at], off[:, :, at], full[at]
    parts = part_and_rest(on, off, whole, captured, labels)
    change = effects(whole[None], labels).estimate
    attributed = (on + whole - off) / 2
    has_shares = parts.resolved & parts.separable
    arrays: dict[str, np.ndarray] = {
        "captured": parts.captured,
        **_ends("interaction", parts.interaction),
        **_ends("attributed", effects(attributed, labels)),
        **_ends("excess", parts.excess),
        "excess_p": adjusted_p(attributed - captured * whole, labels),
        "relative_excess": np.where(
            parts.resolved, parts.excess.estimate / np.where(change == 0, np.nan, change), np.nan
        ),
        "resolved": parts.resolved,
        "separable": parts.separable,
        "separable_scale": largest,
    }
    for name in ("share", "efficiency", "sufficiency", "necessity"):
        arrays |= {
            end: np.where(has_shares, values, np.nan) for end, values in _ends(name, getattr(parts, name)).items()
        }
    return arrays


def _effects(differences: Float[np.ndarray, "split arm k ... sample"], labels: SampleGroups) -> Estimate:
    """Return :func:`effects` of arrays with more dimensions, arm by arm."""
    shape = differences.shape[2:-1]
    rows = differences.reshape(*differences.shape[:2], -1, differences.shape[-1])
    arms = [effects(arm, labels) for arm in rows.swapaxes(0, 1)]
    return Estimate(
        *(np.stack([getattr(arm, end).reshape(*shape, -1) for arm in arms]) for end in ("estimate", "low", "high"))
    )


def _ends(name: str, estimate: Estimate) -> dict[str, np.ndarray]:
    return {name: estimate.estimate, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
