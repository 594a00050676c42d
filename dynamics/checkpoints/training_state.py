"""``trainer_state.json``: the step, the training log, and what a training calls itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamics.checkpoints.plain_files import read_json

#: What the Trainer was set to; two trainings often differ in one of them.
_PLAN = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps", "save_steps")


@dataclass(frozen=True)
class TrainingState:
    """What is used of one ``trainer_state.json``.

    Paths in it (``best_model_checkpoint``) are never followed.

    Args:
        step: ``global_step``, or ``None`` if it is not a whole number.
        log: Step, name and value of each scalar in ``log_history``, in its order.
        plan: ``max_steps``, ``num_train_epochs``, ``train_batch_size`` and the like, where present.
        total_flos: Floating-point operations so far, accumulated over resumes; NaN if not there.
    """

    step: int | None
    log: tuple[tuple[int, str, float], ...]
    plan: dict[str, float]
    total_flos: float = math.nan


def read_training_state(path: Path) -> TrainingState:
    """Reads ``trainer_state.json``; bare ``NaN`` is a value like any other.

    Raises:
        UnreadableFile: ``OD108`` if it is not a JSON object, ``OD107`` if it is a Git-LFS pointer.
    """
    return parse_training_state(read_json(path, "OD108"))


def parse_training_state(content: dict[str, Any]) -> TrainingState:
    """The state from its JSON object.

    >>> parse_training_state({"global_step": 5, "log_history": [{"step": 5, "loss": 1.5, "epoch": 0.1}]}).log
    ((5, 'loss', 1.5),)
    """
    history = content.get("log_history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    log = tuple(scalar for entry in entries for scalar in _scalars(entry))
    plan = {key: value for key in _PLAN if (value := _number(content.get(key))) is not None}
    flos = _number(content.get("total_flos"))
    return TrainingState(_whole(content.get("global_step")), log, plan, math.nan if flos is None else flos)


def _scalars(entry: dict[str, Any]) -> list[tuple[int, str, float]]:
    step = _whole(entry.get("step"))
    if step is None:
        return []
    named = ((name, _number(value)) for name, value in entry.items() if name not in ("step", "epoch"))
    return [(step, name, value) for name, value in named if value is not None]


def _number(value: Any) -> float | None:
    """A JSON number as a float; ``None`` for anything else (booleans, integers beyond any float)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(value) if number is not None and number.is_integer() and 0 <= number < 2**63 else None
