"""The weights before training, and what the updates of each training are counted from.

Totals of dense weights are counted from the base, or without it from the first checkpoint; DoRA rescales the base.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dynamics.checkpoints.alignment import aligned, expert_forms
from dynamics.checkpoints.errors import NotARun, UnreadableFile
from dynamics.checkpoints.files import Weights
from dynamics.checkpoints.formats.transformers import (
    UNPACKED,
    read_dense,
    read_whole_model,
    ties_embeddings,
    whole_model,
)
from dynamics.checkpoints.matrices import FileContent, Refusal, StoredMatrix, open_matrices, oriented
from dynamics.checkpoints.names import shown_path
from dynamics.checkpoints.ties import embedding_of
from dynamics.checkpoints.trajectory import Checkpoint, MatrixShape, OpenCheckpoint, by_training
from dynamics.findings import Finding
from dynamics.text import first_line, some

_REMEDY = "Pass the folder that holds the weights of the model before training."


@dataclass(frozen=True)
class Base:
    """The weights of a model before training.

    Args:
        folder: Their folder.
        weights: Their headers.
        content: Their matrices, by their names in the base.
        ties_head: Whether the output layer is the input embedding, by the configuration; ``None``: it says nothing.
    """

    folder: Path
    weights: Weights
    content: FileContent
    ties_head: bool | None = None

    def find(self, wanted: Mapping[str, MatrixShape]) -> dict[str, tuple[str, StoredMatrix]]:
        """Return name in the run → name in the base and matrix, for each matrix that the base has; see :func:`aligned`.

        An output layer that the base does not hold is its input embedding, unless the configuration says that the two
        are not tied.

        Args:
            wanted: Name in the run → shape.
        """
        sizes = {name: (shape.out, shape.in_) for name, shape in wanted.items()}
        forms = expert_forms(self.content.readable, sizes)
        matrices = {**self.content.readable, **{name: form.matrix for name, form in forms.items()}}
        pairs = aligned(sizes, {name: (matrix.shape.out, matrix.shape.in_) for name, matrix in matrices.items()})
        if self.ties_head is not False:
            for name in wanted.keys() - pairs.keys():
                embedding = embedding_of(name.partition("@")[0], wanted[name], self.content.readable)
                if embedding is not None:
                    pairs[name] = embedding
        return {name: (pairs[name], matrices[pairs[name]]) for name in wanted if name in pairs}

    def refused(self, names: Iterable[str]) -> dict[str, Refusal]:
        """Return name → why the base's matrix cannot be used and what to do, for each of these that the base refuses.

        Args:
            names: Names in the run.
        """
        stems = {name: name.partition("@")[0].partition("[")[0] for name in names}
        pairs = aligned(dict.fromkeys(stems.values()), dict.fromkeys(self.content.refused, (0, 0)))
        refused = self.content.refused
        return {name: _of_a_base(refused[pairs[stem]]) for name, stem in stems.items() if stem in pairs}


def _of_a_base(refusal: Refusal) -> Refusal:
    """Quantised weights of a base have an original: return the refusal with that as its remedy."""
    return replace(refusal, remedy=UNPACKED) if refusal.code == "OD103" else refusal


def open_base(folder: str | os.PathLike[str]) -> Base:
    """Read the headers of a model's weights.

    Args:
        folder: A folder with ``model.safetensors``, shards and their index, ``pytorch_model.bin``, or a distributed
            checkpoint.

    Raises:
        NotARun: If there is no such folder, or no whole model in it that can be read.
    """
    folder = Path(folder)
    try:
        name = whole_model(folder, sorted(os.listdir(folder)))
    except OSError as error:
        raise NotARun(f"The base {str(folder)!r} cannot be read: {first_line(error)}. {_REMEDY}") from error
    if name is None:
        looked_for = "model.safetensors[.index.json], pytorch_model.bin[.index.json] or .metadata"
        raise NotARun(f"No weights of a whole model in the base {str(folder)!r} (looked for {looked_for}). {_REMEDY}")
    try:
        weights = read_whole_model(folder / name)
    except UnreadableFile as error:
        finding = error.to_finding(shown_path(folder / name, folder))
        raise NotARun(f"The base {str(folder)!r} cannot be read: {finding}", [finding]) from error
    content = read_dense(weights)
    if not content.readable:
        reason, remedy = "", _REMEDY
        if content.refused:
            name, refusal = next(iter(content.refused.items()))
            reason, remedy = f" {name}: {refusal.reason}", _of_a_base(refusal).remedy
        raise NotARun(f"The base {str(folder)!r} holds no weight matrix that can be read.{reason} {remedy}")
    configured = [ties_embeddings(parent) for parent in dict.fromkeys((folder, (folder / name).parent))]
    return Base(folder, weights, content, next((ties for ties in configured if ties is not None), None))


def base_checkpoint(
    base: Base,
    shapes: Mapping[str, MatrixShape],
    transposed: Collection[str] = (),
    sources: Mapping[str, str] | None = None,
) -> tuple[Checkpoint, list[Finding]]:
    """Return the base as the checkpoint of step 0, under the names of the run, and findings about what it lacks.

    Args:
        base: The base.
        shapes: Every matrix of the run.
        transposed: Names of matrices that the base stores as (in, out) although the run has them as (out, in): adapters
            of GPT-2's Conv1D.
        sources: Name in the run → name of the matrix it was copied from, where an adapter repeats layers.
    """
    sources = sources or {}
    by_source = base.find({sources.get(name, name): shape for name, shape in shapes.items()})
    matches = {name: by_source[source] for name in shapes if (source := sources.get(name, name)) in by_source}
    matrices: dict[str, StoredMatrix] = {}
    resized: dict[str, tuple[int, int]] = {}
    for name, (_, matrix) in matches.items():
        fitting = oriented(matrix, shapes[name], name in transposed)
        if fitting is None:
            resized[name] = (matrix.shape.out, matrix.shape.in_)
        else:
            matrices[name] = fitting
    opened: Callable[[], AbstractContextManager[OpenCheckpoint]] = partial(open_matrices, matrices, (base.weights,))
    inputs = tuple(
        {"path": part.path.name, "bytes": part.bytes, "header_sha256": part.header_sha256}
        for part in base.weights.parts
    )
    base_shapes = {name: matrix.shape for name, matrix in matrices.items()}
    findings = (
        *_renamed({sources.get(name, name): base_name for name, (base_name, _) in matches.items()}),
        *_lacking(base, shapes, matches, resized),
    )
    return Checkpoint(0, base.folder, -1, base_shapes, opened, findings, inputs), list(findings)


def _renamed(base_names: Mapping[str, str]) -> Iterable[Finding]:
    """Yield a finding about the matrices that the base calls differently, by name in the run → name in the base."""
    renamed = {name: base_name for name, base_name in base_names.items() if name.partition("@")[0] != base_name}
    if renamed:
        pairs = some(f"{name} is {base_name} there" for name, base_name in renamed.items())
        message = (
            f"The base calls {len(renamed)} of {len(base_names)} matrices differently: {pairs}. By name and shape, "
            "these are the same matrices."
        )
        evidence = {"matrices": list(renamed), "called": list(renamed.values())}
        yield Finding("OD136", message, step=0, evidence=evidence)


def _lacking(
    base: Base, shapes: Mapping[str, MatrixShape], matches: Collection[str], resized: Mapping[str, tuple[int, int]]
) -> Iterable[Finding]:
    """Yield one finding for each reason why matrices of the run are not compared with the base."""
    missing = [name for name in shapes if name not in matches]
    refused = base.refused(missing)
    groups: dict[tuple[str, str, bool], list[str]] = defaultdict(list)
    for name in missing:
        is_weight = shapes[name].holds == "weight"
        if name in refused:
            refusal = refused[name]
            groups[f"The base's {{}} cannot be used. {refusal.reason}", refusal.remedy, is_weight].append(name)
        else:
            remedy = "Pass the base that training started from; new layers are in no base."
            groups["The base has no {}.", remedy, is_weight].append(name)
    for is_weight in (True, False):
        names = [name for name in resized if (shapes[name].holds == "weight") == is_weight]
        sizes = some(
            f"{name} is {resized[name]} in the base and {(shapes[name].out, shapes[name].in_)} in the run"
            for name in names
        )
        remedy = "Pass the base that training started from; resized embeddings are in no base."
        if names:
            message = f"Shapes differ between base and run: {sizes}."
            groups[message, remedy, is_weight] = names
    compared = len(shapes) - len(missing) - len(resized)
    for (reason, remedy, is_weight), names in groups.items():
        consequence = (
            "Only updates between checkpoints are analysed, not those since the start."
            if is_weight
            else "Their updates are analysed, but not compared with the base."
        )
        message = f"{reason.replace('{}', some(names), 1)} {consequence} "
        message += f"{compared} of {len(shapes)} matrices are compared with the base."
        evidence = {"matrices": names, "compared": compared, "of": len(shapes)}
        matrix = names[0] if len(names) == 1 else ""
        yield Finding("OD124", message, remedy, matrix=matrix, step=0, evidence=evidence)


_BASE = "Pass the weights before training (--base)."


def every_shape(checkpoints: Sequence[Checkpoint]) -> dict[str, MatrixShape]:
    """Return each matrix that occurs in some checkpoint → its newest shape."""
    return {name: shape for checkpoint in checkpoints for name, shape in checkpoint.shapes.items()}


def has_updates(checkpoints: Sequence[Checkpoint], base: Checkpoint | None) -> bool:
    """Return whether there are updates: as such, as differences of two checkpoints, or as differences from the base."""
    shapes = every_shape(checkpoints)
    if any(shape.holds == "update" for shape in shapes.values()):
        return True
    if base is not None and any(name in base.shapes for name, shape in shapes.items() if shape.holds == "weight"):
        return True
    return any(len(training) > 1 for training in by_training(checkpoints))


def start_findings(
    checkpoints: Sequence[Checkpoint], base: Checkpoint | None, moved: Mapping[str, str]
) -> Iterator[Finding]:
    """Yield findings that say what totals are counted from; none if all matrices are updates already.

    Args:
        checkpoints: The checkpoints of all trainings.
        base: The weights before training, if given.
        moved: Name of each adapter matrix with an unknown start → its initialisation.
    """
    yield from _unknown_starts(checkpoints, moved)
    if not any(shape.holds == "weight" for shape in every_shape(checkpoints).values()):
        return
    if base is not None:
        message = f"Updates of dense weights are counted from the base {base.folder.name!r}."
        yield Finding("OD123", message, evidence={"base": base.folder.name})
        return
    for training in by_training(checkpoints):
        first = training[0]
        if len(training) == 1:
            message = (
                f"Training {first.segment} has one checkpoint (step {first.step}): its dense weights have no update."
            )
            yield Finding("OD105", message, _BASE, file=first.folder.name, step=first.step)
        else:
            message = (
                f"Updates of dense weights are counted from the first checkpoint of training {first.segment}, step "
                f"{first.step}, not from the start of training."
            )
            yield Finding("OD123", message, _BASE, step=first.step, evidence={"segment": first.segment})


def _unknown_starts(checkpoints: Sequence[Checkpoint], moved: Mapping[str, str]) -> Iterator[Finding]:
    """Yield findings about adapters that started with a part of the base weight and have no initial adapter."""
    for training in by_training(checkpoints):
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
        step, evidence = training[-1].step, {"matrices": names}
        if len(training) > 1:
            message = f"{reason} Increments between checkpoints are known, totals since the start are not: {matrices}."
            yield Finding("OD138", message, remedy, step=step, evidence=evidence)
        else:
            remedy += " Or convert it: save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER)."
            file = training[0].folder.name
            yield Finding("OD105", f"{reason} {matrices}.", remedy, file, step=step, evidence=evidence)
