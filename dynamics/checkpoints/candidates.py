"""What one folder holds, by the names of what is in it: adapters, weights, and weights beside them.

A folder is what its weights are. A configuration without weights makes no adapter, and whether a file of any other name
is an adapter or a model, its tensors decide when it is read.

Files of checkpoints that hold no weights; formats of weights that are not read, and what makes them readable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamics.checkpoints.formats.transformers import WHOLE, is_distributed, lone_shards, whole_model
from dynamics.checkpoints.names import natural_order, shown_path
from dynamics.checkpoints.steps import is_plain_step, named_step

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


#: What trainers save beside the weights: optimizer, schedule, random numbers, place in the data, arguments.
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
#: How deep below a checkpoint files are looked for, and how many.
_DEPTH = 3
_MOST_FILES = 5_000


@dataclass(frozen=True)
class Format:
    """A format of weights that is not read.

    Args:
        title: What it is, with its article.
        remedy: What makes a checkpoint of it readable; ``FILE`` and ``FOLDER`` stand for where it is, ``STEP`` for its
            step.
    """

    title: str
    remedy: str


_DEEPSPEED = "DeepSpeed's sharded state, from which the weights were not gathered"
_SAVE_STATE = (
    "Save its weights alone, if you trust the file: torch.save(torch.load('FILE', map_location='cpu', "
    "weights_only=False)['state_dict'], 'checkpoint-STEP/pytorch_model.bin')"
)
MEGATRON = Format(
    "a checkpoint of Megatron or NeMo, whose layers lie in one tensor",
    "Convert it to Hugging Face's format: Megatron-Bridge (AutoBridge.export_ckpt, of an adapter export_adapter_ckpt), "
    "`swift export --to_hf true`, or NeMo (llm.export_ckpt with target='hf', of an adapter 'hf-peft').",
)
#: Pattern of the path below the checkpoint → the format; the particular before the general.
_FORMATS: tuple[tuple[str, Format], ...] = (
    (
        r"(^|/)zero_to_fp32\.py$",
        Format(
            _DEEPSPEED,
            "Gather them: run `python zero_to_fp32.py . .` in FOLDER, which writes pytorch_model.bin there "
            "(DeepSpeed before 0.16: `python zero_to_fp32.py . pytorch_model.bin`).",
        ),
    ),
    (
        r"(^|/)(bf16_)?(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt$",
        Format(
            _DEEPSPEED,
            "Gather them: run `python -m deepspeed.utils.zero_to_fp32 . .` in the folder around FOLDER, which writes "
            "pytorch_model.bin there.",
        ),
    ),
    (
        r"(^|/)model_world_size_\d+_rank_\d+\.pt$",
        Format(
            "verl's sharded state",
            "Merge it: python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir FOLDER.",
        ),
    ),
    (
        r"(^|/)mp_rank_\d+(_\d+)*/model_optim_rng\.pt$|(^|/)distrib_optim\.pt$",
        MEGATRON,
    ),
    (
        r"(^|/)lit_model\.pth(\.lora)?$",
        Format(
            "a litgpt checkpoint, whose fused factors are no plain products",
            "Merge and convert it: `litgpt merge_lora FOLDER`, then `litgpt convert_from_litgpt FOLDER OUT/step-STEP`, "
            "for each checkpoint; analyse OUT with the base (--base).",
        ),
    ),
    (
        r"\.ckpt$",
        Format(
            "a Lightning checkpoint, which holds Python objects beside the weights",
            f"{_SAVE_STATE}; of an adapter, write its adapter_config.json beside it.",
        ),
    ),
    (
        r"\.nemo$",
        Format(
            "a NeMo archive",
            "Convert it with NeMo: llm.export_ckpt(path, target='hf', output_path=…), of an adapter target='hf-peft'.",
        ),
    ),
    (
        r"\.gguf$",
        Format(
            "a GGUF file of llama.cpp",
            "Pass the adapter or model that it was converted from (adapter_model.safetensors, model.safetensors).",
        ),
    ),
    (
        r"\.npz$",
        Format(
            "an archive of NumPy arrays, as early versions of MLX saved adapters",
            "Convert it: python -c \"import numpy, safetensors.numpy as s; s.save_file(dict(numpy.load('FILE')), "
            "'FOLDER/adapters.safetensors')\"; and write its scale into FOLDER/adapter_config.json: "
            '{"lora_parameters": {"scale": 20.0}} (20 was the default of MLX).',
        ),
    ),
    (
        r"\.(msgpack|h5|keras|onnx|tflite|pb)$",
        Format("a file of another framework than PyTorch", "Save the model as safetensors (save_pretrained)."),
    ),
)
#: The remedy for a torch file whose weights lie inside something else.
NESTED = f"{_SAVE_STATE}, and 'state_dict' the key under which the file keeps them ('model', 'module')."


def remedy_for(remedy: str, path: Path, run: Path, step: int | None = None) -> str:
    """Return a remedy with the file, its folder and its step filled in; a step in the file's name goes first."""
    named = named_step(path.stem) or (named_step(path.parent.name) if step is None else None)
    step = step if named is None else named.number
    filled = remedy.replace("FILE", shown_path(path, run)).replace("FOLDER", shown_path(path.parent, run))
    return filled.replace("STEP", "N (N its step)" if step is None else str(step), 1).replace(
        "STEP", "N" if step is None else str(step)
    )


def is_state_folder(name: str) -> bool:
    """Return whether a folder holds a trainer's state, logs, our own results or the like, and no weights.

    >>> is_state_folder("optimizer_0"), is_state_folder("capture.zarr"), is_state_folder("unet")
    (True, True, False)
    """
    return _STATE_FOLDER.fullmatch(name) is not None


def weight_names(names: Iterable[str]) -> list[str]:
    """Return those of a folder's files whose tensors can be read, whatever they are called; not the trainer's state.

    >>> weight_names(["optimizer.pt", "rng_state_0.pth", "training_args.bin", "mm_projector.bin", "README.md"])
    ['mm_projector.bin']
    """
    return [name for name in names if name.endswith(_READABLE) and not _STATE.fullmatch(name)]


def unread_format(folder: Path) -> tuple[Path, Format] | None:
    """Return the first file of a format that is not read, and the format; ``None`` if there is none.

    Args:
        folder: A checkpoint, or a run that has none.
    """
    paths = sorted((path.relative_to(folder).as_posix() for path in files_below(folder)), key=natural_order)
    for pattern, form in _FORMATS:
        search = re.compile(pattern).search
        if path := next(filter(search, paths), None):
            return folder / path, form
    return None


def files_below(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Yield the files in a folder and the folders below it; links to folders are not followed."""
    count = 0
    for parent, folders, files in os.walk(folder):
        level = len(Path(parent).relative_to(folder).parts)
        folders[:] = [] if level >= depth else sorted(folders, key=natural_order)
        for name in files:
            count += 1
            if count > _MOST_FILES:
                return
            yield Path(parent) / name
