"""The weights before training: what totals of dense weights are counted from, and what DoRA rescales.

What the updates of matrices that did not start at zero are counted from, and whether there are any.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dynamics.checkpoints.alignment import aligned, expert_forms
from dynamics.checkpoints.errors import NotARun, UnreadableFile
from dynamics.checkpoints.files import Weights
from dynamics.checkpoints.formats.transformers import (
    DenseWeights,
    read_dense,
    read_whole_model,
    ties_embeddings,
    whole_model,
)
from dynamics.checkpoints.matrices import Product, open_matrices, turned, under
from dynamics.checkpoints.names import shown_path
from dynamics.checkpoints.ties import embedding_of
from dynamics.checkpoints.trajectory import Checkpoint, MatrixShape, OpenCheckpoint
from dynamics.findings import Finding
from dynamics.text import first_line, some

_REMEDY = "Pass the folder that holds the weights of the model before training."
#: What to do about a base whose weights are quantised.
UNPACKED = (
    "Pass the 16-bit original of the base: save it dequantised (model.dequantize()), or take the unquantised model."
)


@dataclass(frozen=True)
class Base:
    """The weights of a model before training.

    Args:
        folder: Where they are.
        weights: Their header.
        held: Their matrices, by their own names.
        ties_head: Whether its configuration says that the output layer is the input embedding; ``None``: not said.
    """

    folder: Path
    weights: Weights
    held: DenseWeights
    ties_head: bool | None = None

    def find(self, wanted: Mapping[str, MatrixShape]) -> dict[str, tuple[str, Product]]:
        """The base's matrix for each name of the run that it has, under its own name there; see :func:`aligned`.

        An output layer that is not saved is the input embedding that it is tied to, unless the configuration says
        that it is tied to none.
        """
        sizes = {name: (shape.out, shape.in_) for name, shape in wanted.items()}
        forms = expert_forms(self.held.products, sizes)
        held = {**self.held.products, **{name: form.product for name, form in forms.items()}}
        pairs = aligned(sizes, {name: (product.shape.out, product.shape.in_) for name, product in held.items()})
        if self.ties_head is not False:
            for name in wanted.keys() - pairs.keys():
                embedding = embedding_of(name.partition("@")[0], wanted[name], self.held.products)
                if embedding is not None:
                    pairs[name] = embedding
        return {name: (pairs[name], held[pairs[name]]) for name in wanted if name in pairs}

    def refused(self, names: Iterable[str]) -> dict[str, str]:
        """Why the base's matrix cannot be used, for each of these names that the base has but does not give."""
        stems = {name: name.partition("@")[0].partition("[")[0] for name in names}
        pairs = aligned(dict.fromkeys(stems.values()), dict.fromkeys(self.held.refused, (0, 0)))
        return {name: self.held.refused[pairs[stem]].reason for name, stem in stems.items() if stem in pairs}


def open_base(folder: str | os.PathLike[str]) -> Base:
    """Reads the headers of a model's weights.

    Args:
        folder: A folder with ``model.safetensors``, shards and their index, ``pytorch_model.bin``, or a distributed
            checkpoint.

    Raises:
        NotARun: If there is no such folder, or no whole model in it that can be read.
    """
    place = Path(folder)
    try:
        name = whole_model(place, sorted(os.listdir(place)))
    except OSError as error:
        raise NotARun(f"The base {str(place)!r} cannot be read: {first_line(error)}. {_REMEDY}") from error
    if name is None:
        looked_for = "model.safetensors[.index.json], pytorch_model.bin[.index.json] or .metadata"
        raise NotARun(f"No weights of a whole model in the base {str(place)!r} (looked for {looked_for}). {_REMEDY}")
    try:
        weights = read_whole_model(place / name)
    except UnreadableFile as error:
        finding = error.to_finding(shown_path(place / name, place))
        raise NotARun(f"The base {str(place)!r} cannot be read: {finding}", [finding]) from error
    held = read_dense(weights)
    if not held.products:
        reason, remedy = "", _REMEDY
        if held.refused:
            name, refusal = next(iter(held.refused.items()))
            reason, remedy = f" {name}: {refusal.reason}", UNPACKED
        raise NotARun(f"The base {str(place)!r} holds no weight matrix that can be read.{reason} {remedy}")
    said = [ties_embeddings(one) for one in dict.fromkeys((place, (place / name).parent))]
    return Base(place, weights, held, next((one for one in said if one is not None), None))


