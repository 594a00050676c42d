"""What one folder holds, by the names of what is in it: adapters, weights, and weights beside them.

A folder is what its weights are. A configuration without weights makes no adapter, and whether a file of any other name
is an adapter or a model, its tensors decide when it is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamics.checkpoints.formats.whole_models import WHOLE, is_distributed, lone_shards, whole_model
from dynamics.checkpoints.names import natural_order
from dynamics.checkpoints.steps import is_plain_step
from dynamics.checkpoints.unread import is_state_folder, weight_names

#: In PEFT's own order of preference; the last two where an adapter was sharded.
WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin.index.json",
)
#: Where diffusers' training scripts save an adapter.
DIFFUSERS = "pytorch_lora_weights.safetensors"
CONFIG = "adapter_config.json"
STATE = "trainer_state.json"
#: The name PEFT gives an adapter that was given none; it is saved in the folder itself.
DEFAULT = "default"
#: Words of folders and files whose weights are a copy, an average or another model than the one that is trained. Where
#: there are others, these are left out.
_SECONDARY = re.compile(
    r"(^|[-_./])(ema|critic|ref|reference|reward|old|vae|text_encoder(_\d)?|image_encoder|safety_checker|merged)"
    r"([-_./]|$)",
    re.IGNORECASE,
)
#: Parts of a pipeline that diffusers' scripts train side by side: models of their own, whose updates have no sum.
_COMPONENT = re.compile(r"(unet|transformer|controlnet|prior|decoder|text_encoder)(_?\d)?(_ema)?")
#: How deep below a checkpoint its weights may lie: ``actor/lora_adapter/``.
_DEEPEST = 2


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter: its name, its folder, and its two files where they are there."""

    name: str
    folder: Path
    weights: Path | None
    config: Path | None


@dataclass(frozen=True)
class Candidate:
    """A folder that may be a checkpoint.

    Args:
        step: Optimizer step.
        folder: The folder.
        adapters: The adapters in it.
        state: Its ``trainer_state.json``, if there.
        entries: Names of everything in it.
        whole: The file that holds, or names, weights that no adapter's name says to be one: its tensors decide. It is
            read where there are no adapters, or nothing of them can be analysed.
        config: The ``adapter_config.json`` that belongs to ``whole`` if its tensors are an adapter's.
        beside: Further files of weights in the same folder.
        others: Folders below it that hold further weights.
    """

    step: int
    folder: Path
    adapters: tuple[AdapterFolder, ...]
    state: Path | None
    entries: tuple[str, ...]
    whole: Path | None = None
    config: Path | None = None
    beside: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()

    @property
    def holds_weights(self) -> bool:
        """Whether there are weights in it that can be read, by their names."""
        return self.whole is not None or any(adapter.weights is not None for adapter in self.adapters)


def candidate(folder: Path, step: int, names: Sequence[str], *, is_run: bool = False) -> Candidate:
    """Look through a folder, and below it where it holds no weights itself.

    Args:
        folder: The folder.
        step: Its step.
        names: Names of what is in it.
        is_run: Whether it is a whole run: below it are other things than its weights.
    """
    state = folder / STATE if STATE in names else None
    adapters = [_adapter(DEFAULT, folder, names)] if not set(WEIGHTS).isdisjoint(names) else []
    adapters += _named_adapters(folder, names)
    weights = _weights(folder, names)
    holder, others = folder, ()
    if not adapters and not weights and not is_run:
        folders = _holders(folder)
        if folders:
            holder, others = folders[0], tuple(folders[1:])
            inside = entries(holder)
            adapters = [_adapter(DEFAULT, holder, inside)] if not set(WEIGHTS).isdisjoint(inside) else []
            weights = _weights(holder, inside)
    elif not is_run:
        taken = {adapter.folder for adapter in adapters}
        others = tuple(path for path in _holders(folder) if path not in taken)
    if not adapters and not weights and CONFIG in names:
        adapters = [_adapter(DEFAULT, folder, names)]
    config = next((place / CONFIG for place in (holder, folder) if (place / CONFIG).exists()), None)
    first, *beside = [*weights, None]
    return Candidate(
        step,
        folder,
        tuple(adapters),
        state,
        tuple(names),
        first,
        config,
        tuple(path for path in beside if path is not None),
        others,
    )


