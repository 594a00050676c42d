"""The callbacks of a ``transformers.Trainer``: one drives a :class:`~dynamics.Recorder`, one projects the updates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import SaveStrategy

from dynamics.findings import Finding
from dynamics.intervention.projection import StepProjection, require_projectable
from dynamics.recording import Schedule, at_no_step, either, preset_named
from dynamics.recording.deepspeed import is_zero
from dynamics.recording.disk_names import disk_names
from dynamics.recording.recorder import Recorder
from dynamics.recording.step_probes import chosen_interventions
from dynamics.text import some
from probes.tasks import Task, require_names
from probes.undisturbed import undisturbed

#: What the recorder's numbers are called in the training log.
PREFIX = "dynamics/"
#: Training sets of at most so many samples are read when training begins, to see that no probe sample is among them.
COMPARED = 10_000
#: Seconds after which the probe samples of a captured step have a progress bar.
SLOW = 3.0


class DynamicsCallback(TrainerCallback):
    """Record what training does to the weights, at the steps of a schedule and wherever a checkpoint is saved.

    The records go into ``out_dir/dynamics/records/``; read them with ``dynamics.open_run(out_dir)`` or analyse them
    with ``python -m dynamics.analyze out_dir``. A summary of each goes into the training log as ``dynamics/…``.

    Training is the same, bit for bit, with and without the callback. If recording fails, training goes on: there is one
    warning and a gap in the records.

    Args:
        out_dir: Run folder, best the Trainer's ``output_dir``. Each trial of a hyperparameter search is a run,
            ``out_dir/run-<number>``, where its checkpoints are.
        tasks: Held-out probe samples, each a :class:`probes.Task`: with them each captured step also has the Fisher at
            the start of its increment, the tasks' scores, and the losses of all samples. Samples that are also in the
            training set are refused, where that can be told. A step that takes long has a progress bar, unless
            ``disable_tqdm``.
        intervene: Steps at which parts of the update are run on the probe samples, too, to see which of them lower the
            loss: every so many steps, a list of steps, or a schedule. They are captured. With the default arms such a
            step takes 25 forward passes over the probe samples and two forward and backward.
        arms: Which parts, as for :func:`dynamics.counterfactuals`.
        k: In how many directions, as for :func:`dynamics.counterfactuals`.
        preset: ``"economy"``: spectra of updates and gradient norms; ``"standard"``: spectra of gradients as well;
            ``"full"``: also cosines of consecutive increments, for a second copy of the watched factors, and with tasks
            predictions of their losses, for four passes over the samples, two of them with a backward pass.
        every: Capture every so many steps instead of the preset's.
        at: Capture these steps.
        schedule: Capture where ``schedule(step)`` is true, see ``dynamics.recording``.
        matrices: Regular expression; only matrices whose name matches are watched.
        strict: Raise if recording fails.

    Raises:
        ValueError: If the preset or an arm is unknown, something else is among the tasks, or ``intervene`` has no
            tasks; when training begins, if there is nothing to watch.
        RecordsExist: When training begins, if the run has records and the training does not resume.

    Example: ``attach`` sends the numbers to every integration of ``report_to``, too::

        callback = DynamicsCallback("runs/imax", preset="standard")
        trainer = Trainer(model, TrainingArguments("runs/imax"), train_dataset=data, callbacks=[callback])
        callback.attach(trainer)
        trainer.train()
    """

    def __init__(
        self,
        out_dir: str | PathLike[str],
        tasks: Task | Sequence[Task] | None = None,
        *,
        intervene: int | Sequence[int] | Schedule | None = None,
        arms: Sequence[str] | None = None,
        k: int | Sequence[int] | None = None,
        preset: str = "standard",
        every: int | None = None,
        at: Sequence[int] | None = None,
        schedule: Schedule | None = None,
        matrices: str | None = None,
        strict: bool = False,
    ) -> None:
        tasks = (tasks,) if isinstance(tasks, Task) else tasks
        if tasks:
            require_names(tasks)
        chosen_interventions(tasks, intervene, arms, k)  # refused here, not when training begins
        default = preset_named(preset).schedule if every is None and at is None else at_no_step
        self._schedule = default if schedule is None else schedule
        self._out_dir = out_dir
        self._settings: dict[str, Any] = {
            "preset": preset,
            "every": every,
            "at": at,
            "matrices": matrices,
            "tasks": tasks,
            "intervene": intervene,
            "arms": arms,
            "k": k,
            "strict": strict,
        }
        self._trainer: Trainer | None = None
        self._trials = 0  # of a hyperparameter search
        self._batch_size: int | None = None  # of a training that has taken a step and has not ended
        self._waiting: dict[str, float] = {}
        self._bar: Any = None  # of the probe samples
        self.recorder: Recorder | None = None

    def attach(self, trainer: Trainer) -> DynamicsCallback:
        """Put the callback before the Trainer's reporters, so that they see its numbers.

        A Trainer does not introduce itself to callbacks, and calls the user's after the reporters. Without ``attach``
        the numbers only appear in ``trainer.state.log_history``, and a custom loss (``compute_loss_func``, a subclass)
        is not noticed.

        Args:
            trainer: It may have the callback already.

        Returns:
            The callback.
        """
        _before_reporters(trainer, self)
        self._trainer = trainer
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in the model and open the store.

        Raises:
            ValueError: If there is nothing to watch.
            RecordsExist: If the run has records and the training does not resume.
        """
        self.close()
        self._waiting = {}
        model = kwargs["model"]
        _refuse_overlap(model, self._settings["tasks"] or (), kwargs.get("train_dataloader"))
        resume_from = state.global_step or self._restarted(args, state)
        self.recorder = Recorder(
            self._run(state, begins=resume_from is None),
            model,
            schedule=either(self._schedule, lambda step: _is_saved(step, args, state)),
            resume_from=resume_from,
            warmup_steps=args.get_warmup_steps(state.max_steps),
            gradients=is_zero(model) or not _keeps_gradients_away(args, kwargs.get("optimizer")),
            disk_names=lambda names: _disk_names(model, names),
            optimizer=kwargs.get("optimizer"),
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            notes=self._findings_on_loss(args),
            progress=_nothing if args.disable_tqdm else self._show,
            **self._settings,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hook on to the backward passes of a step that is to be captured."""
        if self.recorder is not None:  # the Trainer counts a step when it is done
            self.recorder.before_backward(state.global_step + 1, getattr(kwargs.get("optimizer"), "scaler", None))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the gradients, clipped and unscaled, as the optimizer is about to use them."""
        if self.recorder is not None:
            self.recorder.before_optimizer_step(kwargs.get("optimizer"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record of a captured step."""
        self._batch_size = state.train_batch_size
        if self.recorder is not None and self.recorder.after_optimizer_step():
            self._log(state, will_log=control.should_log)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make sure that a checkpoint's step has a record, from which a resumed training can continue."""
        if self.recorder is not None and self.recorder.record(state.global_step):
            self._log(state, will_log=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers of a step to what the Trainer logs of it."""
        if self._waiting and logs is not None:
            numbers, self._waiting = self._waiting, {}
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the store."""
        self._batch_size = None
        self.close()

    def close(self) -> None:
        """Remove all hooks and close the store; call it after a training that raised, since no event follows."""
        if self.recorder is not None:
            self.recorder.close()

    def __enter__(self) -> DynamicsCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, state: TrainerState, *, begins: bool) -> Path:
        """Return the run folder; for a trial of a hyperparameter search the folder in it that the Trainer names."""
        if not state.is_hyper_param_search:
            return Path(self._out_dir)
        self._trials += begins
        trial = getattr(self._trainer, "_trial", None)
        if self._trainer is not None and trial is not None:
            return Path(self._out_dir) / Path(self._trainer._get_output_dir(trial)).name
        return Path(self._out_dir) / f"run-{max(self._trials, 1) - 1}"

    def _findings_on_loss(self, args: TrainingArguments) -> list[Finding]:
        """Return a finding if training visibly minimises a different loss than the tasks' default."""
        names = [task.name for task in self._settings["tasks"] or () if not callable(task.loss)]
        loss = _other_loss(args, self._trainer)
        if not names or loss is None:
            return []
        return [
            Finding(
                "OD318",
                f"Training minimises {loss}, but the Fisher is that of the model's own cross-entropy on the probe "
                f"samples of {some(names)}.",
                "To probe the loss that is trained, give it to the tasks: Task(…, loss=function).",
                evidence={"loss": loss, "tasks": names},
            )
        ]

    def _restarted(self, args: TrainingArguments, state: TrainerState) -> int | None:
        """Return step 0 where ``auto_find_batch_size`` gave a training up and starts over from the present weights.

        The records so far are of an attempt that the Trainer drops; the start of the weights is still the first's.
        """
        before, self._batch_size = self._batch_size, None
        smaller = before is not None and state.train_batch_size is not None and state.train_batch_size < before
        return 0 if args.auto_find_batch_size and smaller else None

    def _show(self, done: int, total: int) -> None:
        """Show how many probe samples are measured, if it takes longer than ``SLOW``."""
        if self._bar is not None and (done == 0 or done >= total):
            self._bar.close()
            self._bar = None
        if done < total:
            self._bar = self._bar or tqdm(total=total, desc="probe samples", unit="", leave=False, delay=SLOW)
            self._bar.update(done - self._bar.n)

    def _log(self, state: TrainerState, *, will_log: bool) -> None:
        """Hand a record's summary to the training log, together with the Trainer's own numbers if there are any."""
        assert self.recorder is not None
        numbers = {f"{PREFIX}{name}": number for name, number in self.recorder.scalars.items()}
        if self._trainer is not None and will_log:
            self._waiting = numbers
        elif self._trainer is not None:
            # Not by its own method: a subclass may average and clear its metrics there, as TRL's do.
            Trainer.log(self._trainer, numbers)
        else:
            state.log_history.append({**numbers, "epoch": state.epoch, "step": state.global_step})


class ProjectedUpdates(TrainerCallback):
    r"""Keep only, or remove, the part of each optimizer step in the k leading informative directions.

    This changes the training, on purpose: does the concentrated part of the updates do the work? Directions are the
    leading eigenvectors v_j of the empirical Fisher of all trained parameters on the probe samples, at the present
    weights. With Π = Σ_j v_j v_jᵀ, a step δ of the optimizer becomes Πδ (``"on"``) or δ − Πδ (``"off"``).

    δ is what the optimizer did to the weights: momentum, preconditioning and weight decay included. Its state is not
    touched, so that momentum goes on with gradients as they are. Apart from the weights nothing is changed: random
    states, modes and gradients are as without the callback.

    Every captured step of a :class:`DynamicsCallback` in the same Trainer has the projected update, whatever the order
    of the two. The log has ``dynamics/captured_share``: ‖Πδ‖²/‖δ‖² before projecting, mean over the steps since the
    last entry.

    The space is that of the trained parameters themselves, of LoRA the factors. Directions are held as k numbers for
    each trained one, in single precision: 16 directions of 10 million parameters take 640 MB. Estimating them takes the
    gradients of all probe samples, and k weighted sums of them. If what is trained changes, directions are estimated
    again; so they are when a training resumes, which is the same as an uninterrupted one if its checkpoint is at a
    multiple of ``refresh``. Under DDP all ranks use the first one's directions.

    Args:
        tasks: Held-out probe samples, each a :class:`probes.Task`. Samples that are also in the training set are
            refused, where that can be told.
        keep: ``"on"``: only the part in the directions; ``"off"``: only the rest; ``"full"``: all of it, for the
            control, whose training is the same bit for bit as without the callback and which logs the same number.
        k: Number of directions.
        refresh: Estimate directions again at every so many steps.

    Raises:
        ValueError: If an argument is invalid; when training begins, if probe samples are trained on, or trained
            parameters are in half precision or split over ranks (FSDP, DeepSpeed).

    Example: with the Trainer, and in any other loop::

        Trainer(model, arguments, train_dataset=data, callbacks=[ProjectedUpdates(tasks, "off")]).train()

        projected = ProjectedUpdates(tasks, "off", k=16, refresh=50)
        for batch in loader:
            loss(model, batch).backward()
            with projected.step(model):
                optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(self, tasks: Task | Sequence[Task], keep: str, *, k: int = 16, refresh: int = 50) -> None:
        self._tasks = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
        self._projection = StepProjection(self._tasks, keep, k=k, refresh=refresh)
        self._shares: list[float] = []  # of the steps since the last entry of the log

    @property
    def captured_share(self) -> float:
        """‖Πδ‖²/‖δ‖² of the last step, before projecting; NaN if it changed nothing."""
        return self._projection.captured_share

    @contextmanager
    def step(self, model: Any) -> Iterator[None]:
        """Enclose one ``optimizer.step()`` in a loop without a Trainer; forward and backward passes may lie inside.

        Args:
            model: The model in training, in its wrappers.
        """
        self._projection.begin(model)
        yield
        self._projection.end()

    def attach(self, trainer: Trainer) -> ProjectedUpdates:
        """Put the callback before the Trainer's reporters, so that they see its number; see :class:`DynamicsCallback`.

        Args:
            trainer: It may have the callback already.

        Returns:
            The callback.
        """
        _before_reporters(trainer, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot be projected.

        Raises:
            ValueError: If probe samples are trained on, or the parameters' steps cannot be projected.
        """
        self._projection.forget()
        self._shares = []
        if _keeps_gradients_away(args, kwargs.get("optimizer")):
            raise ValueError(
                "Expected an optimizer that changes the model's own parameters, got DeepSpeed's, which overwrites them "
                "with its copies. Train with DistributedDataParallel, or in one process."
            )
        require_projectable(kwargs["model"])
        _refuse_overlap(kwargs["model"], self._tasks, kwargs.get("train_dataloader"))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the weights before the step; here already, since some optimizers step within the backward pass."""
        self._projection.begin(kwargs["model"], state.global_step, shared=args.world_size > 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Replace the optimizer's step by what is kept of it, before the step ends and is recorded."""
        share = self._projection.end()
        if math.isfinite(share):
            self._shares.append(share)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Free the directions."""
        self._projection.forget()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the captured share to what the Trainer logs of its steps."""
        if self._shares and logs is not None and "loss" in logs:
            number = {f"{PREFIX}captured_share": sum(self._shares) / len(self._shares)}
            self._shares = []
            logs.update(number)
            state.log_history[-1].update(number)


def _before_reporters(trainer: Trainer, callback: TrainerCallback) -> None:
    """Move a callback, or put it, before those that report what is logged."""
    callbacks = trainer.callback_handler.callbacks
    if callback in callbacks:
        callbacks.remove(callback)
    flow = [index for index, other in enumerate(callbacks) if isinstance(other, DefaultFlowCallback)]
    callbacks.insert(flow[-1] + 1 if flow else 0, callback)


def _refuse_overlap(model: Any, tasks: Sequence[Task], train_dataloader: Any) -> None:
    """Refuse probe samples that are trained on, where the training set is map-style and quickly read."""
    dataset = getattr(train_dataloader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return
    if len(dataset) <= COMPARED:
        with undisturbed(model):  # reading may draw random numbers
            for task in tasks:
                task.refuse_overlap(dataset)


def _nothing(done: int, total: int) -> None:
    """Show no progress."""


def _is_saved(step: int, args: TrainingArguments, state: TrainerState) -> bool:
    """Return whether the Trainer will save a checkpoint at this step, as far as that can be known in advance."""
    if args.save_strategy != SaveStrategy.STEPS:
        return False
    return step >= state.max_steps or (state.save_steps > 0 and step % state.save_steps == 0)


def _keeps_gradients_away(args: TrainingArguments, optimizer: Any) -> bool:
    """Return whether DeepSpeed ZeRO is at work, which takes gradients apart as they come."""
    return bool(getattr(args, "deepspeed", None)) or "DeepSpeed" in type(optimizer).__name__


def _other_loss(args: TrainingArguments, trainer: Trainer | None) -> str | None:
    """Return the loss that is minimised if it may differ from the model's own; ``None`` if not, or if unknown."""
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "a custom compute_loss_func"
    owner = next((kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind)), Trainer)
    # TRL's SFTTrainer calls the model's own loss, and adds metrics.
    supervised = owner.__name__ == "SFTTrainer" and getattr(args, "loss_type", None) in (None, "nll", "chunked_nll")
    if owner is not Trainer and not (owner.__module__.startswith("trl.") and supervised):
        return f"what {owner.__name__}.compute_loss returns"
    if args.label_smoothing_factor:
        return f"a cross-entropy with label smoothing of {args.label_smoothing_factor:g}"
    return None


def _disk_names(model: Any, watched: Sequence[str]) -> dict[str, Any]:
    """Return names of dense watched weights on disk; without them names stay as in the model."""
    if not watched:
        return {}
    try:
        return disk_names(model, watched, state_dict_conversion=_as_saved)
    except Exception as error:  # a library's inner function on anybody's model
        warnings.warn(
            f"The names under which this model's weights are saved are unknown ({type(error).__name__}: {error}); "
            "names in checkpoints are used as they are.",
            UserWarning,
            stacklevel=2,
        )
        return {}


def _as_saved(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
