"""Several trainings in one folder, separated by evidence in ``trainer_state.json`` and in the adapters.

A rerun into the same output folder leaves checkpoints of two trainings interleaved by number. Sorting them by step
would invent dynamics, so each checkpoint is assigned to a training (segment) by evidence, in ascending order of step:

1. **The log decides where it can.** The Trainer keeps its whole ``log_history``, also over resumes. A checkpoint
   *continues* an earlier one if every entry of the earlier log returns with the same value (by step and metric; timings
   are ignored). It belongs to *another training* if one value differs, or if entries of the earlier log are missing
   although the later log is not empty (it started over). A continued log outweighs everything below: a training may be
   extended, or its plan changed. Only where the adapter's scale changes within it (alpha, rsLoRA) do later checkpoints
   count as another training: the difference of two checkpoints would mix two scales. Learning rates alone do not make a
   continuation: two trainings with one schedule share them.
2. **Where the logs are silent**, one of these is enough: the floating-point operations so far go down although the step
   goes up; the rank of every shared matrix differs, if the matrices are not the same or one of the two has a log; each
   of the two has matrices that the other lacks. Otherwise two of these are needed: the rank of every matrix differs
   (alone, a rank that grows or is pruned); another ``max_steps`` or ``num_train_epochs``; another
   ``train_batch_size``; other logging, evaluation or save intervals; another alpha, rsLoRA or ``target_modules``.
3. **Where the evidence does not decide**, nothing is split, and a warning says so. A checkpoint without any evidence
   joins the training of the checkpoint before it.

Weights are not compared: two trainings from one seed can share A almost exactly, and one large step can turn an update,
so similarity would fail exactly where it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dynamics.checkpoints.files import read_json
from dynamics.checkpoints.names import shown
from dynamics.checkpoints.steps import LARGEST_STEP
from dynamics.checkpoints.trajectory import LogEntry
from dynamics.findings import Finding
from dynamics.text import some

#: Settings of the Trainer; two trainings often differ in one of them.
_PLAN = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps", "save_steps")


@dataclass(frozen=True)
class TrainingState:
    """The parts of a ``trainer_state.json`` that are used; paths in it (``best_model_checkpoint``) are never followed.

    Args:
        step: ``global_step``, or ``None`` if it is not a whole number.
        log: Step, name and value of each scalar in ``log_history``, in its order.
        plan: ``max_steps``, ``num_train_epochs``, ``train_batch_size`` and the like, where present.
        total_flos: Floating-point operations so far, accumulated over resumes; NaN if absent.
    """

    step: int | None
    log: tuple[tuple[int, str, float], ...]
    plan: dict[str, float]
    total_flos: float = math.nan


def read_training_state(path: Path) -> TrainingState:
    """Read a ``trainer_state.json``; a bare ``NaN`` is a value like any other.

    Args:
        path: The file.

    Raises:
        UnreadableFile: ``OD108`` if it is not a JSON object, ``OD107`` if it is a Git-LFS pointer.
    """
    return parse_training_state(read_json(path, "OD108"))


def parse_training_state(content: dict[str, Any]) -> TrainingState:
    """Return the training state in a JSON object.

    Args:
        content: The object.

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
    """Return a JSON number as a float; ``None`` for anything else (booleans, integers beyond any float)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(value) if number is not None and number.is_integer() and 0 <= number <= LARGEST_STEP else None


# --- evidence ------------------------------------------------------------------------------------

_NOT_COMPARED = ("runtime", "_per_second", "total_flos", "train_loss", "num_tokens", "num_input_tokens_seen")
#: Plans that change together count as one piece of evidence.
_PLANS = (
    ("max_steps", "num_train_epochs"),
    ("train_batch_size",),
    ("logging_steps", "eval_steps", "save_steps"),
)
#: Settings that, with the rank, determine an adapter's scale.
_SCALE = ("lora_alpha", "use_rslora", "alpha_pattern")


@dataclass(frozen=True)
class Clues:
    """Evidence of one checkpoint about its training.

    Args:
        step: Its optimizer step.
        state: Its training state, if it could be read.
        ranks: Matrix → rank.
        sizes: Analysed matrix → output and input dimension.
        settings: Adapter → configuration.
    """

    step: int
    state: TrainingState | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint continues an earlier one, the evidence, and the number of log entries that agree."""

    answer: Literal["continues", "another", "unknown"]
    evidence: tuple[str, ...] = ()
    agreeing: int = 0


def compare_clues(earlier: Clues, later: Clues) -> Verdict:
    """Return whether the later checkpoint belongs to the training of the earlier one, by the rules above.

    Args:
        earlier: Evidence of a checkpoint.
        later: Evidence of a checkpoint at a later step.

    >>> old = TrainingState(10, ((5, "loss", 2.0), (10, "loss", 1.5)), {})
    >>> new = TrainingState(20, ((5, "loss", 2.0), (10, "loss", 1.5), (15, "loss", 1.2)), {})
    >>> compare_clues(Clues(10, old), Clues(20, new)).answer
    'continues'
    """
    logs = _compare_logs(earlier, later)
    if logs.answer != "unknown":
        return logs
    strong = [*_operations(earlier, later), *_other_matrices(earlier, later)]
    ranks = [*_other_ranks(earlier, later)]
    may_change = earlier.ranks.keys() == later.ranks.keys() and not _has_log(earlier) and not _has_log(later)
    weak = [*logs.evidence, *_other_plans(earlier, later), *_other_settings(earlier, later)]
    (weak if may_change else strong).extend(ranks)
    answer = "another" if strong or len(weak) >= 2 else "unknown"
    return Verdict(answer, (*strong, *weak))


