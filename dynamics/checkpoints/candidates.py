"""The content of one folder, by file names: adapters, weights, and the trainer's state beside them.

Weights make a checkpoint. A configuration without weights makes no adapter, and the tensors of a file without PEFT's
name decide, when it is read, whether it is an adapter or a model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamics.checkpoints.formats import diffusers
from dynamics.checkpoints.formats.peft import WEIGHTS
from dynamics.checkpoints.formats.peft_config import CONFIG
from dynamics.checkpoints.formats.transformers import WHOLE, is_distributed, lone_shards, whole_model
from dynamics.checkpoints.names import natural_order
from dynamics.checkpoints.steps import is_plain_step

STATE = "trainer_state.json"
#: PEFT's name for an adapter without a name; it is saved in the folder itself.
DEFAULT = "default"
#: Words in the names of folders and files whose weights are a copy, an average or another model than the trained one.
#: They are left out if there are others.
_SECONDARY = re.compile(
    r"(^|[-_./])(ema|critic|ref|reference|reward|old|vae|text_encoder(_\d)?|image_encoder|safety_checker|merged)"
    r"([-_./]|$)",
    re.IGNORECASE,
)
#: Parts of a pipeline that diffusers' scripts train side by side: separate models, whose updates have no sum.
_COMPONENT = re.compile(r"(unet|transformer|controlnet|prior|decoder|text_encoder)(_?\d)?(_ema)?")
#: How deep below a checkpoint its weights may lie: ``actor/lora_adapter/``.
_DEEPEST = 2


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter: its name, its folder, and its two files where present."""

    name: str
    folder: Path
    weights: Path | None
    config: Path | None


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder that may be a checkpoint.

    Args:
        step: Optimizer step.
        folder: The folder.
        adapters: The adapters in it.
        state: Its ``trainer_state.json``, if present.
        entries: Names of all files and folders in it.
        whole: The file of weights, or their index, that has no adapter's name: its tensors decide what it is. It is
            read if there are no adapters, or none that can be analysed.
        config: The ``adapter_config.json`` that belongs to ``whole`` if its tensors are an adapter's.
        beside: Other files of weights in the same folder.
        others: Folders below it that hold other weights.
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
        """Whether file names in it promise weights."""
        return self.whole is not None or any(adapter.weights is not None for adapter in self.adapters)


def candidate(folder: Path, step: int, names: Sequence[str], *, is_run: bool = False) -> CheckpointFolder:
    """Return the weights in a folder, or below it if it holds none itself.

    Args:
        folder: The folder.
        step: Its step.
        names: Names of all files and folders in it.
        is_run: Whether it is a whole run, whose subfolders are not its weights.
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
    config = next((parent / CONFIG for parent in (holder, folder) if (parent / CONFIG).exists()), None)
    first, *beside = [*weights, None]
    return CheckpointFolder(
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


def of_file(folder: Path, step: int, path: Path, names: Sequence[str], *, has_state: bool = False) -> CheckpointFolder:
    """Return one file as a checkpoint.

    Args:
        folder: Its folder.
        step: Its step.
        path: The file.
        names: Names of all files and folders in the folder.
        has_state: Whether the training state in the folder belongs to the file.
    """
    state = folder / STATE if STATE in names and has_state else None
    config = folder / CONFIG if CONFIG in names else None
    return CheckpointFolder(step, folder, (AdapterFolder(DEFAULT, folder, path, config),), state, tuple(names))


def holds_weights(folder: Path, names: Sequence[str]) -> bool:
    """Return whether file names in the folder itself promise weights."""
    return not set(WEIGHTS).isdisjoint(names) or bool(_weights(folder, names))


def entries(folder: Path) -> list[str]:
    """Return the names in a folder, in natural order; none if it cannot be read."""
    try:
        return sorted(os.listdir(folder), key=natural_order)
    except OSError:
        return []


def _adapter(name: str, folder: Path, names: Iterable[str]) -> AdapterFolder:
    names = set(names)
    weights = next((folder / file for file in WEIGHTS if file in names), None)
    return AdapterFolder(name, folder, weights, folder / CONFIG if CONFIG in names else None)


def _named_adapters(folder: Path, names: Iterable[str]) -> Iterator[AdapterFolder]:
    """Yield the adapters in subfolders: PEFT saves every adapter but the default one in a subfolder of its name."""
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
    """Return whether a folder is named like a part of a pipeline.

    >>> is_component("text_encoder_2"), is_component("default")
    (True, False)
    """
    return _COMPONENT.fullmatch(name) is not None


def holds_adapter(names: Iterable[str]) -> bool:
    """Return whether one of the names is a file of PEFT."""
    return not {CONFIG, *WEIGHTS}.isdisjoint(names)


def _weights(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of weights without PEFT's names, in order of preference."""
    whole = whole_model(folder, names)
    shards = set(lone_shards(names))
    named_freely = [name for name in weight_names(names) if name not in (*WEIGHTS, *WHOLE) and name not in shards]
    named_freely.sort(
        key=lambda name: (name != diffusers.FILE, bool(_SECONDARY.search(Path(name).stem)), natural_order(name))
    )
    second_models = [name for name in WHOLE if name in names and name != whole and not name.endswith(".json")]
    return [folder / name for name in [*([whole] if whole else []), *named_freely, *second_models]]


def _holders(folder: Path, depth: int = _DEEPEST) -> list[Path]:
    """Return the folders below a checkpoint that hold weights, those of the trained model first."""
    holders = sorted(_below(folder, depth), key=lambda path: natural_order(path.relative_to(folder).as_posix()))
    return sorted(holders, key=lambda path: bool(_SECONDARY.search(path.relative_to(folder).as_posix())))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the folders of weights below one, without following links or entering other runs."""
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


# --- files without weights ------------------------------------------------------------------------

#: Files that trainers save beside the weights: optimizer, schedule, random numbers, position in the data, arguments.
_STATE = re.compile(
    r"((.*[-_])?optim(izer)?([-_].*)?|(lr_)?scheduler.*|rng_state.*|random_states.*|(grad_)?scaler.*|(training_)?args"
    r"|custom_checkpoint.*|sampler.*|data|dl_state.*|data_?loader.*|(recipe|train|trainer|training|extra)_state.*"
    r"|(bf16_)?(zero_pp|mp)_rank_.*|model_world_size.*|model_optim_rng|tokenizer.*|vocab.*|common)"
    r"\.(bin|pt|pth|pkl|safetensors)",
    re.IGNORECASE,
)
#: Folders of such files.
_STATE_FOLDER = re.compile(
    r"\..*|(dist_)?optim(izer)?([-_].*)?|(lr_)?scheduler.*|rng.*|data_?loader.*|tokenizer.*|wandb|logs?|tensorboard"
    r"|.*\.zarr",
    re.IGNORECASE,
)
_READABLE = (".safetensors", ".bin", ".pt", ".pth")


def is_state_folder(name: str) -> bool:
    """Return whether a folder's name is one of a trainer's state, logs or our results, which hold no weights.

    >>> is_state_folder("optimizer_0"), is_state_folder("capture.zarr"), is_state_folder("unet")
    (True, True, False)
    """
    return _STATE_FOLDER.fullmatch(name) is not None


def weight_names(names: Iterable[str]) -> list[str]:
    """Return the files whose tensors can be read, without those of the trainer's state.

    >>> weight_names(["optimizer.pt", "rng_state_0.pth", "training_args.bin", "mm_projector.bin", "README.md"])
    ['mm_projector.bin']
    """
    return [name for name in names if name.endswith(_READABLE) and not _STATE.fullmatch(name)]
