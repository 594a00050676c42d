"""What probe samples are asked at a captured step: the Fisher, scores and losses, interventions, critical sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import xarray as xr
from torch import Tensor, nn

from dynamics.findings import Finding
from dynamics.fisher.concentration import effective_batches
from dynamics.intervention.counterfactuals import ARMS
from dynamics.recording.fisher import FisherProbe, Increment, Interventions, Passing, descent_rate, momentum_of
from dynamics.recording.live import LiveSpectra
from dynamics.recording.loss_probe import LossProbe, outside
from dynamics.recording.probing_ranks import ProbingRanks
from dynamics.recording.schedules import Preset, Schedule, at_no_step, chosen_steps
from probes.tasks import Task
from probes.watched import WatchedModel

#: A ``with`` block that turns an error at a step into a gap in the records.
Forgiven = Callable[[int], AbstractContextManager[None]]
T = TypeVar("T")


class StepProbes:
    """The probe samples of several tasks, and what is measured with them at one captured step after the other.

    Args:
        model: The model in training, in its wrappers.
        tasks: Held-out samples.
        watched: The watched matrices.
        preset: What a record holds.
        restricted: Whether only some matrices are watched.
        begins: Whether training begins now, so that the model's weights are its start.
        batch_size: Samples that the optimizer sees in one step; 0: unknown.
        intervenes: Steps at which to intervene.
        interventions: With what.
        forgiven: What encloses each measurement: one that fails costs nothing else.
        progress: Called with the number of probe samples measured, and of all; then of forward passes over samples.
        ranks: Of a model that FSDP 2 has split: all of them must make and call this together.

    Raises:
        ValueError: If the tasks cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        watched: WatchedModel,
        preset: Preset,
        *,
        restricted: bool,
        begins: bool,
        batch_size: int,
        intervenes: Schedule,
        interventions: Interventions,
        forgiven: Forgiven,
        progress: Callable[[int, int], None],
        ranks: ProbingRanks | None = None,
    ) -> None:
        self._preset, self._restricted, self._ranks = preset, restricted, ranks
        self._intervenes, self._interventions = intervenes, interventions
        self._forgiven, self._progress = forgiven, progress
        probes = self._together(lambda: self._begin(model, tasks, watched, batch_size, begins=begins))
        self._fisher, self._losses = (None, None) if probes is None else probes
        self._lost_start = False  # of the increment: no Fisher can be measured there
        self._momentum = self._rate = math.nan
        self._passing = Passing.through(None)  # until an optimizer is given
        self._sharpness: xr.Dataset | None = None  # of the last step that has one: the next search starts there

    def _begin(
        self, model: nn.Module, tasks: Sequence[Task], watched: WatchedModel, batch_size: int, *, begins: bool
    ) -> tuple[FisherProbe, LossProbe]:
        fisher = FisherProbe(
            model, tasks, blocks=self._blocks(watched), on_host=self._dense(watched), batch_size=batch_size
        )
        others = {name: parameter.detach().clone() for name, parameter in outside(model).items()} if begins else None
        losses = LossProbe(model, tasks, others)
        if begins and self._restricted:  # of matrices that are left out no start is kept
            with self._forgiven(0):
                losses.begin()
        return fisher, losses

    def findings(self) -> list[Finding]:
        """Return what is to be known before training begins; nothing on ranks that follow."""
        return [] if self._fisher is None else self._fisher.findings()

    def take_rates(self, optimizer: Any) -> None:
        """Take note of the optimizer's momentum and learning rates."""
        self._momentum, self._rate = momentum_of(optimizer), descent_rate(optimizer)
        self._passing = Passing.through(optimizer)

    def lose_start(self, reason: str) -> None:
        """Take note of why the model cannot be set back to the start of the training."""
        if self._losses is not None:
            self._losses.lose(reason)

    def follow(self, watched: WatchedModel, restarted: Collection[str], step: int, *, moved: bool, stale: bool) -> None:
        """Go on with other matrices.

        Args:
            watched: The matrices.
            restarted: Those that begin anew.
            step: The last step done.
            moved: Whether the new weights have been trained since the last captured step.
            stale: Whether weights at the start of the increment are lost with what was restarted.
        """
        self._lost_start |= stale and bool(restarted)
        self.lose_start(f"what is trained changed after step {step}")
        self._together(lambda: self._follow(watched, restarted, moved=moved))

    def _follow(self, watched: WatchedModel, restarted: Collection[str], *, moved: bool) -> None:
        assert self._fisher is not None
        anew = [p for matrix in watched.watched if matrix.name in restarted for p in matrix.sources]
        self._fisher.follow(
            blocks=self._blocks(watched),
            on_host=self._dense(watched),
            rewritten=[id(self._probed_as(parameter)) for parameter in anew],
            moved=moved,
        )

    def measure(self, live: LiveSpectra, step: int, from_step: int) -> dict[str, xr.Dataset | None]:
        """Return what the probe samples give at a step, by group; nothing on ranks that follow.

        Args:
            live: The watched matrices.
            step: The step.
            from_step: Where the increment began; −1 if that is unknown.
        """
        return self._together(lambda: self._measure(live, step, from_step), live.gathered) or {}

    def _measure(self, live: LiveSpectra, step: int, from_step: int) -> dict[str, xr.Dataset | None]:
        assert self._fisher is not None
        assert self._losses is not None
        groups: dict[str, xr.Dataset | None] = {}
        increment = None
        if from_step >= 0 and not self._lost_start:
            with self._forgiven(step):
                batches = effective_batches(max(step - from_step, 1), from_step, self._momentum)
                passing = self._passing._replace(batches=batches)
                increment = self._fisher.measure(live.increments(), self._progress, passing)
                groups["fisher"] = self._fisher.record(increment, step, from_step, self._momentum)
        if increment is not None and self._intervenes(step):
            with self._forgiven(step):
                groups["intervention"] = self._fisher.intervene(
                    increment, self._interventions, step, from_step, self._progress
                )
        if increment is not None and self._preset.sharpness:
            with self._forgiven(step):
                groups["sharpness"] = self._sharpness_along(increment, step, from_step)
        with self._forgiven(step):
            groups["score"] = self._fisher.scores(step)
        with self._forgiven(step):
            groups["loss"] = self._losses.record(
                step, lambda: (self._start_values(live), live.totals()), predicts=self._preset.predictions
            )
        return groups

    def advance(self) -> None:
        """Begin the next increment with the weights as they are."""
        if self._fisher is not None:
            self._fisher.advance()
        if self._ranks is not None:
            self._ranks.forget()
        self._lost_start = False

    def _start_values(self, live: LiveSpectra) -> list[tuple[nn.Parameter, Tensor]]:
        pairs = ((self._probed_as(parameter), value) for parameter, value in live.start_values())
        return [(parameter, value.to(parameter.dtype)) for parameter, value in pairs]

    def _sharpness_along(self, increment: Increment, step: int, from_step: int) -> xr.Dataset | None:
        """Return the critical sharpness where the increment began; ``None`` where the increment is not wholly known."""
        assert self._fisher is not None
        if increment.changes is None or increment.unknown:
            return None
        self._sharpness = self._fisher.sharpness(
            increment, step, from_step, self._sharpness, rate=self._rate, progress=self._progress
        )
        return self._sharpness

    def _blocks(self, watched: WatchedModel) -> list[str] | None:
        return [matrix.name for matrix in watched.watched if not matrix.part_of] if self._restricted else None

    def _dense(self, watched: WatchedModel) -> list[nn.Parameter]:
        return [self._probed_as(p) for matrix in watched.watched if matrix.is_dense for p in matrix.sources]

    def _probed_as(self, parameter: nn.Parameter) -> nn.Parameter:
        return parameter if self._ranks is None else self._ranks.stand_in(parameter)

    def _together(self, function: Callable[[], T], present: Mapping[int, Tensor] | None = None) -> T | None:
        """Return what a function that probes returns; ``None`` on ranks that only hand over their shards for it."""
        return function() if self._ranks is None else self._ranks.together(function, present)


def chosen_interventions(
    tasks: Sequence[Task] | None,
    intervene: int | Sequence[int] | Schedule | None,
    arms: Sequence[str] | None,
    k: int | Sequence[int] | None,
) -> tuple[Schedule, Interventions]:
    """Return at which steps to intervene, and with what; see :class:`dynamics.Recorder`.

    Raises:
        ValueError: If there are no tasks for it, or a choice is invalid.
    """
    if intervene is None:
        if arms is not None or k is not None:
            raise ValueError("Expected intervene with arms and k, got none. Pass intervene=500, or a list of steps.")
        return at_no_step, Interventions()
    if not tasks:
        raise ValueError(
            "Expected tasks with intervene, got none: their samples show what a part of an update does. Pass "
            "tasks=[probes.Task(…)]."
        )
    return chosen_steps(intervene), Interventions(ARMS if arms is None else arms, k)
