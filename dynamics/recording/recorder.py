"""The recorder: captured steps of a training, from the live model to the store. For any training loop.

A guest in the training: it reads parameters and gradients, and what goes wrong in it costs a record, not the training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import xarray as xr
from torch import Tensor, nn

from dynamics.findings import Finding
from dynamics.recording import Schedule, preset_named
from dynamics.recording.changes import BaseWeights, Change, ModelState, change_between
from dynamics.recording.fisher import FisherProbe, momentum_of
from dynamics.recording.live import LiveSpectra
from dynamics.recording.monitor import (
    findings_on_model,
    findings_on_resuming,
    fisher_numbers,
    update_numbers,
    watched_or_refused,
)
from dynamics.recording.schedules import schedule_of
from dynamics.recording.writer import Records, earlier_records, refuse_other_weights, store_path
from dynamics.spectra import raw
from dynamics.spectra.raw import GradientSpectrum
from dynamics.spectra.walk import MatrixSpectra
from dynamics.store.record_writer import read_start
from dynamics.store.results import FOLDER
from dynamics.text import encodable
from probes.gradients import GradientNorms, loss_scale, norms_of
from probes.tasks import Task
from probes.watched import Found, find, is_sharded

#: The recorders of this process that have taken a store, by its path.
_OPEN: WeakValueDictionary[Path, Recorder] = WeakValueDictionary()


@dataclass
class _InFlight:
    """The step that is being captured."""

    step: int
    scaler: Any = None
    scale: float = 1.0
    measured: bool = False  # on every rank alike: measuring takes them all
    gradient: xr.Dataset | None = None  # on the rank that writes


@dataclass(frozen=True)
class _Noticed:
    """A change of what is trained, and the model since."""

    change: Change
    state: ModelState
    found: Found


class Recorder:
    """Records what a training does to a model's weights, at the steps of a schedule.

    Each captured step becomes one file in ``run/dynamics/records/``: singular values of every watched
    matrix's update since the start and since the last captured step, its gradient's norm before and after clipping,
    and by preset the singular values of its gradient and the cosine of consecutive increments.

    What is trained may change: weights that are unfrozen, adapters that are added, switched or started again are taken
    up from the step at which they are noticed, with a finding; what is frozen ends.

    Args:
        run: Run folder; records go into ``run/dynamics/records/``.
        model: The model in training, its adapters in place; in any wrapper (PEFT, DDP, FSDP 2, ``torch.compile``).
        preset: ``"economy"``, ``"standard"`` or ``"full"``: what a record holds, and by default which steps.
        every: Capture every so many steps, instead of the preset's schedule.
        at: Capture these steps.
        schedule: Capture where ``schedule(step)`` is true, see ``recording``. Of several wishes each is granted.
        matrices: Regular expression; only matrices whose name it finds are watched.
        resume_from: The step that the training resumes from: the capture goes on, and later records are dropped.
            ``None``: training begins now, and the model's weights are its start.
        warmup_steps: Of the learning rate; what is warned of allows for them.
        gradients: Whether gradients are recorded; ``False`` where they cannot be read (DeepSpeed ZeRO).
        disk_names: Matrix → its name in saved weights, where that is another; or a function that gives this of the
            names of dense matrices, also of those that are taken up later.
        tasks: Held-out probe samples. With them a record has the Fisher at the start of the increment, K and b, and the
            scores of tasks that have one; one forward-backward pass over all probe samples a captured step.
        batch_size: Samples that the optimizer sees in one step, over all processes and accumulated; for the null of
            concentration. 0: not known.
        notes: Findings about the whole training, to be kept with its records.
        strict: Whether a failure to record raises, instead of one warning and a gap in the records.

    Raises:
        ValueError: If nothing is to be watched, or the preset, the schedule or the regular expression is not one.
        RecordsExist: If the run has records already and does not resume, or resumes from other weights than recorded.
        OSError: If the store cannot be made; what fails later does not raise, unless ``strict``.

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
        batch_size: int = 0,
        notes: Sequence[Finding] = (),
        strict: bool = False,
    ) -> None:
        self.preset = preset_named(preset)
        self._schedule = schedule_of(self.preset, interval=every, steps=at, schedule=schedule)
        found = watched_or_refused(model, matrices)
        self._leads = not _distributed() or dist.get_rank() == 0
        self._takes_part = self._leads or any(is_sharded(p) for each in found.watched for p in each.sources)
        self._gradients, self._strict = gradients, strict
        self._model, self._pattern, self._state = model, matrices, ModelState(model)
        self._bases = BaseWeights(model) if self._leads else None
        self._take_parameters(found)
        self._lost_start = False  # of the increment: no Fisher can be measured there
        self._in_flight: _InFlight | None = None
        self._records: Records | None = None
        self._probe = self._probe_of(model, tasks, found, batch_size, restricted=matrices is not None)
        self._momentum = math.nan
        self.scalars: dict[str, float] = {}
        name = None if schedule is None else getattr(schedule, "__qualname__", type(schedule).__name__)
        wishes = {"every": every, "at": None if at is None else list(map(int, at)), "schedule": name}
        configuration = {"preset": preset, **wishes, "matrices": matrices, "gradients": gradients}
        self._disk_names = disk_names if callable(disk_names) else lambda _: disk_names or {}
        content = {"disk_names": self._named(found), "covered_share": found.covered_share}
        self._open(Path(run), notes, resume_from, warmup_steps, encodable(configuration), content)

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
        """What the model and its records give cause to say, as it stands now."""
        return [] if self._records is None else self._records.findings

    @contextmanager
    def step(self, step: int, optimizer: Any = None, scaler: Any = None) -> Iterator[None]:
        """One optimizer step: everything from the first forward pass to after ``optimizer.step()``.

        Args:
            step: Number of this optimizer step, from 1.
            optimizer: The optimizer, Accelerate's wrapper or not; without it, or with one that is no
                ``torch.optim.Optimizer``, call :meth:`before_optimizer_step` after clipping, or what is known of
                gradients is their norm before clipping.
            scaler: The ``torch.amp.GradScaler``, if the loss is scaled.
        """
        self.before_backward(step, scaler)
        hook = None
        if self._in_flight is not None and optimizer is not None:
            self._momentum = momentum_of(optimizer)
            inner = getattr(optimizer, "optimizer", optimizer)
            if hasattr(inner, "register_step_pre_hook"):  # not every optimizer is one of torch
                hook = inner.register_step_pre_hook(lambda *_: self.before_optimizer_step(optimizer))
        try:
            yield
            self.after_optimizer_step()
        finally:
            if hook is not None:
                hook.remove()
            self._norms.disarm()
            self._in_flight = None

    def before_backward(self, step: int, scaler: Any = None) -> None:
        """To be called before the first forward pass of every optimizer step.

        Unless the step is to be captured, it does no more than look whether something else is trained now.

        Args:
            step: Number of this optimizer step, from 1.
            scaler: The ``torch.amp.GradScaler``, if the loss is scaled.
        """
        self._norms.disarm()
        self._in_flight, self._step = None, step
        captured = self._takes_part and step > self._last and self._schedule(step)
        self._follow(captured=captured)
        if captured:
            self._in_flight = _InFlight(step, scaler, loss_scale(scaler, None))
            if self._gradients:
                self._norms.arm()

    @torch.no_grad()
    def before_optimizer_step(self, optimizer: Any = None) -> None:
        """To be called after clipping and before ``optimizer.step()``; at least of captured steps.

        Args:
            optimizer: The optimizer: for its momentum, and where a loss scaler is in use, which may have unscaled it.
        """
        flight = self._in_flight
        self._follow(captured=False)
        if flight is not None and optimizer is not None:
            self._momentum = momentum_of(optimizer)
        if flight is None or not self._gradients or flight.measured:
            return
        flight.measured = True
        with self._forgiven(flight.step):
            self._norms.disarm()
            scale = loss_scale(flight.scaler, optimizer)
            before, after = self._norms.before_clipping(), self._norms.after_clipping()
            spectra, failures = self._live.gradients(_gradient) if self.preset.gradient_spectra else ({}, {})
            if self._records is not None and failures:
                self._records.unmeasured_gradients(flight.step, failures)
            if self._leads:
                spectra = {name: (values / scale, rank) for name, (values, rank) in spectra.items()}
                norms = self._by_matrix(before, flight.scale), self._by_matrix(after, scale)
                flight.gradient = self._gradient_record(flight.step, *norms, spectra)

    @torch.no_grad()
    def after_optimizer_step(self) -> bool:
        """To be called after ``optimizer.step()``: completes and writes the record of a captured step.

        Returns:
            Whether there is a new record; its numbers are in :attr:`scalars`.
        """
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return False
        self._norms.disarm()
        if self._gradients and not flight.measured:  # nobody said when gradients were clipped, or no step was taken
            with self._forgiven(flight.step):
                before = self._norms.before_clipping()
                if self._leads and before is not None:
                    norms = self._by_matrix(before, flight.scale), self._by_matrix(None, 1.0)
                    flight.gradient = self._gradient_record(flight.step, *norms, {})
        return self._capture(flight.step, flight.gradient)

    @torch.no_grad()
    def record(self, step: int) -> bool:
        """Captures the model as it is after this step, without gradients, unless the step has been captured.

        For moments that matter beside the schedule: from a step with a record, a resumed training goes on without a
        gap.
        """
        return self._takes_part and step > self._last and self._capture(step, None)

    def close(self) -> None:
        """Removes all hooks and gives the store back; what is called afterwards does nothing. Twice does no harm."""
        self._norms.disarm()
        self._in_flight = None
        self._takes_part = False
        try:
            self._annotate()
        finally:
            if self._records is not None:
                self._records.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _capture(self, step: int, gradient: xr.Dataset | None) -> bool:
        self._last, written, noticed = step, False, None
        with self._forgiven(step):
            noticed = self._noticed(captured=True)
            if noticed is not None:
                change = noticed.change
                self._live.lose(totals=change.restarted, increments={*change.restarted, *change.rescaled})
                self._lost_start |= bool(change.restarted)
                self._probe_follows(noticed, moved=True)
            spectra = self._live.measure()
            if self._records is not None and self._live.shapes:
                update = self._update(step, spectra)
                probed = self._probed(step)
                numbers = update_numbers(update, gradient)
                with self._forgiven(step):
                    numbers |= fisher_numbers(probed.get("fisher"))
                self._records.write(step, update, gradient, probed)
                written, self.scalars = True, numbers
                self._advance(step)
        if noticed is not None:
            with self._forgiven(step):
                self._take_up(noticed, step)
        if written:
            self._annotate()
        return written

    def _advance(self, step: int) -> None:
        """The next increment begins at this step."""
        self._from_step = -1  # until there are copies of this step
        self._live.advance()
        if self._probe is not None:
            self._probe.advance()
        self._from_step, self._lost_start = step, False

    def _named(self, found: Found) -> dict[str, Any]:
        """Names on disk of dense matrices."""
        return dict(self._disk_names([each.name for each in found.watched if each.is_dense]))

    def _take_parameters(self, found: Found) -> None:
        self._found = found
        self._parameters = list({id(p): p for each in found.watched for p in each.parameters}.values())
        self._of_matrices = {each.name: each.parameters for each in found.watched}
        self._norms = GradientNorms(self._parameters)

    def _follow(self, *, captured: bool) -> None:
        """Takes up what is trained now, if that has changed, before the step that is under way has moved it."""
        done = max(self._step - 1, self._last)
        with self._forgiven(done):
            if self._takes_part and (noticed := self._noticed(captured=captured)) is not None:
                self._lost_start |= bool(noticed.change.restarted) and self._from_step != done
                self._probe_follows(noticed, moved=False)
                self._norms.disarm()
                self._take_up(noticed, done)

    def _noticed(self, *, captured: bool) -> _Noticed | None:
        """What has changed since the last look; whether base weights were rewritten only where a step is captured."""
        rewritten = []
        if captured and self._bases is not None:
            rewritten = self._bases.rewritten(self._found.watched, self._live.previous)
        if not self._state.has_changed() and not rewritten:
            return None
        state, found = ModelState(self._model), find(self._model, self._pattern)
        change = change_between(self._state, state, self._found, found, rewritten)
        if change:
            return _Noticed(change, state, found)
        self._state = state  # a module that trains nothing
        return None

    @torch.no_grad()
    def _take_up(self, noticed: _Noticed, step: int) -> None:
        """Goes on with what is trained now; it is as it was after this step."""
        change, copied_at = noticed.change, self._from_step
        start = self._live.follow(
            noticed.found.watched,
            step,
            present=noticed.state.parameters,
            rewritten=change.restarted,
            rescaled=change.rescaled,
            copied_at=copied_at,
        )
        self._state = noticed.state
        self._take_parameters(noticed.found)
        if self._bases is not None:
            self._bases.take()
        if self._records is not None:
            self._records.changed(change.findings(step, copied_at), start, self._named(noticed.found))

    def _probe_follows(self, noticed: _Noticed, *, moved: bool) -> None:
        if self._probe is not None:
            watched, restarted = noticed.found.watched, set(noticed.change.restarted)
            self._probe.follow(
                blocks=None if self._pattern is None else [each.name for each in watched if not each.part_of],
                on_host=[parameter for each in watched if each.is_dense for parameter in each.sources],
                rewritten=[id(p) for each in watched if each.name in restarted for p in each.sources],
                moved=moved,
            )

    def _probe_of(
        self, model: nn.Module, tasks: Sequence[Task] | None, found: Found, batch_size: int, *, restricted: bool
    ) -> FisherProbe | None:
        if not tasks or not self._takes_part:
            return None
        dense = [parameter for each in found.watched if each.is_dense for parameter in each.sources]
        blocks = [each.name for each in found.watched if not each.part_of] if restricted else None
        return FisherProbe(model, tasks, blocks=blocks, on_host=dense, batch_size=batch_size)

    def _probed(self, step: int) -> dict[str, xr.Dataset | None]:
        """What the probe samples tell at this step; what goes wrong with them costs nothing else."""
        found: dict[str, xr.Dataset | None] = {}
        if self._probe is not None and self._from_step >= 0 and not self._lost_start:
            with self._forgiven(step):
                found["fisher"] = self._probe.record(step, self._from_step, self._live.increments(), self._momentum)
        if self._probe is not None:
            with self._forgiven(step):
                found["score"] = self._probe.scores(step)
        return found

    def _annotate(self) -> None:
        """Says what the records give cause to."""
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
        """Takes in the model as it is, and opens the store; if that is refused on one rank, it is on all."""
        found = self._found
        self._last = self._from_step = resume_from or 0
        self._step = self._last + 1
        earlier, start = None, None
        with _raised_on_all():
            if resume_from is not None and self._leads:
                earlier = earlier_records(run)
                start = {} if earlier is None else read_start(run / FOLDER)
        start = {} if resume_from is not None and start is None else start
        cosines = self.preset.increment_cosines
        self._live = LiveSpectra(found.watched, start=start, step=self._last, cosines=cosines, leads=self._leads)
        with _raised_on_all():
            spectra = self._live.measure() if resume_from is not None and self._takes_part else {}
            if self._leads:
                goes_on = earlier is not None and refuse_other_weights(
                    earlier, self._last, self._update(self._last, spectra)
                )
                own = findings_on_model(found, gradients=self._gradients) + findings_on_resuming(
                    resume_from, continues=goes_on
                )
                _end_earlier(run, resumes=resume_from is not None)
                self._records = Records(
                    run,
                    notes=[*own, *notes],
                    attributes=attributes,
                    configuration=configuration,
                    warmup_steps=warmup_steps,
                    resume_from=resume_from,
                    earlier=earlier,
                )
                try:
                    self._begin(self._records, resume_from, spectra, goes_on=goes_on)
                except BaseException:
                    self._records.close()
                    raise
                _OPEN[store_path(run)] = self

    def _begin(
        self, records: Records, resume_from: int | None, spectra: Mapping[str, MatrixSpectra], *, goes_on: bool
    ) -> None:
        """Puts down what is needed to go on from here: the start, or a record of the step that is resumed from."""
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
        results = {(step, name): each for name, each in spectra.items()}
        return raw.raw_update({step: (0, self._from_step)}, self._live.shapes, results)

    def _by_matrix(self, squared: Tensor | None, scale: float) -> list[float]:
        """Norm of each matrix's gradient, NaN where there is none to measure."""
        if squared is None:
            return [math.nan] * len(self._of_matrices)
        return [norm / scale for norm in norms_of(squared, self._parameters, list(self._of_matrices.values()))]

    def _gradient_record(
        self, step: int, before: Sequence[float], after: Sequence[float], spectra: Mapping[str, tuple[Tensor, int]]
    ) -> xr.Dataset:
        gradients = {}
        for name, norm_before, norm_after in zip(self._of_matrices, before, after, strict=True):
            # Where the norm is not known, what stands in for the gradient is no gradient of zero.
            spectrum = (None, 0) if math.isnan(norm_after) else spectra.get(name, (None, 0))
            gradients[name] = GradientSpectrum(norm_before, norm_after, *spectrum)
        places = {name: place for name, place in self._live.shapes.items() if name in gradients}
        return raw.raw_gradient(step, places, gradients)

    @contextmanager
    def _forgiven(self, step: int) -> Iterator[None]:
        """What goes wrong inside costs what is being recorded, not the training."""
        try:
            yield
        except Exception as error:
            if self._strict:
                raise
            if self._records is not None:
                self._records.gap(step, f"{type(error).__name__}: {error}")


def _end_earlier(run: Path, *, resumes: bool) -> None:
    """Closes a recorder of this process that an interrupted training left open, as in a notebook.

    Not one whose records the new one is going to be refused for.
    """
    earlier = _OPEN.get(store_path(run))
    if earlier is not None and earlier.is_open and (resumes or not earlier.steps):
        earlier.close()
        warnings.warn(
            f"An earlier recorder of this process had '{store_path(run)}' open; it is closed, and records no more.",
            UserWarning,
            stacklevel=2,
        )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _raised_on_all() -> Iterator[None]:
    """What is refused inside on the first rank is raised on every one, which would else wait for it."""
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


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient, zeros where it has none; that of a sparse embedding is made dense, for the moment."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad if parameter.grad.layout == torch.strided else parameter.grad.to_dense()
