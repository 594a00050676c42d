"""The formats of adapters, in one list. To add one, write a file that reads it, and list it in ``FORMATS``.

The particular comes before the general, as trainers share names of files and of keys: first the trainers whose own
configuration gives the scale, then libraries that are known by their keys, then PEFT, whose files need its
configuration, last those that are known and not analysed. Whole models are in ``transformers`` and ``distributed``,
formats of files that cannot be opened in ``unread``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from dynamics.checkpoints.formats import diffusers
from dynamics.checkpoints.formats.lycoris import read_lycoris
from dynamics.checkpoints.formats.mlx import is_mlx, is_mlx_vlm, read_mlx, read_mlx_vlm
from dynamics.checkpoints.formats.peft import WEIGHTS, read_peft
from dynamics.checkpoints.formats.peft_config import AdapterFile
from dynamics.checkpoints.formats.torchtune import is_mistral, is_torchtune, read_mistral, read_torchtune
from dynamics.checkpoints.matrices import FileContent, Refusal
from dynamics.checkpoints.names import matrix_names, parse_key

_AVERAGE = re.compile(r"(^|[-_.])ema([-_.]|$)", re.IGNORECASE)


def _has_own_keys(file: AdapterFile) -> bool:
    """Return whether a file's keys decide what it is: beside PEFT's names, a configuration does."""
    weights = file.weights
    has_peft_names = weights.path.name in WEIGHTS or any(parse_key(key) for key in weights.tensors)
    return file.config is None or not has_peft_names or weights.path.name == diffusers.FILE


def _has_config(file: AdapterFile) -> bool:
    return file.config is not None


@dataclass(frozen=True)
class Format:
    """One format of adapter files.

    Args:
        title: What a file of it is, with its article.
        keys: Pattern that one of its keys matches; ``""`` if its keys are like those of other formats.
        read: Reads it; ``None`` if it is not read.
        has_mark: Recognises a file by more than its keys; ``None`` if the keys are enough.
    """

    title: str
    keys: str = ""
    read: Callable[[AdapterFile], FileContent] | None = None
    has_mark: Callable[[AdapterFile], bool] | None = None

    def matches(self, keys: Iterable[str]) -> bool:
        """Return whether one of the keys is of this format."""
        return bool(self.keys) and any(map(re.compile(self.keys).search, keys))

    def recognises(self, file: AdapterFile) -> bool:
        """Return whether a file is of this format."""
        if self.has_mark is not None:
            return self.has_mark(file)
        return self.matches(file.weights.tensors) and _has_own_keys(file)


FORMATS = (
    Format("a LoRA file in MLX' format", r"\.lora_[ab]$", read_mlx, is_mlx),
    Format("a LoRA file in MLX-VLM's format", r"_proj\.[AB]$", read_mlx_vlm, is_mlx_vlm),
    Format("a LoRA file in torchtune's format", r"\.lora_[ab]\.weight$", read_torchtune, is_torchtune),
    Format("a LoRA file of mistral-finetune", "", read_mistral, is_mistral),
    Format("a LoKr adapter (Kronecker product)", r"\.lokr_w[12]|\.lokr_t2", read_lycoris),
    Format("a LoHa adapter (Hadamard product)", r"\.hada_w[12]", read_lycoris),
    Format("a DoRA adapter in kohya's format", r"\.dora_scale$", read_lycoris),
    Format(
        "a LoRA file in kohya's format (lora_down, lora_up, alpha)",
        r"^lora_(unet|te\d?|transformer|prior)_",
        read_lycoris,
    ),
    Format("a LoRA file in cloneofsimo's format", r"^[a-z_]+:\d+:(up|down)$", read_lycoris),
    Format("a LoRA file in xlabs' format", r"\.processor\..*_lora\d?\.(down|up)\.weight$", read_lycoris),
    Format(
        "a LoRA file with lora_down and lora_up keys (kohya or diffusers)",
        r"\.lora_(down|up)\.weight$",
        read_lycoris,
    ),
    Format(
        "a LoRA file in diffusers' format",
        r"^(transformer|unet|text_encoder(_\d)?|diffusion_model)\..*\.lora(_A|_B|\.)",
        read_lycoris,
    ),
    Format("a LoRA file of a diffusion model", r"^(double|single)_blocks\.\d+\..*\.lora_[AB]\.", read_lycoris),
    Format("a PEFT adapter", "", read_peft, _has_config),
    Format("a prompt-tuning adapter", r"(^|\.)prompt_embeddings$|(^|\.)prompt_encoder\."),
    Format("an adaption-prompt adapter", r"\.adaption_(prompt|gate)$"),
    Format("an IA3 adapter", r"\.ia3_l$"),
    Format("a VeRA adapter", r"\.vera_lambda_[bd]$"),
    Format("an OFT or BOFT adapter", r"\.b?oft_[rRs]\b"),
    Format("a textual-inversion embedding", r"^emb_params$|^<.*>$|^string_to_param"),
)


def read_adapter(file: AdapterFile) -> FileContent | None:
    """Read an adapter file in the first format that recognises it; ``None`` if none does without a configuration.

    Raises:
        UnreadableFile: ``OD102`` if its configuration cannot be used.
    """
    form = next((form for form in FORMATS if form.read is not None and form.recognises(file)), None)
    if form is None or form.read is None:
        return None
    content = form.read(file)
    title = describe(file.weights.tensors)
    is_refused = content.refusal is not None and content.refusal.code != "OD106"
    if form.read is not read_peft or content.ranks or is_refused or title is None:
        return content
    reason = f"It is {title}, although its configuration says {(file.config or {}).get('peft_type')}."
    refusal = Refusal("OD103", reason, "Put the configuration and the weights of one adapter together.")
    return FileContent(refusal=refusal, settings=content.settings)


def describe(keys: Collection[str]) -> str | None:
    """Return what a weight file is if it is not PEFT LoRA, by its keys; ``None`` if they do not tell.

    >>> describe(["lora_unet_blocks_0_q.lora_down.weight", "lora_unet_blocks_0_q.alpha"])
    "a LoRA file in kohya's format (lora_down, lora_up, alpha)"
    >>> describe(["base_model.model.q.lora_A.weight"]) is None
    True
    """
    return next((form.title for form in FORMATS if form.matches(keys)), None)


def is_adapter(keys: Collection[str]) -> bool:
    """Return whether tensors are an adapter's factors, in PEFT's or another form, by their keys.

    >>> is_adapter(["module.q.lora_A.default.weight"]), is_adapter(["q.lora_a"]), is_adapter(["q.A", "q.B"])
    (True, True, True)
    >>> is_adapter(["q.weight"]), is_adapter(["mixer.A"])
    (False, False)
    """
    factors = any(re.search(r"\.lora_(embedding_)?[ABab](\.|$)", key) for key in keys)
    pairs = any(key.endswith(".A") and f"{key[:-1]}B" in keys for key in keys)
    return factors or pairs or any(form.read is read_lycoris and form.matches(keys) for form in FORMATS)


def kind_beside(path: Path, keys: Collection[str], analysed: Collection[str]) -> str | None:
    """Return what a file beside the analysed weights is: a copy of them or another form; ``None`` if it was trained.

    Args:
        path: The file.
        keys: Keys of its tensors.
        analysed: Names of the matrices that are analysed.
    """
    if is_adapter(keys):
        return "an adapter (a further one, or the same in another format)"
    if _AVERAGE.search(path.name):
        return "an average of weights (EMA)"
    stems = {stem.removesuffix(".weight") for stem in matrix_names(keys)}
    names = set(matrix_names(stems).values())
    is_model = names & {name.partition("@")[0] for name in analysed}
    return "a whole model (merged, in another format, or a further one)" if is_model else None
