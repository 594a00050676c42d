"""The callback: a :class:`~dynamics.Recorder` driven by a ``transformers.Trainer``. All else is in the recorder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import SaveStrategy

from dynamics.findings import Finding
from dynamics.recording import Schedule, at_no_step, either, preset_named
from dynamics.recording.disk_names import disk_names
from dynamics.recording.recorder import Recorder
from probes.tasks import Task
from probes.undisturbed import undisturbed

#: What the recorder's numbers are called in the training log.
PREFIX = "dynamics/"
#: Training sets of at most so many samples are read when training begins, to see that no probe sample is among them.
COMPARED = 10_000


class DynamicsCallback(TrainerCallback):
    """Records what a training does to the weights, at the steps of a schedule and wherever a checkpoint is saved.

    The records go into ``out_dir/dynamics/capture.zarr``; read them with ``dynamics.open_run(out_dir)`` or analyse them
    with ``python -m dynamics.analyze out_dir``. A summary of each goes into the training log as ``dynamics/…``.

    The training is the same, bit for bit, with the callback and without. A failure to record is one warning and a gap.

    Args:
        out_dir: Run folder, best the Trainer's ``output_dir``. The trials of a hyperparameter search are runs of their
            own, ``out_dir/run-<number>``, as their checkpoints are.
        tasks: Held-out probe samples, each a :class:`probes.Task`: with them each captured step also has the Fisher at
            the start of its increment, and the tasks' scores. Refused if they are in the training set, where that can
            be told.
        preset: ``"economy"``: spectra of updates and gradient norms; ``"standard"``: spectra of gradients as well;
            ``"full"``: also cosines of consecutive increments, for a second copy of the watched factors.
        every: Capture every so many steps, instead of the preset's schedule.
        at: Capture these steps.
        schedule: Capture where ``schedule(step)`` is true, see ``dynamics.recording``.
        matrices: Regular expression; only matrices whose name it finds are watched.
        strict: Whether a failure to record raises.

    Raises:
        ValueError: If the preset is not one; when training begins, if there is nothing to watch.
        CaptureExists: When training begins, if the run has records and the training does not resume.

    Example: one line more puts the numbers into every integration of ``report_to`` as well::

        callback = DynamicsCallback("runs/imax", preset="standard")
        trainer = Trainer(model, TrainingArguments("runs/imax"), train_dataset=data, callbacks=[callback])
        callback.attach(trainer)
        trainer.train()
    """

    def __init__(
        self,
        out_dir: str | PathLike[str],
        tasks: Sequence[Task] | None = None,
        *,
        preset: str = "standard",
        every: int | None = None,
        at: Sequence[int] | None = None,
        schedule: Schedule | None = None,
        matrices: str | None = None,
        strict: bool = False,
    ) -> None:
        default = preset_named(preset).schedule if every is None and at is None else at_no_step
        self._schedule = default if schedule is None else schedule
        self._out_dir = out_dir
        self._wishes: dict[str, Any] = {
            "preset": preset,
            "every": every,
            "at": at,
            "matrices": matrices,
            "tasks": tasks,
            "strict": strict,
        }
        self._trainer: Trainer | None = None
        self._trials = 0  # of a hyperparameter search
        self._under_way: int | None = None  # the batch size of a training that has taken a step and has not ended
        self._waiting: dict[str, float] = {}
        self.recorder: Recorder | None = None

    def attach(self, trainer: Trainer) -> DynamicsCallback:
        """Puts the callback before the Trainer's reporters, so that they see its numbers.

        A callback is given no Trainer, and those of the user come after the reporters: unattached, the numbers
        are in ``trainer.state.log_history`` alone, and a loss of the Trainer's own (``compute_loss_func``, a subclass)
        is not noticed.

        Args:
            trainer: With the callback among its callbacks or not.

        Returns:
            Itself.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        flow = [place for place, each in enumerate(callbacks) if isinstance(each, DefaultFlowCallback)]
        callbacks.insert(flow[-1] + 1 if flow else 0, self)
        self._trainer = trainer
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes in the model and opens the store.

        Raises:
            ValueError: If there is nothing to watch.
            CaptureExists: If the run has records and the training does not resume.
        """
        self.close()
        self._waiting = {}
        model = kwargs["model"]
        self._refuse_overlap(model, kwargs.get("train_dataloader"))
        resume_from = state.global_step or self._taken_up_again(args, state)
        self.recorder = Recorder(
            self._run(state, begins=resume_from is None),
            model,
            schedule=either(self._schedule, lambda step: _is_saved(step, args, state)),
            resume_from=resume_from,
            warmup_steps=args.get_warmup_steps(state.max_steps),
            gradients=not _keeps_gradients_away(args, kwargs.get("optimizer")),
            disk_names=lambda names: _disk_names(model, names),
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            notes=self._notes_on_loss(args),
            **self._wishes,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hooks on to the backward passes of a step that is to be captured."""
        if self.recorder is not None:  # the Trainer counts a step when it is done
            self.recorder.before_backward(state.global_step + 1, getattr(kwargs.get("optimizer"), "scaler", None))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the gradients, clipped and unscaled, as the optimizer is about to take them."""
        if self.recorder is not None:
            self.recorder.before_optimizer_step(kwargs.get("optimizer"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the record of a captured step."""
        self._under_way = state.train_batch_size
        if self.recorder is not None and self.recorder.after_optimizer_step():
            self._log(state, will_log=control.should_log)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Makes sure that a checkpoint's step has a record, from which a resumed training can go on."""
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
        """Adds the numbers of a step that the Trainer logs itself to what it logs."""
        if self._waiting and logs is not None:
            numbers, self._waiting = self._waiting, {}
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the store."""
        self._under_way = None
        self.close()

    def close(self) -> None:
        """Removes all hooks and gives the store back; for when a training raised, after which no event comes."""
        if self.recorder is not None:
            self.recorder.close()

    def __enter__(self) -> DynamicsCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_overlap(self, model: Any, train_dataloader: Any) -> None:
        """Refuses probe samples that are trained on, where the training set is map-style and soon read."""
        dataset = getattr(train_dataloader, "dataset", None)
        if dataset is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            return
        if len(dataset) <= COMPARED:
            with undisturbed(model):  # reading may draw random numbers
                for task in self._wishes["tasks"] or ():
                    task.refuse_overlap(dataset)

    def _run(self, state: TrainerState, *, begins: bool) -> Path:
        """The run's folder; of a trial of a hyperparameter search one in it, named as the Trainer names the trial's."""
        if not state.is_hyper_param_search:
            return Path(self._out_dir)
        self._trials += begins
        trial = getattr(self._trainer, "_trial", None)
        if self._trainer is not None and trial is not None:
            return Path(self._out_dir) / Path(self._trainer._get_output_dir(trial)).name
        return Path(self._out_dir) / f"run-{max(self._trials, 1) - 1}"

    def _notes_on_loss(self, args: TrainingArguments) -> list[Finding]:
        """What is to be said where training minimises another loss than the tasks' default, as far as can be seen."""
        names = [task.name for task in self._wishes["tasks"] or () if not callable(task.loss)]
        loss = _other_loss(args, self._trainer)
        if not names or loss is None:
            return []
        return [
            Finding(
                "OD318",
                f"The training minimises {loss}; the Fisher is of the model's own cross-entropy on the probe samples "
                f"of {', '.join(names[:3])}{', …' if len(names) > 3 else ''}.",
                "Give the tasks the same loss, Task(…, loss=function), if the Fisher is to be of what is trained.",
                evidence={"loss": loss, "tasks": names},
            )
        ]

    def _taken_up_again(self, args: TrainingArguments, state: TrainerState) -> int | None:
        """Step 0 where ``auto_find_batch_size`` gave a training up and begins it again, from where its weights are.

        The records so far are of an attempt that the Trainer drops; the start of the weights is still the first's.
        """
        before, self._under_way = self._under_way, None
        smaller = before is not None and state.train_batch_size is not None and state.train_batch_size < before
        return 0 if args.auto_find_batch_size and smaller else None

    def _log(self, state: TrainerState, *, will_log: bool) -> None:
        """Hands a record's summary to the training log, together with the Trainer's own numbers where it has some."""
        assert self.recorder is not None
        numbers = {f"{PREFIX}{name}": number for name, number in self.recorder.scalars.items()}
        if self._trainer is not None and will_log:
            self._waiting = numbers
        elif self._trainer is not None:
            # Not by its own method: a subclass may average and clear its metrics there, as TRL's do.
            Trainer.log(self._trainer, numbers)
        else:
            state.log_history.append({**numbers, "epoch": state.epoch, "step": state.global_step})


