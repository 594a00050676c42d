"""Formats of weights that are known and not read, and what makes their checkpoints readable."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dynamics.checkpoints.names import natural_order, shown_path
from dynamics.checkpoints.steps import named_step

#: How deep below a checkpoint files are listed, and how many.
_DEPTH = 3
_MOST_FILES = 5_000


@dataclass(frozen=True)
class UnreadFormat:
    """A format of weights that is not read.

    Args:
        title: Its name, with its article.
        remedy: How to make its checkpoints readable; ``FILE``, ``FOLDER`` and ``STEP`` stand for the file, its folder
            and its step.
    """

    title: str
    remedy: str


_DEEPSPEED = "DeepSpeed's sharded state, from which the weights were not gathered"
_SAVE_STATE = (
    "Save its weights alone, if you trust the file: torch.save(torch.load('FILE', map_location='cpu', "
    "weights_only=False)['state_dict'], 'checkpoint-STEP/pytorch_model.bin')"
)
MEGATRON = UnreadFormat(
    "a checkpoint of Megatron or NeMo, whose layers lie in one tensor",
    "Convert it to Hugging Face's format: Megatron-Bridge (AutoBridge.export_ckpt, of an adapter export_adapter_ckpt), "
    "`swift export --to_hf true`, or NeMo (llm.export_ckpt with target='hf', of an adapter 'hf-peft').",
)
#: Pattern of the path below the checkpoint → the format; special formats before general ones.
_FORMATS: tuple[tuple[str, UnreadFormat], ...] = (
    (
        r"(^|/)zero_to_fp32\.py$",
        UnreadFormat(
            _DEEPSPEED,
            "Gather them: run `python zero_to_fp32.py . .` in FOLDER, which writes pytorch_model.bin there "
            "(DeepSpeed before 0.16: `python zero_to_fp32.py . pytorch_model.bin`).",
        ),
    ),
    (
        r"(^|/)(bf16_)?(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt$",
        UnreadFormat(
            _DEEPSPEED,
            "Gather them: run `python -m deepspeed.utils.zero_to_fp32 . .` in the folder around FOLDER, which writes "
            "pytorch_model.bin there.",
        ),
    ),
    (
        r"(^|/)model_world_size_\d+_rank_\d+\.pt$",
        UnreadFormat(
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
        UnreadFormat(
            "a litgpt checkpoint, whose fused factors are no plain products",
            "Merge and convert it: `litgpt merge_lora FOLDER`, then `litgpt convert_from_litgpt FOLDER OUT/step-STEP`, "
            "for each checkpoint; analyse OUT with the base (--base).",
        ),
    ),
    (
        r"\.ckpt$",
        UnreadFormat(
            "a Lightning checkpoint, which holds Python objects as well as weights",
            f"{_SAVE_STATE}; of an adapter, write its adapter_config.json beside it.",
        ),
    ),
    (
        r"\.nemo$",
        UnreadFormat(
            "a NeMo archive",
            "Convert it with NeMo: llm.export_ckpt(path, target='hf', output_path=…), of an adapter target='hf-peft'.",
        ),
    ),
    (
        r"\.gguf$",
        UnreadFormat(
            "a GGUF file of llama.cpp",
            "Pass the adapter or model it was converted from (adapter_model.safetensors, model.safetensors).",
        ),
    ),
    (
        r"\.npz$",
        UnreadFormat(
            "an archive of NumPy arrays, as early versions of MLX saved adapters",
            "Convert it: python -c \"import numpy, safetensors.numpy as s; s.save_file(dict(numpy.load('FILE')), "
            "'FOLDER/adapters.safetensors')\"; and write its scale into FOLDER/adapter_config.json: "
            '{"lora_parameters": {"scale": 20.0}} (20 was the default of MLX).',
        ),
    ),
    (
        r"\.(msgpack|h5|keras|onnx|tflite|pb)$",
        UnreadFormat("a file of another framework than PyTorch", "Save the model as safetensors (save_pretrained)."),
    ),
)
#: The remedy for a torch file whose weights lie inside another object.
NESTED = f"{_SAVE_STATE}, and 'state_dict' the key under which the file keeps them ('model', 'module')."


def remedy_for(remedy: str, path: Path, run: Path, step: int | None = None) -> str:
    """Return a remedy with the file, its folder and its step filled in; a step in the file's name wins.

    Args:
        remedy: Text with ``FILE``, ``FOLDER`` and ``STEP``.
        path: The file.
        run: The run's folder.
        step: The step of the checkpoint that it lies in, if known.

    >>> remedy_for("Convert FILE of step STEP.", Path("run/step_5/a.gguf"), Path("run"))
    'Convert step_5/a.gguf of step 5.'
    """
    named = named_step(path.stem) or (named_step(path.parent.name) if step is None else None)
    step = step if named is None else named.number
    filled = remedy.replace("FILE", shown_path(path, run)).replace("FOLDER", shown_path(path.parent, run))
    return filled.replace("STEP", "N (N its step)" if step is None else str(step), 1).replace(
        "STEP", "N" if step is None else str(step)
    )


def unread_format(folder: Path) -> tuple[Path, UnreadFormat] | None:
    """Return the first file of a format that is not read, and the format, or ``None``.

    Args:
        folder: A checkpoint, or a run without checkpoints.
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
