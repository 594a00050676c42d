"""What the updates of dense weights are counted from, and whether there are any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dynamics.checkpoints.trajectory import Checkpoint, MatrixShape
from dynamics.findings import Finding

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
    return (base is not None and bool(base.shapes.keys() & shapes.keys())) or any(len(own) > 1 for own in trainings)


def start_findings(checkpoints: Sequence[Checkpoint], base: Checkpoint | None) -> Iterator[Finding]:
    """How totals of dense weights are to be read; nothing where all matrices are updates already.

    Args:
        checkpoints: Of all trainings.
        base: The weights before training, if they were given.
    """
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


def _trainings(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    numbers = sorted({checkpoint.segment for checkpoint in checkpoints})
    return [[checkpoint for checkpoint in checkpoints if checkpoint.segment == number] for number in numbers]
