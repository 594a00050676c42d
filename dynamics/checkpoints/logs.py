"""The training log as groups of the result: ``/training`` and ``/score``."""

from __future__ import annotations

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.checkpoints.names import shown
from dynamics.checkpoints.trajectory import LogEntry, Trajectory
from dynamics.schema import label_arrays

#: The Trainer logs scores under this prefix; its other entries are about training.
SCORE_PREFIX = "eval_"
#: Numbers that our recorder logs; its records hold all of them.
_RECORDED_PREFIXES = ("dynamics/", "train/dynamics/")
#: Characters of a name that are stored.
_LONGEST_NAME = 1000
#: Entries about the evaluation itself: its duration and its size.
_ABOUT_THE_EVALUATION = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "model_preparation_time",
    "_samples",
    "_num_tokens",
)


def log_groups(trajectory: Trajectory) -> dict[str, xr.Dataset]:
    """Return the groups ``"training"`` and ``"score"`` of a result, each only if the log has entries for it.

    Args:
        trajectory: The run.
    """
    training = [entry for entry in trajectory.log if not entry.name.startswith((SCORE_PREFIX, *_RECORDED_PREFIXES))]
    scores = [entry for entry in trajectory.log if is_score(entry.name)]
    groups = {}
    if training:
        groups["training"] = _training(training)
    if scores:
        groups["score"] = _scores(scores, trajectory)
    return groups


def is_score(name: str) -> bool:
    """Return whether an entry of the Trainer's log measures how good the model is.

    >>> is_score("eval_vqa_loss"), is_score("eval_runtime"), is_score("loss")
    (True, False, False)
    """
    return name.startswith(SCORE_PREFIX) and not name.endswith(_ABOUT_THE_EVALUATION)


def _training(entries: list[LogEntry]) -> xr.Dataset:
    """Return ``value(log, metric)``, with a row for each logged (segment, step).

    Metrics are a coordinate, not variables: their names are free text, and names of variables are paths in the store.
    """
    rows = sorted({(entry.segment, entry.step) for entry in entries})
    metrics = list(dict.fromkeys(entry.name for entry in entries))
    row = {segment_and_step: index for index, segment_and_step in enumerate(rows)}
    column = {name: index for index, name in enumerate(metrics)}
    values = np.full((len(rows), len(metrics)), np.nan)
    for entry in entries:
        values[row[entry.segment, entry.step], column[entry.name]] = entry.value
    segments, steps = np.asarray(rows, dtype=np.int64).T
    coordinates = {"metric": _names(metrics), "log_segment": segments, "log_step": steps}
    dataset = xr.Dataset(
        label_arrays(schema.TRAINING, {"value": values}), coords=label_arrays(schema.LOG_COORDINATES, coordinates)
    )
    dataset["value"].attrs["missing"] = "not logged at this step, or logged as NaN"
    return dataset


def _names(names: list[str]) -> np.ndarray:
    """Return names as an array of text, control characters escaped (numpy would drop a NUL at the end)."""
    return np.asarray([shown(name, _LONGEST_NAME) for name in names], dtype=str)


def _scores(entries: list[LogEntry], trajectory: Trajectory) -> xr.Dataset:
    """Return ``score(step, task)``; of several trainings evaluated at one step, that with a checkpoint there wins."""
    owner = {checkpoint.step: checkpoint.segment for checkpoint in trajectory.checkpoints}
    chosen = {}
    for entry in sorted(entries, key=lambda entry: entry.segment):
        if owner.get(entry.step, entry.segment) == entry.segment:
            chosen[entry.step, entry.name] = entry
    steps = sorted({step for step, _ in chosen})
    tasks = list(dict.fromkeys(name for _, name in chosen))
    values = np.full((len(steps), len(tasks)), np.nan)
    segment = np.zeros(len(steps), dtype=np.int64)
    for (step, task), entry in chosen.items():
        values[steps.index(step), tasks.index(task)] = entry.value
        segment[steps.index(step)] = entry.segment
    unknown = np.full_like(values, np.nan)
    arrays = {"score": values, "items": unknown, "standard_error": unknown.copy()}
    coordinates = {"step": np.asarray(steps, dtype=np.int64), "task": _names(tasks), "segment": segment}
    dataset = xr.Dataset(label_arrays(schema.SCORE, arrays), coords=label_arrays(schema.LOG_COORDINATES, coordinates))
    for name in ("items", "standard_error"):
        dataset[name].attrs["missing"] = "the Trainer's log does not give it"
    return dataset
