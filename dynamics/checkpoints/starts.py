"""What the updates of matrices that did not start at zero are counted from, and whether there are any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dynamics.checkpoints.trajectory import Checkpoint, MatrixShape
from dynamics.findings import Finding
from dynamics.text import some

_BASE = "Give the weights before training (--base)."


def every_shape(checkpoints: Sequence[Checkpoint]) -> dict[str, MatrixShape]:
    """Each matrix that occurs in some checkpoint, with its newest shape."""
    return {name: shape for checkpoint in checkpoints for name, shape in checkpoint.shapes.items()}


def has_updates(checkpoints: Sequence[Checkpoint], base: Checkpoint | None) -> bool:
    """Whether anything is an update, or two states of one weight differ by one."""
    shapes = every_shape(checkpoints)
    if any(shape.holds == "update" for shape in shapes.values()):
        return True
    trainings = _trainings(checkpoints)
    from_base = base is not None and any(name in base.shapes for name, one in shapes.items() if one.holds == "weight")
    return from_base or any(len(own) > 1 for own in trainings)


def start_findings(
    checkpoints: Sequence[Checkpoint], base: Checkpoint | None, moved: Mapping[str, str]
) -> Iterator[Finding]:
    """How totals are to be read; nothing where all matrices are updates already.

    Args:
        checkpoints: Of all trainings.
        base: The weights before training, if they were given.
        moved: Name of each matrix of an adapter whose start is not known to the initialisation that it had.
    """
    yield from _unknown_starts(checkpoints, moved)
    if not any(shape.holds == "weight" for shape in every_shape(checkpoints).values()):
        return
    if base is not None:
        message = f"Updates of dense weights are counted from the base {base.folder.name!r}."
        yield Finding("OD123", message, evidence={"base": base.folder.name})
        return
    for own in _trainings(checkpoints):
        first = own[0]
        where = f"the first checkpoint of training {first.segment}, step {first.step}"
        if len(own) == 1:
            message = f"Its dense weights have no update: it is {where}, and its only one."
            yield Finding("OD105", message, _BASE, file=first.folder.name, step=first.step)
        else:
            message = f"Updates of dense weights are counted from {where}, not from the start of training."
            yield Finding("OD123", message, _BASE, step=first.step, evidence={"segment": first.segment})


def _unknown_starts(checkpoints: Sequence[Checkpoint], moved: Mapping[str, str]) -> Iterator[Finding]:
    """What can be said of adapters that began with a part of the base weight, and what cannot."""
    for training in _trainings(checkpoints):
        names = [name for name, shape in training[-1].shapes.items() if shape.holds == "state"]
        if not names:
            continue
        method = moved.get(names[0]) or "a method that changes the base weight"
        folder = f"{method.lower().replace('-', '_')}_init/" if names[0] in moved else "pissa_init/"
        reason = (
            f"It was initialised by {method}, which moves a part of the base weight into the adapter: the update is "
            "s (B A − B₀ A₀), and the initial adapter is not in the run."
        )
        matrices = f"{len(names)} matrices: {some(names)}" if len(names) > 1 else names[0]
        remedy = f"Put the initial adapter into the run's folder as {folder}."
        if len(training) > 1:
            yield Finding(
                "OD138",
                f"{reason} Increments between checkpoints are known, totals since the start are not: {matrices}.",
                remedy,
                step=training[-1].step,
                evidence={"matrices": names},
            )
        else:
            convert = " Or convert it: save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER)."
            message = f"{reason} {matrices}."
            evidence = {"matrices": names}
            yield Finding(
                "OD105", message, remedy + convert, training[0].folder.name, step=training[0].step, evidence=evidence
            )


def _trainings(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    numbers = sorted({checkpoint.segment for checkpoint in checkpoints})
    return [[checkpoint for checkpoint in checkpoints if checkpoint.segment == number] for number in numbers]
