"""The weights before training: what totals of dense weights are counted from, and what DoRA rescales."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dynamics.checkpoints.dense import DenseWeights, read_dense, turned
from dynamics.checkpoints.errors import NotARun, UnreadableFile, one_line
from dynamics.checkpoints.names import shown_path, some
from dynamics.checkpoints.opening import open_matrices
from dynamics.checkpoints.products import Product, under
from dynamics.checkpoints.trajectory import Checkpoint, MatrixShape, OpenCheckpoint
from dynamics.checkpoints.weight_files import Weights
from dynamics.checkpoints.whole_models import read_whole_model, ties_embeddings, whole_model
from dynamics.findings import Finding

#: Names on how many first words are tried: models have one or two.
_PREFIXES = 4
_REMEDY = "Pass the folder that holds the weights of the model before training."


@dataclass(frozen=True)
class Base:
    """The weights of a model before training.

    Args:
        folder: Where they are.
        weights: Their header.
        held: Their matrices, by their own names.
    """

    folder: Path
    weights: Weights
    held: DenseWeights

    def find(self, names: Collection[str]) -> dict[str, Product]:
        """The base's matrix for each name of the run that it has; see :func:`aligned`."""
        return {name: self.held.products[own] for name, own in aligned(names, self.held.products).items()}


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
        raise NotARun(f"The base {str(place)!r} cannot be read: {one_line(error)}. {_REMEDY}") from error
    if name is None:
        looked_for = "model.safetensors[.index.json], pytorch_model.bin[.index.json] or .metadata"
        raise NotARun(f"No weights of a whole model in the base {str(place)!r} (looked for {looked_for}). {_REMEDY}")
    try:
        weights = read_whole_model(place / name)
    except UnreadableFile as error:
        finding = error.to_finding(shown_path(place / name, place))
        raise NotARun(f"The base {str(place)!r} cannot be read: {finding}", [finding]) from error
    held = read_dense(weights, tied_embeddings=ties_embeddings((place / name).parent))
    if not held.products:
        raise NotARun(f"The base {str(place)!r} holds no weight matrix that can be read. {_REMEDY}")
    return Base(place, weights, held)


def aligned(names: Iterable[str], own: Collection[str]) -> dict[str, str]:
    """Name in the run to name in the base, where the base has it.

    Bases are often saved without the prefix of the head that was trained on top (``h.0.attn`` for
    ``transformer.h.0.attn``), or with it: one first word is left out, or put before all names, where more names are
    found so. ``name@adapter`` is the matrix ``name``.

    >>> aligned(["transformer.h.0.attn", "head"], ["h.0.attn"])
    {'transformer.h.0.attn': 'h.0.attn'}
    """
    names, own = list(names), set(own)
    wanted = {name: name if name in own else name.partition("@")[0] for name in names}
    changes: list[Callable[[str], str]] = [str]
    changes += [partial(_without, prefix) for prefix in _first_words(wanted.values())]
    changes += [partial(_with, prefix) for prefix in _first_words(own)]
    found = [{name: changed for name, one in wanted.items() if (changed := change(one)) in own} for change in changes]
    return max(found, key=len)  # the first of those that find as many


def _first_words(names: Iterable[str]) -> list[str]:
    words = Counter(name.partition(".")[0] for name in names if "." in name)
    return [f"{word}." for word, _ in words.most_common(_PREFIXES)]


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _with(prefix: str, name: str) -> str:
    return prefix + name


def base_checkpoint(
    base: Base, shapes: Mapping[str, MatrixShape], transposed: Collection[str] = ()
) -> tuple[Checkpoint, list[Finding]]:
    """The base as the checkpoint of step 0, under the names of the run, and what it lacks.

    Args:
        base: The base.
        shapes: Every matrix of the run.
        transposed: Names of matrices that the base stores as (in, out) although the run has them as (out, in): adapters
            of GPT-2's Conv1D.
    """
    found = base.find(shapes)
    products: dict[str, Product] = {}
    other: dict[str, tuple[int, int]] = {}
    for name, product in found.items():
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
    findings = tuple(_lacking(base, shapes, found, other))
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


def _lacking(
    base: Base, shapes: Mapping[str, MatrixShape], found: Mapping[str, Product], other: Mapping[str, tuple[int, int]]
) -> Iterable[Finding]:
    consequence = "Their updates since the start are missing; those between checkpoints are not."
    missing = [name for name, shape in shapes.items() if name not in found and shape.holds == "weight"]
    resized = [name for name in other if shapes[name].holds == "weight"]
    if missing:
        message = f"The base has no {some(missing)}. {consequence}"
        remedy = "Pass the base that training started from; new layers have none."
        matrix = missing[0] if len(missing) == 1 else ""
        yield Finding("OD124", message, remedy, matrix=matrix, step=0, evidence={"matrices": missing})
    if resized:
        sizes = "; ".join(
            f"{name} is {other[name]} in the base and {(shapes[name].out, shapes[name].in_)} in the run"
            for name in resized[:3]
        )
        message = f"The base has {len(resized)} matrices of another shape: {sizes}. {consequence}"
        remedy = "Pass the base that training started from; resized embeddings have none."
        matrix = resized[0] if len(resized) == 1 else ""
        yield Finding("OD124", message, remedy, matrix=matrix, step=0, evidence={"matrices": resized})
