"""The recorder: captured steps of a training, from the live model to the store. For any training loop.

A guest in the training: it reads parameters and gradients, and what goes wrong in it costs a record, not the training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import xarray as xr
from torch import nn

from dynamics.findings import Finding
from dynamics.recording import Schedule, either, preset_named
from dynamics.recording.changes import BaseWeights, Change, ModelState, change_between
from dynamics.recording.deepspeed import Zero, is_zero, needs_all_ranks
from dynamics.recording.live import LiveSpectra
from dynamics.recording.loss_probe import LATE, starts_at_zero
from dynamics.recording.meeting import Meeting, RanksApart
from dynamics.recording.monitor import (
    findings_on_model,
    findings_on_resuming,
    fisher_numbers,
    intervention_numbers,
    update_numbers,
    watched_or_refused,
)
from dynamics.recording.probing_ranks import ProbingRanks
from dynamics.recording.routing import RoutingRecorder, exchange_of_ranks, routing_numbers
from dynamics.recording.schedules import schedule_of
from dynamics.recording.step_gradients import StepGradients
from dynamics.recording.step_probes import StepProbes, chosen_interventions
from dynamics.recording.writer import Records, earlier_records, refuse_other_weights, store_path
from dynamics.spectra import raw
from dynamics.spectra.walk import MatrixSpectra
from dynamics.store.record_writer import read_start
from dynamics.store.results import FOLDER
from dynamics.text import encodable
from probes.sharded import reshard
from probes.tasks import Task
from probes.watched import WatchedModel, find, is_sharded

#: The recorders of this process that have taken a store, by its path.
_OPEN: WeakValueDictionary[Path, Recorder] = WeakValueDictionary()


@dataclass(frozen=True)
class _Transition:
    """A change of what is trained, and the model since."""

    change: Change
    state: ModelState
    watched: WatchedModel


class Recorder:
    """Record what a training does to a model's weights, at the steps of a schedule.

    Each captured step becomes one file in ``run/dynamics/records/``: singular values of every watched
    matrix's update since the start and since the last captured step, its gradient's norm before and after clipping,
    and by preset the singular values of its gradient and the cosine of consecutive increments. Of mixtures of experts
    it has the number of tokens that each router sent to each expert.

    The set of trained parameters may change: weights that are unfrozen and adapters that are added, switched or
    restarted are recorded from the step at which the change is noticed, with a finding; what is frozen ends.

    Args:
        run: Run folder; records go into ``run/dynamics/records/``.
        model: The model in training, its adapters in place; in any wrapper (PEFT, DDP, FSDP 2, ``torch.compile``), or
            DeepSpeed's engine. Under FSDP 2 and ZeRO every rank needs a recorder.
        preset: ``"economy"``, ``"standard"`` or ``"full"``: what a record holds, and by default which steps.
        every: Capture every so many steps instead of the preset's.
        at: Capture these steps.
        schedule: Capture where ``schedule(step)`` is true, see ``dynamics.recording``; several choices add up.
        matrices: Regular expression; only matrices whose name matches are watched.
        resume_from: The step that the training resumes from: recording continues, and later records are dropped.
            ``None``: training begins now, and the model's weights are its start.
        warmup_steps: Of the learning rate; warnings allow for them.
        gradients: Whether gradients are recorded; ``False`` where they cannot be read.
        disk_names: Matrix → its name in saved weights, where that differs; or a function that returns this for the
            names of dense matrices, including those that are trained later.
        tasks: Held-out probe samples. With them a record has the Fisher at the start of the increment, K and b, the
            scores of tasks that have one, and the losses of all samples; one forward-backward pass over all probe
            samples and one forward pass a captured step. ``"full"`` adds what gradients at the start of the training
            say of the losses: two passes forward and backward, and two forward. Where K
            of every block would take more than 64 MiB a record, it holds only that of all together, and a warning says
            so; choose ``matrices`` (``"."``: all) to record theirs as well. The preset ``"full"`` records critical
            sharpness, too: about eight forward passes for all samples together, and as many for each task along each
            task's gradient.
        intervene: Steps at which parts of the increment are run on the probe samples, too, to see which of them lower
            the loss: every so many steps, a list of steps, or a schedule. These steps are captured. With the default
            arms such a step takes 25 forward passes over the probe samples and two forward and backward.
        arms: Which parts, as for :func:`dynamics.counterfactuals`; only with ``intervene``.
        k: In how many directions, likewise.
        batch_size: Samples that the optimizer sees in one step, over all processes and accumulated; for the null of
            concentration. 0: unknown.
        notes: Findings about the whole training, kept with its records.
        strict: Raise if recording fails, instead of one warning and a gap in the records.
        optimizer: Under DeepSpeed ZeRO-1 and 2, if the model is not DeepSpeed's engine: ``engine.optimizer``,
            without which gradients cannot be read.
        progress: Called with the number of probe samples measured at a captured step, and of all; then, if it is
            intervened on, with the number of forward passes over samples.

    Raises:
        ValueError: If there is nothing to watch, or the preset, the schedule or the regular expression is invalid; if
            there is something to intervene with but no tasks, or an arm is unknown; under ZeRO-3 with tasks, or where
            its weights cannot be put together.
        RecordsExist: If the run has records already and does not resume, or resumes from other weights than recorded.
        OSError: If the records cannot be written at the start; later failures only raise with ``strict``.

    Example: a plain training loop::

        with dynamics.Recorder("runs/mine", model) as recorder:
            for step, batch in enumerate(loader, start=1):
                with recorder.step(step, optimizer):
                    loss(model, batch).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
    """

    def __init__(
        self,
        run: str | PathLike[str],
        model: nn.Module,
        *,
        preset: str = "standard",
        every: int | None = None,
        at: Sequence[int] | None = None,
        schedule: Schedule | None = None,
        matrices: str | None = None,
        resume_from: int | None = None,
        warmup_steps: int = 0,
        gradients: bool = True,
        disk_names: Mapping[str, Any] | Callable[[Sequence[str]], Mapping[str, Any]] | None = None,
        tasks: Sequence[Task] | None = None,
        intervene: int | Sequence[int] | Schedule | None = None,
        arms: Sequence[str] | None = None,
        k: int | Sequence[int] | None = None,
        batch_size: int = 0,
        notes: Sequence[Finding] = (),
        strict: bool = False,
        optimizer: Any = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.preset = preset_named(preset)
        self._schedule = schedule_of(self.preset, interval=every, steps=at, schedule=schedule)
        self._intervenes, interventions = chosen_interventions(tasks, intervene, arms, k)
        self._intervention_due = intervene is None  # whether a step came at which to intervene
        if intervene is not None:
            self._schedule = either(self._schedule, self._intervenes)
        reshard(model)  # parameters are told by their identity
        watched = watched_or_refused(model, matrices)
        self._zero = Zero.of(model, optimizer)
        if is_zero(model) and self._zero is None:
            gradients = False
        if self._zero is None and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                "Expected parameters that can be read, got those of DeepSpeed ZeRO-3 without their optimizer. Make the "
                "recorder after deepspeed.initialize, and install deepspeed>=0.19. Or use FSDP 2."
            )
        self._leads = not _distributed() or dist.get_rank() == 0
        gathers = any(needs_all_ranks(p) for matrix in watched.watched for p in matrix.sources)
        gathers |= bool(tasks) and any(map(is_sharded, model.parameters()))
        self._takes_part = self._leads or gathers
        of_all = Meeting.of_all_ranks if gathers and _distributed() else lambda: None
        self._meeting: Meeting | None = of_all() if self._zero is None else self._zero.meeting
        self._strict = strict
        self._model, self._pattern, self._state = model, matrices, ModelState(model)
        # Not where ranks gather together: what is noticed there all must notice.
        self._bases = BaseWeights(model) if self._leads and self._meeting is None else None
        self._watched = watched
        self._in_flight: int | None = None  # the step that is being captured
        self._reads_gradients, self._batch_size = gradients, float(batch_size) or math.nan
        self._gradients: StepGradients | None = None
        self._told_to_reduce = False  # whether it was said that norms before clipping may be of one process
        self._routing = RoutingRecorder(model, exchange_of_ranks())
        self._records: Records | None = None
        self._probes: StepProbes | None = None
        with _raised_on_all():
            if tasks and (self._leads or any(map(is_sharded, model.parameters()))):
                self._probes = StepProbes(
                    model,
                    tasks,
                    watched,
                    self.preset,
                    restricted=matrices is not None,
                    begins=resume_from is None,
                    batch_size=batch_size,
                    intervenes=self._intervenes,
                    interventions=interventions,
                    forgiven=partial(self._forgiven, nested=True),
                    progress=progress,
                    ranks=None if self._meeting is None else ProbingRanks.of(model, self._meeting),
                )
        probe_findings = [] if self._probes is None else self._probes.findings()
        for finding in probe_findings:
            warnings.warn(str(finding), UserWarning, stacklevel=2)
        self.scalars: dict[str, float] = {}
        choices = {"every": every, "at": None if at is None else list(map(int, at)), "schedule": _named(schedule)}
        configuration = {"preset": preset, **choices, "matrices": matrices, "gradients": gradients}
        if intervene is not None:
            configuration |= {"intervene": _named(intervene), **asdict(interventions)}
        self._disk_names = disk_names if callable(disk_names) else lambda _: disk_names or {}
        content = {"disk_names": self._named(watched), "covered_share": watched.covered_share}
        self._open(Path(run), [*probe_findings, *notes], resume_from, warmup_steps, encodable(configuration), content)

    @property
    def steps(self) -> list[int]:
        """The steps recorded so far; empty on ranks that do not write."""
        return [] if self._records is None else self._records.steps

    @property
    def is_open(self) -> bool:
        """Whether it has a store and has not been closed."""
        return self._takes_part and self._records is not None

    @property
    def findings(self) -> list[Finding]:
        """The findings on the model and its records, as they stand now."""
        return [] if self._records is None else self._records.findings

    @contextmanager
    def step(self, step: int, optimizer: Any = None, scaler: Any = None) -> Iterator[None]:
        """Enclose one optimizer step: everything from the first forward pass to after ``optimizer.step()``.

        Under DeepSpeed: all ``engine.backward`` and ``engine.step`` of one optimizer step.

        Args:
            step: Number of this optimizer step, from 1.
            optimizer: The optimizer, Accelerate's wrapper or not. Without it, or with one that is no
                ``torch.optim.Optimizer``, call :meth:`before_optimizer_step` after clipping; otherwise only the
                norms of gradients before clipping are recorded. Not needed under DeepSpeed.
            scaler: The ``torch.amp.GradScaler``, if the loss is scaled.
        """
        self.before_backward(step, scaler)
        hook = None
        if self._in_flight is not None and optimizer is not None:
            self._take_rates(optimizer)
            inner = getattr(optimizer, "optimizer", optimizer)
            if self._zero is None and hasattr(inner, "register_step_pre_hook"):  # not every optimizer is one of torch
                hook = inner.register_step_pre_hook(lambda *_: self.before_optimizer_step(optimizer))
        try:
            yield
            self.after_optimizer_step()
        finally:
            if hook is not None:
                hook.remove()
            self._disarm()
            self._in_flight = None

    def before_backward(self, step: int, scaler: Any = None) -> None:
        """Call this before the first forward pass of every optimizer step.

        Unless the step is captured, it only checks whether the set of trained parameters has changed.

        Args:
            step: Number of this optimizer step, from 1.
            scaler: The ``torch.amp.GradScaler``, if the loss is scaled.
        """
        self._disarm()
        self._in_flight, self._step = None, step
        due = step > self._last and self._schedule(step)
        captures = self._takes_part and due
        self._follow(captures=captures)
        if captures or (due and not self._leads):
            with self._forgiven(step):
                self._routing.arm(step)
        if captures:
            self._in_flight = step
            if self._gradients is not None:
                self._gradients.arm(scaler, self._before_zero_steps)

    def before_clipping(self) -> None:
        """Call this before clipping if the loop itself reduces gradients over processes: only then are they whole.

        DDP, FSDP 2 and DeepSpeed reduce them within the backward pass, at whose end their norms are taken. A loop that
        reduces them later and does not call this records norms of one process alone; finding OD325 says so where
        gradients of different matrices changed by different factors in between.
        """
        if self._in_flight is not None and self._gradients is not None:
            with self._forgiven(self._in_flight):
                self._gradients.take_norms()

    @torch.no_grad()
    def before_optimizer_step(self, optimizer: Any = None) -> None:
        """Call this after clipping and before ``optimizer.step()``, at least on captured steps.

        Args:
            optimizer: The optimizer: for its momentum, and where a loss scaler is in use, which may have unscaled it.
        """
        self._follow(captures=False)
        if self._in_flight is not None and optimizer is not None:
            self._take_rates(optimizer)
        if self._zero is None:
            self._read_gradients(optimizer)

    @torch.no_grad()
    def after_optimizer_step(self) -> bool:
        """Call this after ``optimizer.step()``: it completes and writes the record of a captured step.

        Returns:
            Whether there is a new record; its numbers are in :attr:`scalars`.
        """
        step, self._in_flight = self._in_flight, None
        if not self._leads:
            self._routing.send()
        if step is None:
            return False
        self._disarm()
        routing = self._routed(step)
        gradient = None
        if self._gradients is not None:
            with self._forgiven(step):
                self._meet()
                gradient = self._gradients.record(step)
        return self._capture(step, gradient, routing)

    @torch.no_grad()
    def record(self, step: int) -> bool:
        """Capture the model as it is after this step, without gradients, unless the step has been captured.

        For moments that matter beside the schedule: from a step with a record, a resumed training continues without a
        gap.
        """
        return self._takes_part and step > self._last and self._capture(step, None)

    def close(self) -> None:
        """Remove all hooks and close the records; later calls do nothing, and closing twice does no harm."""
        self._disarm()
        self._routing.close()
        self._in_flight = None
        self._takes_part = False
        try:
            self._note_missing_intervention()
            self._annotate()
        finally:
            if self._records is not None:
                self._records.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _disarm(self) -> None:
        self._routing.disarm()
        if self._gradients is not None:
            self._gradients.disarm()

    @torch.no_grad()
    def _before_zero_steps(self) -> None:
        if self._zero is not None and self._in_flight is not None:
            self._take_rates(self._zero.optimizer)
            self._read_gradients(self._zero.optimizer)

    def _read_gradients(self, optimizer: Any) -> None:
        if self._gradients is None or self._in_flight is None:
            return
        with self._forgiven(self._in_flight):
            self._meet()
            failures = self._gradients.read(optimizer)
            if self._records is not None and failures:
                self._records.unmeasured_gradients(self._in_flight, failures)
            if self._records is not None and not self._told_to_reduce:
                finding = self._gradients.unreduced(self._in_flight)
                if finding is not None:
                    self._told_to_reduce = True
                    self._records.note(finding)

    def _capture(self, step: int, gradient: xr.Dataset | None, routing: xr.Dataset | None = None) -> bool:
        if not self._takes_part:  # since a rank was missing in this step
            return False
        self._last, written, transition = step, False, None
        with self._forgiven(step):
            with nullcontext() if self._meeting is None else self._meeting.agreed():
                transition = self._transition(captures=True)
                if transition is not None:
                    change = transition.change
                    self._live.lose(totals=change.restarted, increments={*change.restarted, *change.rescaled})
            if transition is not None and self._probes is not None:
                self._probes.follow(transition.watched, transition.change.restarted, step, moved=True, stale=True)
            with nullcontext() if self._meeting is None else self._meeting.agreed():
                spectra = self._live.measure()
            probed = self._probed(step) if self._live.shapes else {}
            if self._records is not None and self._live.shapes:
                update = self._update(step, spectra)
                probed |= {"routing": routing}
                numbers = update_numbers(update, gradient) | routing_numbers(routing)
                with self._forgiven(step):
                    numbers |= fisher_numbers(probed.get("fisher"))
                    numbers |= intervention_numbers(probed.get("intervention"))
                self._records.write(step, update, gradient, probed)
                written, self.scalars = True, numbers
                self._advance(step)
        if transition is not None:
            with self._forgiven(step):
                self._take_up(transition, step)
        if written:
            self._annotate()
        return written

    def _advance(self, step: int) -> None:
        """Begin the next increment at this step."""
        self._from_step = -1  # until there are copies of this step
        self._live.advance()
        if self._probes is not None:
            self._probes.advance()
        self._from_step = step

    def _named(self, watched: WatchedModel) -> dict[str, Any]:
        """Return the names on disk of dense matrices."""
        return dict(self._disk_names([matrix.name for matrix in watched.watched if matrix.is_dense]))

    def _follow(self, *, captures: bool) -> None:
        """Follow a change of what is trained before the present step moves it."""
        done = max(self._step - 1, self._last)
        with self._forgiven(done):
            if self._takes_part and (transition := self._transition(captures=captures)) is not None:
                if self._probes is not None:
                    restarted, stale = transition.change.restarted, self._from_step != done
                    self._probes.follow(transition.watched, restarted, done, moved=False, stale=stale)
                self._disarm()
                self._take_up(transition, done)

    def _transition(self, *, captures: bool) -> _Transition | None:
        """Return what has changed since the last check; base weights are only checked where a step is captured."""
        rewritten = []
        if captures and self._bases is not None:
            rewritten = self._bases.rewritten(self._watched.watched, self._live.previous)
        if not self._state.has_changed() and not rewritten:
            return None
        state, watched = ModelState(self._model), find(self._model, self._pattern)
        change = change_between(self._state, state, self._watched, watched, rewritten)
        if change:
            return _Transition(change, state, watched)
        self._state = state  # a module that trains nothing
        return None

    @torch.no_grad()
    def _take_up(self, transition: _Transition, step: int) -> None:
        """Continue with what is trained now; it is as it was after this step."""
        change, copied_at = transition.change, self._from_step
        self._meet()
        start = self._live.follow(
            transition.watched.watched,
            step,
            present=transition.state.parameters,
            rewritten=change.restarted,
            rescaled=change.rescaled,
            copied_at=copied_at,
        )
        self._state = transition.state
        self._watched = transition.watched
        if self._gradients is not None:
            self._gradients.watch(transition.watched)
        if self._bases is not None:
            self._bases.take()
        if self._records is not None:
            self._records.changed(change.findings(step, copied_at), start, self._named(transition.watched))

    def _probed(self, step: int) -> dict[str, xr.Dataset | None]:
        """Return what the probe samples give at this step."""
        self._intervention_due |= self._intervenes(step)
        return {} if self._probes is None else self._probes.measure(self._live, step, self._from_step)

    def _routed(self, step: int) -> xr.Dataset | None:
        """Return what routers chose in this step, on the rank that writes."""
        routing = None
        if self._records is not None:
            with self._forgiven(step):
                routing = self._routing.record()
                for finding in self._routing.findings():
                    self._records.note(finding)
        return routing

    def _meet(self) -> None:
        """Wait for the other ranks where something is about to be gathered; under ZeRO each gathering does."""
        if self._meeting is not None and self._zero is None:
            self._meeting.meet()

    def _take_rates(self, optimizer: Any) -> None:
        if self._probes is not None:
            self._probes.take_rates(optimizer)

    def _note_missing_intervention(self) -> None:
        """Note that the training ended before the first step at which to intervene."""
        if self._records is None or self._intervention_due or not self.steps:
            return
        self._intervention_due = True
        message = (
            f"No update was intervened on: the training ended at step {self._last:,}, before the first step that "
            "intervene asks for."
        )
        remedy = "Ask for earlier steps, such as intervene=[100], or run the command with --probe and --intervene."
        with self._forgiven(self._last):
            self._records.note(Finding("OD415", message, remedy, step=self._last))

    def _annotate(self) -> None:
        """Keep the findings beside the records up to date."""
        with self._forgiven(self._last):
            if self._records is not None:
                self._records.annotate()

    def _open(
        self,
        run: Path,
        notes: Sequence[Finding],
        resume_from: int | None,
        warmup_steps: int,
        configuration: Mapping[str, Any],
        attributes: Mapping[str, Any],
    ) -> None:
        """Take in the model and open the records; if one rank refuses, all do."""
        watched = self._watched
        self._last = self._from_step = resume_from or 0
        self._step = self._last + 1
        earlier, start = None, None
        with _raised_on_all():
            if resume_from is not None and self._leads:
                earlier = earlier_records(run)
                start = {} if earlier is None else read_start(run / FOLDER)
                of_before = {} if earlier is None else earlier.records
                self._intervention_due |= any(
                    "intervention" in record for step, record in of_before.items() if step <= resume_from
                )
        start = {} if resume_from is not None and start is None else start
        cosines = self.preset.increment_cosines
        self._live = LiveSpectra(
            watched.watched, start=start, step=self._last, cosines=cosines, leads=self._leads, zero=self._zero
        )
        if self._reads_gradients:
            self._gradients = StepGradients(
                watched,
                self._live,
                zero=self._zero,
                spectra=self.preset.gradient_spectra,
                leads=self._leads,
                batch_size=self._batch_size,
            )
        with _raised_on_all():
            spectra = self._live.measure() if resume_from is not None and self._takes_part else {}
            if self._leads:
                goes_on = earlier is not None and refuse_other_weights(
                    earlier, self._last, self._update(self._last, spectra)
                )
                findings = findings_on_model(watched, gradients=self._reads_gradients) + findings_on_resuming(
                    resume_from, continues=goes_on
                )
                _end_earlier(run, resumes=resume_from is not None)
                self._records = Records(
                    run,
                    notes=[*findings, *notes],
                    attributes=attributes,
                    configuration=configuration,
                    warmup_steps=warmup_steps,
                    resume_from=resume_from,
                    earlier=earlier,
                )
                self._lose_start(self._records, knows_start=resume_from is None or earlier is not None)
                try:
                    self._begin(self._records, resume_from, spectra, goes_on=goes_on)
                except BaseException:
                    self._records.close()
                    raise
                _OPEN[store_path(run)] = self
        if self._meeting is not None:
            self._meeting.begin()

    def _lose_start(self, records: Records, *, knows_start: bool) -> None:
        """Take note of what happened before the training was resumed: it cannot be set back to its start then."""
        if self._probes is None:
            return
        for change in records.changes:
            self._probes.lose_start(f"what is trained changed after step {change.step}")
        if not knows_start and not starts_at_zero(self._model):
            self._probes.lose_start(LATE)

    def _begin(
        self, records: Records, resume_from: int | None, spectra: Mapping[str, MatrixSpectra], *, goes_on: bool
    ) -> None:
        """Write what is needed to continue from here: the start, or a record of the step that is resumed from."""
        if resume_from is None:
            records.write_start(self._live.start)
            return
        if not goes_on:
            self._from_step = -1
            records.write(resume_from, self._update(resume_from, spectra), None)
            records.annotate()
            self._from_step = resume_from
        self._live.advance()

    def _update(self, step: int, spectra: Mapping[str, MatrixSpectra]) -> xr.Dataset:
        results = {(step, name): matrix for name, matrix in spectra.items()}
        return raw.raw_update({step: (0, self._from_step)}, self._live.shapes, results)

    @contextmanager
    def _forgiven(self, step: int, *, nested: bool = False) -> Iterator[None]:
        """Turn an error inside into a gap in the records, so that training goes on; where ranks are apart, they end.

        Args:
            step: The step.
            nested: Whether the caller deals with ranks that are apart.
        """
        try:
            yield
        except RanksApart as error:
            if nested:
                raise
            self._takes_part, self._in_flight = False, None
            self._disarm()
            if self._strict:
                raise
            if self._records is not None:
                self._records.end(step, str(error))
        except Exception as error:
            if self._strict:
                raise
            if self._records is not None:
                self._records.gap(step, f"{type(error).__name__}: {error}")


def _named(choice: Any) -> Any:
    """Return a choice as a record notes it: a schedule by its name."""
    if callable(choice):
        return getattr(choice, "__qualname__", type(choice).__name__)
    return list(map(int, choice)) if isinstance(choice, Sequence) else choice and int(choice)


def _end_earlier(run: Path, *, resumes: bool) -> None:
    """Close a recorder of this process that an interrupted training left open, as in a notebook.

    One that has records stays open unless the training resumes: the new recorder is refused for them.
    """
    earlier = _OPEN.get(store_path(run))
    if earlier is not None and earlier.is_open and (resumes or not earlier.steps):
        earlier.close()
        warnings.warn(
            f"An earlier recorder of this process had '{store_path(run)}' open. It is closed and records no more.",
            UserWarning,
            stacklevel=2,
        )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _raised_on_all() -> Iterator[None]:
    """Raise what the first rank raises inside on every rank, which would otherwise wait for it."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if _distributed() and dist.get_world_size() > 1:
        box = [error]
        dist.broadcast_object_list(box, src=0)
        error = box[0] or error
    if error is not None:
        raise error
