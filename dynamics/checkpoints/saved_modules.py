"""Modules that are saved whole beside an adapter (``modules_to_save``): dense matrices, where there is a base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dynamics.checkpoints.dense import sort_tensors
from dynamics.checkpoints.names import matrix_names
from dynamics.checkpoints.products import Product
from dynamics.checkpoints.weight_files import TensorInfo

#: Kinds of tensors beside the factors that are weights of the model.
SAVED = ("modules_to_save", "saved weights")


@dataclass(frozen=True)
class SavedModules:
    """Saved modules as matrices.

    Args:
        products: Name of the matrix to how it is read.
        keys: Keys of the tensors that they are read from.
    """

    products: Mapping[str, Product]
    keys: frozenset[str]


def saved_modules(
    beside: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorInfo], taken: Collection[str]
) -> SavedModules:
    """Of the tensors beside an adapter's factors, those that are trained weights of two or more dimensions.

    PEFT writes ``classifier.weight`` or ``classifier.modules_to_save.weight``; what it calls ``original_module`` is the
    frozen original. A name that two tensors would get is left to neither.

    Args:
        beside: Kind of tensor to keys, as in ``Adapter.beside``.
        tensors: Header of the file.
        taken: Names of the adapter's own matrices: a weight saved beneath its adapter is the frozen one.
    """
    keys = [key for kind in SAVED for key in beside.get(kind, ()) if "original_module" not in key.split(".")]
    stems = {key: key.removesuffix(".weight").replace(".modules_to_save", "", 1) for key in keys}
    named = matrix_names(stems.values())
    names = {key: named[stem] for key, stem in stems.items()}
    counted = Counter(names.values())
    free = {key: name for key, name in names.items() if counted[name] == 1 and name not in taken}
    sorted_ = {key: sort_tensors({name: (key, tensors[key])}).products for key, name in free.items()}
    products = {name: product for own in sorted_.values() for name, product in own.items()}
    return SavedModules(products, frozenset(key for key, own in sorted_.items() if own))