def _compare_logs(earlier: Clues, later: Clues) -> Verdict:
    if earlier.state is None or later.state is None:
        return Verdict("unknown")
    before, after = _metrics(earlier.state), _metrics(later.state)
    if not before:
        return Verdict("unknown")
    if not after:
        return Verdict("unknown", (f"the log of step {later.step} is empty, that of step {earlier.step} is not",))
    for key in before:
        if key in after and not _equal(before[key], after[key]):
            step, name = key
            text = (
                f"{name} at step {step} is {before[key]:g} in the log of step {earlier.step} "
                f"and {after[key]:g} in the log of step {later.step}"
            )
            return Verdict("another", (text,))
    missing = [key for key in before if key not in after]
    if missing:
        # Another version may drop a name, but not every entry of a step.
        steps = {step for step, _ in after}
        lost = sorted({step for step, _ in missing} - steps)
        if lost:
            text = f"the log of step {later.step} lacks step {lost[0]}, which the log of step {earlier.step} has"
            return Verdict("another", (text,))
    agreeing = sum(key in after and key[1] != "learning_rate" for key in before)
    return Verdict("continues" if agreeing else "unknown", (), agreeing)


def _has_log(clues: Clues) -> bool:
    return clues.state is not None and bool(_metrics(clues.state))


def _metrics(state: TrainingState) -> dict[tuple[int, str], float]:
    return {(step, name): value for step, name, value in state.log if not name.endswith(_NOT_COMPARED)}