def base_checkpoint(
    base: Base,
    shapes: Mapping[str, MatrixShape],
    transposed: Collection[str] = (),
    sources: Mapping[str, str] | None = None,
) -> tuple[Checkpoint, list[Finding]]:
    """The base as the checkpoint of step 0, under the names of the run, and what it lacks.

    Args:
        base: The base.
        shapes: Every matrix of the run.
        transposed: Names of matrices that the base stores as (in, out) although the run has them as (out, in): adapters
            of GPT-2's Conv1D.
        sources: Name in the run to the name of what it was copied from, where an adapter repeats layers.
    """
    sources = sources or {}
    by_source = base.find({sources.get(name, name): shape for name, shape in shapes.items()})
    found = {name: by_source[one] for name in shapes if (one := sources.get(name, name)) in by_source}
    products: dict[str, Product] = {}
    other: dict[str, tuple[int, int]] = {}
    for name, (_, product) in found.items():
        fitting = fitted(product, shapes[name], name in transposed)
        if fitting is None:
            other[name] = (product.shape.out, product.shape.in_)
        else:
            products[name] = under("", fitting)
    files = {"": base.weights}
    # Products of the base read from the file called "".
    opened: Callable[[], AbstractContextManager[OpenCheckpoint]] = partial(open_matrices, products, files)
    inputs = tuple(
        {"path": part.path.name, "bytes": part.bytes, "header_sha256": part.header_sha256}
        for part in base.weights.parts
    )
    own = {name: product.shape for name, product in products.items()}
    findings = (
        *_renamed({sources.get(name, name): one for name, (one, _) in found.items()}),
        *_lacking(base, shapes, found, other),
    )
    return Checkpoint(0, base.folder, -1, own, opened, findings, inputs), list(findings)


def fitted(product: Product, shape: MatrixShape, is_transposed: bool) -> Product | None:
    """The base's matrix with the orientation of the run's; ``None`` if it has another shape.

    Args:
        product: The base's matrix.
        shape: The run's.
        is_transposed: Whether the base is known to store (in, out) where the run has (out, in).
    """
    own, wanted = (product.shape.out, product.shape.in_), (shape.out, shape.in_)
    if own == wanted and not (is_transposed and own[0] == own[1]):
        return product
    # A weight has the orientation of its file, whatever training made of it.
    return turned(product) if own[::-1] == wanted and shape.holds == "update" else None


def _renamed(found: Mapping[str, str]) -> Iterable[Finding]:
    called = {name: one for name, one in found.items() if name.partition("@")[0] != one}
    if called:
        yield Finding(
            "OD136",
            f"The base calls {len(called)} of {len(found)} matrices differently: "
            f"{some(f'{name} is {one} there' for name, one in called.items())}. They are taken for the same, by name "
            "and shape.",
            step=0,
            evidence={"matrices": list(called), "called": list(called.values())},
        )


def _lacking(
    base: Base, shapes: Mapping[str, MatrixShape], found: Collection[str], other: Mapping[str, tuple[int, int]]
) -> Iterable[Finding]:
    """One finding for each reason why matrices of the run are not compared with the base."""
    missing = [name for name in shapes if name not in found]
    refused = base.refused(missing)
    groups: dict[tuple[str, str, bool], list[str]] = defaultdict(list)
    for name in missing:
        is_weight = shapes[name].holds == "weight"
        if name in refused:
            groups[f"The base does not give {{}}. {refused[name]}", UNPACKED, is_weight].append(name)
        else:
            remedy = "Pass the base that training started from; new layers have none."
            groups["The base has no {}.", remedy, is_weight].append(name)
    for is_weight in (True, False):
        resized = {name: size for name, size in other.items() if (shapes[name].holds == "weight") == is_weight}
        sizes = "; ".join(
            f"{name} is {size} in the base and {(shapes[name].out, shapes[name].in_)} in the run"
            for name, size in list(resized.items())[:3]
        )
        remedy = "Pass the base that training started from; resized embeddings have none."
        if resized:
            message = f"The base has {len(resized)} matrices of another shape: {sizes}."
            groups[message, remedy, is_weight] = list(resized)
    compared = len(shapes) - len(missing) - len(other)
    for (reason, remedy, is_weight), names in groups.items():
        consequence = (
            "Their updates since the start are missing; those between checkpoints are not."
            if is_weight
            else "Their updates are analysed, but not compared with the base."
        )
        message = f"{reason.replace('{}', some(names), 1)} {consequence} "
        message += f"{compared} of {len(shapes)} matrices are compared with the base."
        evidence = {"matrices": names, "compared": compared, "of": len(shapes)}
        matrix = names[0] if len(names) == 1 else ""
        yield Finding("OD124", message, remedy, matrix=matrix, step=0, evidence=evidence)


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
