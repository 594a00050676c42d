"""Tiny random mixtures of experts of every family in transformers that has a router, built from configuration alone."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: Given to every configuration that has a field of that name.
_SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id", "num_dense_layers", "first_k_dense_replace"), 0),
    **dict.fromkeys(("bos_token_id", "n_group", "topk_group", "n_groups", "n_shared_experts", "num_expert_group"), 1),
    **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers", "decoder_sparse_step"), 1),
    **dict.fromkeys(("encoder_sparse_step", "expert_layer_period"), 1),
    **dict.fromkeys(("eos_token_id", "num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "zero_expert_num", "mamba_expand"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "mamba_d_conv"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 5),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "chunk_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "max_position_embeddings", "expert_capacity"), 64),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "router_jitter_noise"), 0.0),
    "mlp_only_layers": [],
    **dict.fromkeys(("attention_dropout", "dropout", "dropout_rate", "activation_dropout", "moe_token_dropout"), 0.0),
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
#: Type of the configuration → what it needs beside that.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": {},
    "axk2": {},
    "bailing_hybrid": {"layer_types": ["full_attention", "full_attention"]},
    "beam": _SPARSE,
    "cohere2_moe": {},
    "dbrx": {
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 5, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": _SPARSE,
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_v4": {},
    "diffusion_gemma_text": {},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {},
    "dots3_note_text": {},
    "ernie4_5_moe": {},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 24], **_SECTIONS},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {"enable_moe_block": True},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm4v_moe_text": {"rope_parameters": {**_SECTIONS["rope_parameters"], "partial_rotary_factor": 1.0}},
    "glm5_next_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "qk_rope_head_dim": 0,
        "qk_head_dim": 8,
        **_SPARSE,
    },
    "glm_moe_dsa": {},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2_text": {},
    "inkling_text": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0, "use_mamba_kernels": False},
    "jetmoe": {},
    "kimi_linear": _LINEAR,
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {},
    "longcat_flash": {},
    "mellum": {},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mistral4": {},
    "mistral_large4_text": {},
    "mixtral": {},
    "muse_spark_text": {},
    "nemotron_h": {},
    "nllb-moe": {},
    "olmoe": {},
    "openai_privacy_filter": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_moe": {},
    "qwen3_next": _LINEAR,
    "qwen3_omni_moe_text": {},
    "qwen3_vl_moe_text": {},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "solar_open": {},
    "step3p5": {**_SPARSE, "sliding_window": 64},
    "switch_transformers": {"decoder_start_token_id": 0},
    "unlimited_ocr_text": {},
    "zaya": {"num_experts_per_tok": 1},
}


def mixture(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a model in training mode whose weights are large enough for routers to decide.

    Args:
        family: A key of ``FAMILIES``.
        seed: Of the weights.
        changes: Of the configuration.
    """
    kind = CONFIG_MAPPING[family]
    fields = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", {}), *dir(kind)}
    small = {name: value for name, value in _SMALL.items() if name in fields}
    config = kind(**{**small, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = _class_of(kind)(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.is_floating_point() and "norm" not in name:
                parameter.normal_(0, 0.2)
    return model


def _class_of(kind: type) -> type[nn.Module]:
    """Return the language model of a configuration, else its shortest model."""
    module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    classes = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.endswith("PreTrainedModel")
        if getattr(value, "config_class", None) is kind
    ]
    words = ("ForCausalLM", "ForConditionalGeneration")
    ranked = sorted(classes, key=lambda one: (not one.__name__.endswith(words), len(one.__name__)))
    return ranked[0]


def batch(model: nn.Module, seed: int = 1, samples: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Return words with an attention mask: the first sample is padded by two on the left."""
    ids = torch.randint(3, 60, (samples, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    words = {"input_ids": ids, "attention_mask": mask}
    return {**words, "labels": ids} if "labels" in inspect.signature(model.forward).parameters else words


def loss(model: nn.Module, words: dict[str, Tensor]) -> Tensor:
    """Return the model's loss, or the mean square of its first output."""
    outputs = model(**words)
    own = getattr(outputs, "loss", None)
    return outputs[0].float().square().mean() if own is None else own
