"""The training log as groups of the result: ``/training`` and ``/score``."""

from __future__ import annotations

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.checkpoints.names import shown
from dynamics.checkpoints.trajectory import LogEntry, Trajectory

#: The Trainer writes scores under this prefix; the rest of its entries is about training.
SCORE_PREFIX = "eval_"
#: What a capture logs for those who watch the training: all of it is in its records.
_RECORDED_PREFIXES = ("dynamics/", "train/dynamics/")
#: Characters of a name that are kept.
_LONGEST_NAME = 1000
#: Scores of no task: how long the evaluation took, and over how much.
_ABOUT_THE_EVALUATION = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "model_preparation_time",
    "_samples",
    "_num_tokens",
)


def log_groups(trajectory: Trajectory) -> dict[str, xr.Dataset]:
    """``"training"`` and ``"score"``, each only if the log has something for it."""
    training = [entry for entry in trajectory.log if not entry.name.startswith((SCORE_PREFIX, *_RECORDED_PREFIXES))]
    scores = [entry for entry in trajectory.log if is_score(entry.name)]
    groups = {}
    if training:
        groups["training"] = _training(training)
    if scores:
        groups["score"] = _scores(scores, trajectory)
    return groups


def is_score(name: str) -> bool:
    """Whether a number in the Trainer's log says how good the model is.

    >>> is_score("eval_vqa_loss"), is_score("eval_runtime"), is_score("loss")
    (True, False, False)
    """
    return name.startswith(SCORE_PREFIX) and not name.endswith(_ABOUT_THE_EVALUATION)


def _training(entries: list[LogEntry]) -> xr.Dataset:
    """``value(log, metric)``, a row for each logged (segment, step).

    Metrics are a coordinate: their names are anybody's, and those of variables are paths in the store.
    """
    rows = sorted({(entry.segment, entry.step) for entry in entries})
    metrics = list(dict.fromkeys(entry.name for entry in entries))
    row = {place: index for index, place in enumerate(rows)}
    column = {name: index for index, name in enumerate(metrics)}
    values = np.full((len(rows), len(metrics)), np.nan)
    for entry in entries:
        values[row[entry.segment, entry.step], column[entry.name]] = entry.value
    segments, steps = np.asarray(rows, dtype=np.int64).T
    attributes = {
        "units": "as logged",
        "long_name": "logged number",
        "missing": "not logged at this step, or logged as NaN",
    }
    return xr.Dataset(
        {"value": (("log", "metric"), values, attributes)},
        coords={
            "metric": ("metric", _names(metrics), {"units": "1", "long_name": "name of the number in the log"}),
            "log_segment": ("log", segments, {"units": "1", "long_name": "number of the training"}),
            "log_step": ("log", steps, {"units": "1", "long_name": "optimizer step"}),
        },
    )


def _names(names: list[str]) -> np.ndarray:
    """Names as an array of text, control characters (also a NUL at the end, which numpy would drop) escaped."""
    return np.asarray([shown(name, _LONGEST_NAME) for name in names], dtype=str)


def _scores(entries: list[LogEntry], trajectory: Trajectory) -> xr.Dataset:
    """``score(step, task)``; of several trainings that evaluated at one step, that of the checkpoint there."""
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
    dataset = xr.Dataset(
        {
            name: (schema.SCORE[name].dims, array, schema.attributes(schema.SCORE[name]))
            for name, array in arrays.items()
        },
        coords={
            "step": ("step", np.asarray(steps, dtype=np.int64), {"units": "1", "long_name": "optimizer step"}),
            "task": ("task", _names(tasks), {"units": "1", "long_name": "name of the score in the log"}),
            "segment": ("step", segment, {"units": "1", "long_name": "number of the training"}),
        },
    )
    for name in ("items", "standard_error"):
        dataset[name].attrs["missing"] = "the Trainer's log does not say it"
    return dataset
