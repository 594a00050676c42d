"""What a recorder watches in a model, what it refuses, and what is to be said of it from the beginning."""

from __future__ import annotations

from torch import nn

from dynamics.findings import Finding
from probes.watched import Found, find

#: So many names are given in a message.
_NAMED = 5


def watched_or_refused(model: nn.Module, matrices: str | None) -> Found:
    """The matrices to watch.

    Raises:
        ValueError: If there are none, or their parameters cannot be read.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "Expected parameters that can be read, got those of DeepSpeed ZeRO-3, which are in pieces on all ranks. "
            "Use FSDP 2, or ZeRO-2 with gradients=False."
        )
    found = find(model, matrices)
    if not found.watched:
        trained = sum(parameter.requires_grad for parameter in model.parameters())
        why = "; ".join(f"{path}: {reason}" for path, reason in list(found.skipped.items())[:_NAMED])
        asked = f" whose name {matrices!r} finds" if matrices is not None else ""
        raise ValueError(
            f"Expected at least one matrix to watch{asked}, found none among {trained} trainable parameters"
            f"{f' ({why})' if why else ''}. Give the recorder the model after its adapters were added and before they "
            "are merged, or another pattern."
        )
    return found


def notes_on(found: Found, *, gradients: bool) -> list[Finding]:
    """What is to be said of the model itself."""
    notes = []
    if found.uncovered:
        names = list(found.uncovered)
        notes.append(
            Finding(
                "OD306",
                f"{len(names)} trainable parameters belong to no watched matrix ({', '.join(names[:_NAMED])}"
                f"{', …' if len(names) > _NAMED else ''}); the watched matrices hold {found.covered_share:.1%} of what "
                "is trained.",
                evidence={"names": names[:_NAMED], "parameters": len(names), "covered_share": found.covered_share},
            )
        )
    notes += [
        Finding("OD310", f"This adapter is not watched: {reason}.", matrix=path)
        for path, reason in found.skipped.items()
    ]
    if not gradients:
        notes.append(Finding("OD311", "Gradients are not recorded: they cannot be read here, or were not asked for."))
    return notes


def notes_on_resuming(step: int | None, *, goes_on: bool) -> list[Finding]:
    """What is to be said where a training resumes, unless the capture goes on without a gap."""
    if step is None or goes_on:
        return []
    return [
        Finding(
            "OD307",
            f"The capture begins, or goes on, at step {step}, of which it had no record: there is no increment there, "
            "and the total of a dense weight is known only if its start is.",
            step=step,
        )
    ]
