"""Which kinds and variants of adapter are a plain product of two factors, and which are not.

The weight change that PEFT makes is s B A for LoRA and the variants that only change how it is
trained or initialised. It is something else for variants that rescale, route, pool or mask (DoRA,
Arrow, QALoRA, BD-LoRA), and for KaSA, which truncates the base weight when it starts. Initialisations that
move a part of the base weight into the adapter (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) leave s B A minus what it
was at the start: increments are known, totals only with the initial adapter (``initial_adapters``).
Source: PEFT 0.21, ``tuners/lora/layer.py`` and ``tuners/lora/variants.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamics.checkpoints.matrices import Refusal, Remark
from dynamics.checkpoints.names import shown

_ANALYSED = ("LORA", "ADALORA")

#: Keys of LoraConfig and AdaLoraConfig that change nothing about the product, or are read elsewhere.
_HARMLESS = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
    layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core
    trainable_token_indices loftq_config eva_config corda_config lora_ga_config use_dora velora_config
    alora_invocation_tokens use_qalora qalora_group_size monteclora_config layer_replication runtime_config lora_bias
    target_parameters use_bdlora arrow_config kasa_config ensure_weight_tying target_modules_to_tie merge_weights
    target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step""".split()  # noqa: SIM905 (as a list it would fill a page)
)

#: Variants that are switched on by a key of their own: key -> (code, name, why, remedy).
_SWITCHES = {
    "use_dora": ("OD105", "DoRA", "its update rescales the base weight, which is not in the run"),
    "kasa_config": ("OD105", "KaSA", "it truncates the base weight when it starts, and that weight is not in the run"),
    "use_qalora": ("OD103", "QALoRA", "its A acts on pooled inputs, so B A is not the weight's update"),
    "use_bdlora": ("OD103", "BD-LoRA", "its factors are stored as diagonal blocks"),
    "arrow_config": ("OD103", "Arrow", "it routes between adapters token by token"),
    "enable_lora": ("OD103", "merged LoRA (enable_lora)", "its factors are stored interleaved by group"),
}

#: Of these, the variants that are analysed if the base is given.
_WITH_BASE = ("use_dora",)

#: Initialisations that move a part of the base weight into the adapter: prefix -> name.
_MOVING = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
#: Initialisations from which B A starts at zero on the unchanged base weight.
_ZERO_START = ("true", "gaussian", "eva", "orthogonal", "mica")


def judge(content: Mapping[str, Any], *, has_base: bool = False) -> tuple[Refusal | None, tuple[Remark, ...]]:
    """Return why the adapter of a configuration is not analysed, if so, and how its matrices must be read.

    Args:
        content: ``adapter_config.json``.
        has_base: Whether the base's weights are available.

    >>> judge({"peft_type": "IA3"})[0].reason
    'It is an IA3 adapter; only LoRA and AdaLoRA are products of factors that are analysed.'
    >>> judge({"peft_type": "LORA", "init_lora_weights": "gaussian"})
    (None, ())
    """
    kind = content["peft_type"]
    if kind not in _ANALYSED:
        kind = shown(kind)
        article = "an" if kind[:1] in "AEIO" else "a"
        reason = f"It is {article} {kind} adapter; only LoRA and AdaLoRA are products of factors that are analysed."
        return Refusal("OD103", reason, "Analyse a LoRA run, or convert the adapter (PEFT: convert_to_lora)."), ()
    refusal = _switched_on(content, has_base) or _unknown_variant(content) or _unknown_start(content)
    return refusal, () if refusal else tuple(_remarks(content, kind))


def _switched_on(content: Mapping[str, Any], has_base: bool) -> Refusal | None:
    for key, (code, name, why) in _SWITCHES.items():
        if content.get(key) and not (key in _WITH_BASE and has_base):
            needed = "Give the base weights (--base)." if key in _WITH_BASE else "Its base weights are needed."
            remedy = needed if code == "OD105" else "It is not analysed."
            return Refusal(code, f"It is {name} ({key}): {why}.", remedy)
    return None


def _unknown_variant(content: Mapping[str, Any]) -> Refusal | None:
    # PEFT switches every variant on by a key of this form; an unknown one may mean anything.
    unknown = [key for key in _unknown_keys(content) if key.startswith("use_") or key.endswith("_config")]
    if not unknown:
        return None
    reason = f"Its configuration switches on {', '.join(unknown)}: unknown, so the update may be more than B A."
    return Refusal("OD103", reason, "Update the toolkit, or remove the key if it has no effect.")


def _unknown_keys(content: Mapping[str, Any]) -> list[str]:
    unknown = (key for key, value in content.items() if value and key not in _HARMLESS and key not in _SWITCHES)
    return list(map(shown, unknown))


def _start(content: Mapping[str, Any]) -> str:
    value = content.get("init_lora_weights", True)
    return "true" if value is None else str(value).lower()


def moved_start(content: Mapping[str, Any]) -> str:
    """Return the name of an initialisation that moves a part of the base weight into the adapter, or ``""``.

    >>> moved_start({"peft_type": "LORA", "init_lora_weights": "pissa_niter_16"})
    'PiSSA'
    """
    if content["peft_type"] == "ADALORA":  # has one initialisation of its own, with a diagonal of zeros
        return ""
    return next((name for prefix, name in _MOVING.items() if _start(content).startswith(prefix)), "")


def _unknown_start(content: Mapping[str, Any]) -> Refusal | None:
    start = _start(content)
    if content["peft_type"] == "ADALORA" or moved_start(content) or start in (*_ZERO_START, "false"):
        return None
    reason = f"Its init_lora_weights={start!r} is unknown: B A may hold a part of the base weight."
    return Refusal("OD105", reason, "Update the toolkit, or give the initial adapter's kind.")


def _remarks(content: Mapping[str, Any], kind: str) -> list[Remark]:
    remarks = []
    if _start(content) == "false":
        text = "The adapter started at random (init_lora_weights=false): each total includes that random start."
        remarks.append(Remark("OD121", text))
    if content.get("alora_invocation_tokens"):
        text = "Activated LoRA: the update acts only on the tokens from the invocation sequence on."
        remarks.append(Remark("OD121", text))
    if content.get("use_dora"):
        text = "DoRA: the analysed update is the change of the whole weight, of full rank, formed with the base."
        remarks.append(Remark("OD121", text))
    if content.get("monteclora_config"):
        text = "MonteCLoRA: the analysed product is what PEFT merges, without the sampled perturbations."
        remarks.append(Remark("OD121", text))
    if kind == "ADALORA":
        text = "AdaLoRA: the analysed product is B diag(E) A, with E as stored."
        remarks.append(Remark("OD121", text))
    unknown = _unknown_keys(content)
    if unknown:
        text = f"The configuration has keys that PEFT does not know; they are ignored: {', '.join(sorted(unknown))}."
        remarks.append(Remark("OD119", text))
    return remarks