def _is_saved(step: int, args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the Trainer is going to save a checkpoint at this step, as far as that can be known before."""
    if args.save_strategy != SaveStrategy.STEPS:
        return False
    return step >= state.max_steps or (state.save_steps > 0 and step % state.save_steps == 0)


def _keeps_gradients_away(args: TrainingArguments, optimizer: Any) -> bool:
    """Whether DeepSpeed ZeRO is at work, which takes gradients apart as they come."""
    return bool(getattr(args, "deepspeed", None)) or "DeepSpeed" in type(optimizer).__name__


def _other_loss(args: TrainingArguments, trainer: Trainer | None) -> str | None:
    """The loss that is minimised, where it is not, or may not be, the model's own; ``None`` if it is, or none knows."""
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "a compute_loss_func of its own"
    owner = next((kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind)), Trainer)
    # TRL's SFTTrainer calls the model's own loss, and adds metrics.
    supervised = owner.__name__ == "SFTTrainer" and getattr(args, "loss_type", None) in (None, "nll", "chunked_nll")
    if owner is not Trainer and not (owner.__module__.startswith("trl.") and supervised):
        return f"what {owner.__name__}.compute_loss returns"
    if args.label_smoothing_factor:
        return f"a cross-entropy with label smoothing of {args.label_smoothing_factor:g}"
    return None


def _disk_names(model: Any, watched: Sequence[str]) -> dict[str, Any]:
    """Names of dense watched weights on disk; without them names stay as in the model."""
    if not watched:
        return {}
    try:
        return disk_names(model, watched, state_dict_conversion=_as_saved)
    except Exception as error:  # a library's inner function on anybody's model
        warnings.warn(
            f"The names under which this model's weights are saved could not be found ({type(error).__name__}: "
            f"{error}); those of checkpoints will be taken as they are.",
            UserWarning,
            stacklevel=2,
        )
        return {}


def _as_saved(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