def _equal(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _operations(earlier: Clues, later: Clues) -> Iterable[str]:
    if earlier.state is not None and later.state is not None:
        before, after = earlier.state.total_flos, later.state.total_flos
        if 0 < after < before:  # 0 where the model could not count them
            yield f"total_flos goes down from {before:g} at step {earlier.step} to {after:g} at step {later.step}"


def _other_matrices(earlier: Clues, later: Clues) -> Iterable[str]:
    shared = earlier.ranks.keys() & later.ranks.keys()
    only_before, only_after = earlier.ranks.keys() - shared, later.ranks.keys() - shared
    if only_before and only_after:
        yield (
            f"{some(sorted(only_before), 1)} only at step {earlier.step}, "
            f"{some(sorted(only_after), 1)} only at step {later.step}"
        )
    sized = earlier.sizes.keys() & later.sizes.keys()
    resized = sorted(name for name in sized if earlier.sizes[name] != later.sizes[name])
    if resized:
        before, after = ("×".join(map(str, clues.sizes[resized[0]])) for clues in (earlier, later))
        yield f"{some(resized, 1)} has size {before} at step {earlier.step} and {after} at step {later.step}"


def _other_ranks(earlier: Clues, later: Clues) -> Iterable[str]:
    shared = earlier.ranks.keys() & later.ranks.keys()
    if shared and all(earlier.ranks[name] != later.ranks[name] for name in shared):
        name = min(shared)
        yield (
            f"all ranks differ, e.g. {name}: {earlier.ranks[name]} at step {earlier.step}, "
            f"{later.ranks[name]} at step {later.step}"
        )


def _other_plans(earlier: Clues, later: Clues) -> Iterable[str]:
    if earlier.state is None or later.state is None:
        return
    before, after = earlier.state.plan, later.state.plan
    for names in _PLANS:
        changed = [name for name in names if name in before and name in after and before[name] != after[name]]
        if changed:
            name = changed[0]
            yield f"{name} is {before[name]:g} at step {earlier.step} and {after[name]:g} at step {later.step}"


def _other_settings(earlier: Clues, later: Clues) -> Iterable[str]:
    for adapter in sorted(earlier.settings.keys() & later.settings.keys()):
        before, after = earlier.settings[adapter], later.settings[adapter]
        for name in (*_SCALE, "target_modules"):
            if before.get(name) != after.get(name):
                yield f"{name} differs between steps {earlier.step} and {later.step}"
                return


@dataclass(frozen=True)
class Segments:
    """The segment of each checkpoint, in the order given, and the findings."""

    numbers: tuple[int, ...]
    findings: tuple[Finding, ...]


def find_segments(clues: Sequence[Clues]) -> Segments:
    """Return the training (segment) of each checkpoint.

    Args:
        clues: Evidence of each checkpoint, in ascending order of step.

    >>> find_segments([Clues(5, ranks={"q": 8}), Clues(10, ranks={"v": 4})]).numbers
    (0, 1)
    """
    members: list[list[int]] = []
    numbers: list[int] = []
    reasons: dict[int, tuple[str, ...]] = {}
    doubts: list[str] = []
    for index, clue in enumerate(clues):
        verdicts = [_against(clues, segment, clue) for segment in members]
        number, undecided = _assign(verdicts, numbers[-1] if numbers else 0)
        if number == len(members):
            members.append([])
            reasons[number] = verdicts[-1].evidence if verdicts else ()
        doubts += undecided
        members[number].append(index)
        numbers.append(number)
    findings = []
    if len(members) > 1:
        findings.append(_several([[clues[i].step for i in segment] for segment in members], reasons))
    numbers, changes = _apart_by_scale(clues, numbers)
    findings += changes
    doubts = [doubt for doubt in doubts if not (changes and doubt.startswith(_SCALE))]
    if doubts:
        message = (
            f"Some checkpoints may belong to another training, but the evidence does not decide: {some(doubts, 2)}."
        )
        remedy = "Keep each training in its own folder; no increment is left out because of this."
        findings.append(Finding("OD113", message, remedy, evidence={"doubts": doubts}))
    return Segments(tuple(numbers), tuple(findings))


def _apart_by_scale(clues: Sequence[Clues], numbers: Sequence[int]) -> tuple[list[int], list[Finding]]:
    """Return the segments with a new one at each change of an adapter's scale, and a finding for each change."""
    stretch: dict[int, int] = {}
    settings: dict[tuple[int, str], tuple[int, Mapping[str, Any]]] = {}
    stretches: list[tuple[int, int]] = []
    findings = []
    for clue, number in zip(clues, numbers, strict=True):
        changed = []
        for adapter, values in clue.settings.items():
            step, before = settings.get((number, adapter), (clue.step, values))
            changed += [(adapter, name, step, before) for name in _SCALE if before.get(name) != values.get(name)]
            settings[number, adapter] = (clue.step, values)
        if changed:
            stretch[number] = stretch.get(number, 0) + 1
            adapter, name, step, before = changed[0]
            old, new = (shown(str(values.get(name)), 60) for values in (before, clue.settings[adapter]))
            message = (
                f"{name} is {old} at step {step} and {new} at step {clue.step} of one training: the scale of its "
                "updates changes. No increment crosses the change; later checkpoints count as another training."
            )
            remedy = "Correct adapter_config.json if only one of the two is right."
            evidence = {"setting": name, "adapter": adapter, "from_step": step}
            findings.append(Finding("OD140", message, remedy, step=clue.step, evidence=evidence))
        stretches.append((number, stretch.get(number, 0)))
    order = {key: position for position, key in enumerate(dict.fromkeys(stretches))}
    return [order[key] for key in stretches] if findings else list(numbers), findings


def _against(clues: Sequence[Clues], segment: Sequence[int], clue: Clues) -> Verdict:
    """Return the verdict against the last checkpoint of a segment, or the last one with a log if that decides more."""
    last = compare_clues(clues[segment[-1]], clue)
    if last.answer != "unknown":
        return last
    for index in reversed(segment[:-1]):
        verdict = _compare_logs(clues[index], clue)
        if verdict.answer != "unknown":
            return verdict
    return last


def _assign(verdicts: Sequence[Verdict], previous: int) -> tuple[int, list[str]]:
    """Return the segment (a new one if it equals the number of verdicts) and the doubts that remain."""
    continued = [number for number, verdict in enumerate(verdicts) if verdict.answer == "continues"]
    if continued:
        return max(continued, key=lambda number: verdicts[number].agreeing), []
    open_ = [number for number, verdict in enumerate(verdicts) if verdict.answer == "unknown"]
    if not open_:
        return len(verdicts), []
    number = previous if previous in open_ else open_[-1]
    return number, list(verdicts[number].evidence)


def _several(steps: Sequence[Sequence[int]], reasons: Mapping[int, tuple[str, ...]]) -> Finding:
    """Return the finding about several trainings, from the steps of each and the reasons for each split."""
    listing = "; ".join(f"training {i} at steps {', '.join(map(str, members))}" for i, members in enumerate(steps))
    why = "; ".join(reason for number in sorted(reasons) for reason in reasons[number][:1])
    message = f"The folder holds checkpoints of {len(steps)} trainings ({listing}): {why}."
    remedy = "Increments are formed within each training only. Keep each training in its own folder."
    evidence = {
        "steps": {str(number): list(members) for number, members in enumerate(steps)},
        "reasons": {str(number): list(reason) for number, reason in reasons.items() if reason},
    }
    return Finding("OD112", message, remedy, evidence=evidence)


def merged_log(numbers: Sequence[int], clues: Sequence[Clues]) -> list[LogEntry]:
    """Return the training log: each scalar once, by segment and step, in the order of the logs.

    Args:
        numbers: The segment of each checkpoint.
        clues: Evidence of each checkpoint, in ascending order of step.
    """
    values: dict[tuple[int, int, str], float] = {}
    for number, clue in zip(numbers, clues, strict=True):
        for step, name, value in clue.state.log if clue.state is not None else ():
            values[number, step, name] = value
    entries = [LogEntry(number, step, name, value) for (number, step, name), value in values.items()]
    return sorted(entries, key=lambda entry: (entry.segment, entry.step))
