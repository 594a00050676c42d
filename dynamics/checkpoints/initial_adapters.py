"""Adapters that did not start at zero: what training changed is counted from the initial adapter.

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA move a part of the base weight into the adapter before training. What training
changed is then s B A less what it was at the start. The start lies beside the checkpoints where a training kept it
(``pissa_init/``), or is ``checkpoint-0``. Without it the difference of two checkpoints is still exact.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynamics.checkpoints.candidates import CONFIG, DEFAULT, WEIGHTS, Candidate
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import WeightFile, read_weight_file
from dynamics.checkpoints.formats.peft import Adapter, read_adapter
from dynamics.checkpoints.formats.peft_config import read_adapter_config
from dynamics.checkpoints.matrices import Product, since, under

_METHODS = "pissa|olora|corda|loftq|lora[_-]?ga"
#: Folders that hold the start of a training, and those that trainers keep beside it for conversion.
_OF_METHOD = re.compile(rf"({_METHODS})[_-]init(ial)?([_-].*)?", re.IGNORECASE)
_INITIAL = re.compile(r"(.*[_-])?init(ial)?([_-].*)?|checkpoint-0+", re.IGNORECASE)
_AUXILIARY = re.compile(rf"({_METHODS})[_-](init(ial)?|backup|converted)([_-].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class InitialAdapter:
    """The adapter at the start of training: its folder's name, its file, and its products."""

    name: str
    file: WeightFile
    products: Mapping[str, Product]

    @property
    def is_of_method(self) -> bool:
        """Whether its name says that the training began so, whatever its configuration says."""
        return _OF_METHOD.fullmatch(self.name) is not None

    @property
    def file_name(self) -> str:
        """Under what its file is opened beside those of the adapters, whose names are those of folders."""
        return f"/{self.name}"


def without_auxiliary(candidate: Candidate) -> Candidate:
    """The candidate without folders that are the start, a backup or a conversion of the adapter itself."""
    kept = tuple(one for one in candidate.adapters if one.name == DEFAULT or not _AUXILIARY.fullmatch(one.name))
    return replace(candidate, adapters=kept) if kept else candidate


def initial_adapters(run: Path) -> list[InitialAdapter]:
    """Adapters in folders of a run that are called like the start of a training; those named after a method first.

    What cannot be read is left out: the start then counts as not being there.
    """
    try:
        names = sorted(name for name in os.listdir(run) if _INITIAL.fullmatch(name))
    except OSError:
        return []
    adapters = []
    for name in sorted(names, key=lambda name: _OF_METHOD.fullmatch(name) is None):
        folder = run / name
        path = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
        if path is None or folder.is_symlink():
            continue
        try:
            file = read_weight_file(path)
            adapter = read_adapter(file, read_adapter_config(folder / CONFIG))
        except UnreadableFile:
            continue
        products = {key: one for key, one in adapter.products.items() if one.shape.rank}
        if products:
            adapters.append(InitialAdapter(name, file, products))
    return adapters


def counted_from_start(
    adapter: Adapter, initial: Sequence[InitialAdapter]
) -> tuple[Adapter, InitialAdapter | None, tuple[str, ...]]:
    """The adapter with products that are updates, the initial adapter that was used, and names that have no start.

    Args:
        adapter: As it was read.
        initial: Of its run.
    """
    usable = [one for one in initial if adapter.moved_start or one.is_of_method]
    start = next((one for one in usable if _belongs(one, adapter.products)), None)
    if start is None and not adapter.moved_start:
        return adapter, None, ()
    products: dict[str, Product] = {}
    for name, product in adapter.products.items():
        before = None if start is None else start.products.get(name)
        if not product.shape.rank:
            products[name] = product
        elif start is None or before is None:
            products[name] = replace(product, shape=replace(product.shape, holds="state"))
        else:
            products[name] = since(product, under(start.file_name, before))
    unknown = tuple(name for name, product in products.items() if product.shape.holds == "state")
    return replace(adapter, products=products), start, unknown


def _belongs(initial: InitialAdapter, products: Mapping[str, Product]) -> bool:
    """Whether an initial adapter has matrices of these names, and all that it shares with them are of one size."""
    shared = [(initial.products[name].shape, products[name].shape) for name in initial.products if name in products]
    return bool(shared) and all((one.out, one.in_) == (other.out, other.in_) for one, other in shared)