def of_file(folder: Path, step: int, path: Path, names: Sequence[str], *, has_state: bool = False) -> Candidate:
    """One file as a checkpoint.

    Args:
        folder: The folder that it is in.
        step: Its step.
        path: The file.
        names: Names of what is in the folder.
        has_state: Whether the folder's training state is the file's.
    """
    state = folder / STATE if STATE in names and has_state else None
    config = folder / CONFIG if CONFIG in names else None
    return Candidate(step, folder, (AdapterFolder(DEFAULT, folder, path, config),), state, tuple(names))


def holds_weights(folder: Path, names: Sequence[str]) -> bool:
    """Return whether weights lie in the folder itself, by their names."""
    return not set(WEIGHTS).isdisjoint(names) or bool(_weights(folder, names))


def entries(folder: Path) -> list[str]:
    """Return the names of what is in a folder, in natural order; none if it cannot be read."""
    try:
        return sorted(os.listdir(folder), key=natural_order)
    except OSError:
        return []


def _adapter(name: str, folder: Path, names: Iterable[str]) -> AdapterFolder:
    names = set(names)
    weights = next((folder / file for file in WEIGHTS if file in names), None)
    return AdapterFolder(name, folder, weights, folder / CONFIG if CONFIG in names else None)


def _named_adapters(folder: Path, names: Iterable[str]) -> Iterator[AdapterFolder]:
    """PEFT saves every adapter but the default one in a subfolder of its name."""
    for name in names:
        inner = folder / name
        if is_plain_step(name) or is_state_folder(name) or not inner.is_dir():
            continue
        inside = entries(inner)
        if not holds_adapter(inside) or (set(WEIGHTS).isdisjoint(inside) and _weights(inner, inside)):
            continue
        # A folder with a training state or checkpoints of its own is another run, such as a copy of the best one.
        if STATE not in inside and not any(map(is_plain_step, inside)):
            yield _adapter(name, inner, inside)


def is_component(name: str) -> bool:
    """Return whether a folder is called like a part of a pipeline.

    >>> is_component("text_encoder_2"), is_component("default")
    (True, False)
    """
    return _COMPONENT.fullmatch(name) is not None


def holds_adapter(names: Iterable[str]) -> bool:
    """Return whether there is a file of PEFT's among the names."""
    return not {CONFIG, *WEIGHTS}.isdisjoint(names)


def _weights(folder: Path, names: Sequence[str]) -> list[Path]:
    """Files of weights that PEFT's names do not say to be adapters, in the order in which they are preferred."""
    whole = whole_model(folder, names)
    shards = set(lone_shards(names))
    other = [name for name in weight_names(names) if name not in (*WEIGHTS, *WHOLE) and name not in shards]
    other.sort(key=lambda name: (name != DIFFUSERS, bool(_SECONDARY.search(Path(name).stem)), natural_order(name)))
    further = [name for name in WHOLE if name in names and name != whole and not name.endswith(".json")]
    return [folder / name for name in [*([whole] if whole else []), *other, *further]]


def _holders(folder: Path, depth: int = _DEEPEST) -> list[Path]:
    """Folders below a checkpoint that hold weights, those of the trained model first."""
    held = sorted(_below(folder, depth), key=lambda path: natural_order(path.relative_to(folder).as_posix()))
    return sorted(held, key=lambda path: bool(_SECONDARY.search(path.relative_to(folder).as_posix())))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for name in entries(folder):
        inner = folder / name
        if is_state_folder(name) or is_distributed(name) or is_plain_step(name):
            continue
        if inner.is_symlink() or not inner.is_dir():
            continue
        names = entries(inner)
        if STATE in names or any(map(is_plain_step, names)):
            continue  # another run
        if holds_weights(inner, names):
            yield inner
        elif depth > 1:
            yield from _below(inner, depth - 1)
